"""Code rewards without the sandbox: the program of a response, its tests, and equal outputs."""

import decimal
import json
import math
import re

# ----------------------------------------------------------------------------------------------
# programs and tests

# Attack: text that takes a pattern minutes, in the process that trains. So there is one way only
# to read each character: [0-9]+(\.[0-9]*)? and not [0-9]+\.?[0-9]*.

# Opens a block of Python.
FENCE = re.compile(r"```[ \t]*(?:python|py)[\d.]*+(?![\w-])[^\n`]*\n", re.I)


def find_program(response: str) -> str | None:
    r"""The last fenced block of a response that is marked as Python; None if there is none.

    The mark is python, py or python3, in any case. A block without a mark may be anything, so it
    is no program. The end of the response may cut the block off.

    >>> find_program("So:\n```python\nprint(1)\n```\n")
    'print(1)\n'
    """
    *_, fence = [None, *FENCE.finditer(response)]
    if fence is None:
        return None
    return response[fence.end() :].partition("```")[0]


def read_tests(tests) -> list:
    """The tests of a problem as a list.

    tests, or its JSON text, is one of
        {"inputs": [...], "outputs": [...]}          stdin and stdout
        {"inputs": ..., "outputs": ..., "fn_name"}   arguments and value of a function
        ["assert ...", ...]                          assertions or whole programs
    The first two become (input, output, function name or None), the third stays as it is.
    Raises ValueError if there are no tests in any of these formats, or if the text of one is empty
    or has only comments: every program would pass it.

    >>> read_tests({"inputs": ["1\\n"], "outputs": ["2\\n"]})
    [('1\\n', '2\\n', None)]
    """
    if isinstance(tests, str):
        tests = json.loads(tests)
    if isinstance(tests, dict):
        return input_output_tests(tests)
    if not isinstance(tests, list) or not tests:
        raise ValueError("no tests")
    for test in tests:
        if not isinstance(test, str) or not has_code(test):
            raise ValueError("no tests")
    return tests


def input_output_tests(tests: dict) -> list[tuple]:
    inputs = tests.get("inputs")
    outputs = tests.get("outputs")
    if not isinstance(inputs, (list, tuple)) or not isinstance(outputs, (list, tuple)):
        raise ValueError("tests need 'inputs' and 'outputs', which are lists")
    name = tests.get("fn_name")
    if not inputs or not isinstance(name, (str, type(None))):
        raise ValueError("no tests")
    return [(given, wanted, name) for given, wanted in zip(inputs, outputs, strict=True)]


def has_code(text: str) -> bool:
    """Has a program a line that is neither blank nor a comment?"""
    # Only these end a line of Python, and so a comment.
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    return any(line and not line.startswith("#") for line in lines)


# ----------------------------------------------------------------------------------------------
# equal outputs

INTEGER = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
# A number as programs print it: 0.5, 1e-07, 1.0E10. (12e3 and 007 are words.)
DECIMAL = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+][0-9]+)"
)
LIST_SIGNS = re.compile(r"([\[\](){},])")


def words(text: str) -> list[list[str]]:
    """The words of each line that has any.

    Only a line feed ends a line, and only blanks, tabs and carriage returns stand between words.
    """
    found = []
    for line in text.split("\n"):
        parts = [word for word in re.split(r"[ \t\r]", line) if word]
        if parts:
            found.append(parts)
    return found


def outputs_agree(got, wanted) -> bool:
    """Equality of values (of JSON), or of texts that may be numbers.

    The expected value decides. An integer is met by that integer alone, though it may be written
    3.0. Any other number has a tolerance, see is_near(). In a printed list, [0.5,1], each entry is
    compared for itself.

    >>> outputs_agree("0.30000000000000004", "0.3")
    True
    >>> outputs_agree("1000000007.5", "1000000007")
    False
    """
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(outputs_agree, got, wanted))
    if isinstance(got, dict) and isinstance(wanted, dict):
        if got.keys() != wanted.keys():
            return False
        return all(outputs_agree(got[key], wanted[key]) for key in got)

    if got == wanted:
        return True
    if isinstance(got, str) and isinstance(wanted, str):
        return texts_agree(got, wanted)
    # A bool and an int have been compared exactly.
    if isinstance(wanted, float) and type(got) in (int, float):
        return is_near(got, wanted)
    return False


def texts_agree(got: str, wanted: str) -> bool:
    """Do two different words mean the same?"""
    if INTEGER.fullmatch(wanted):
        return is_integer(got, wanted)
    if DECIMAL.fullmatch(wanted) and NUMBER.fullmatch(got):
        return is_near(float(got), float(wanted))

    if len(wanted) < 2:
        return False
    entries = LIST_SIGNS.split(wanted)
    found = LIST_SIGNS.split(got)
    return 1 < len(entries) == len(found) and all(map(outputs_agree, found, entries))


def is_integer(got: str, wanted: str) -> bool:
    """Is a word the integer `wanted`, in another spelling: -0, 3.0 or 1e5?

    Digits before which there are zeros are no other spelling: 0011 may be bits.
    """
    if INTEGER.fullmatch(got):
        return {got, wanted} == {"-0", "0"}
    if not NUMBER.fullmatch(got) or re.match(r"[-+]?0[0-9]", wanted):
        return False
    try:
        return decimal.Decimal(got) == decimal.Decimal(wanted)
    except ArithmeticError:
        # An exponent of more digits than there are.
        return False


def is_near(got: float, wanted: float) -> bool:
    """Within 1e-6, as contests allow, or within 1e-5 of the size, as PRIME's own scorer has it.

    Where 1e-6 would be more than the number itself it is 1e-12, which is for rounding errors.
    """
    size = abs(wanted)
    absolute = 1e-12 if 0 < size < 1e-6 else 1e-6
    try:
        error = abs(got - wanted)
    except OverflowError:
        # An integer too large for a float.
        return False
    return error < math.inf and error <= max(absolute, 1e-5 * size)
