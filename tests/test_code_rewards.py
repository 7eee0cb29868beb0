"""Code rewards: which block is the program, when outputs are equal, which functions are called."""

import doctest
import json
import textwrap
import time
import tracemalloc

import pytest

import grader
from lib import code_tests
from lib.code_tests import find_program, outputs_agree, read_tests, words


def test_examples_in_docstrings():
    result = doctest.testmod(code_tests)
    assert result.attempted > 0
    assert result.failed == 0


# ----------------------------------------------------------------------------------------------
# the program of a response


@pytest.mark.parametrize(
    "response, program",
    [
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```python\nprint(1)\n```\n```python\nprint(2)\n```", "print(2)\n"),
        ("```python\nprint(1)", "print(1)"),
        ("```Python\nprint(1)\n```", "print(1)\n"),
        ("```py\nprint(1)\n```", "print(1)\n"),
        ("```PYTHON\nprint(1)\n```", "print(1)\n"),
        ("```python3\nprint(1)\n```", "print(1)\n"),
        ("```python3.11\nprint(1)\n```", "print(1)\n"),
        ("``` python\nprint(1)\n```", "print(1)\n"),
        ("```python title='x'\nprint(1)\n```", "print(1)\n"),
        ("```python\r\nprint(1)\r\n```", "print(1)\r\n"),
        # A sample of the output is no program.
        ("```python\nprint(1)\n```\nprints\n```\n1\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\n```output\n1\n```", "print(1)\n"),
        ("```\nprint(1)\n```", None),
        ("```cpp\nint x;\n```", None),
        ("```pycon\n>>> 1\n```", None),
        ("```python-repl\n>>> 1\n```", None),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_last_block_that_is_marked_as_python(response, program):
    assert find_program(response) == program


# ----------------------------------------------------------------------------------------------
# equal outputs


@pytest.mark.parametrize(
    "wanted, same, different",
    [
        # An integer is that integer, however it is written.
        ("1000", "1000 1000.0 1e3 1.000e+3", "1_000 1001 1000.5 1000.0000001 1,000 ١٠٠٠ 0x3e8"),
        ("0", "0 -0 0.0 -0.0 0e5", "1 0.000000009 1e-12 false"),
        ("-7", "-7 -7.0", "7 −7 - -7.0000001"),
        ("1000000007", "1000000007 1000000007.0", "1000000008 1000000007.5 1e9"),
        (
            "500000000499999999",
            "500000000499999999",
            "5e17 500000000500000000 500000000499999999.5",
        ),
        ("12000", "12000 12e3 12000.", "12001 12k"),
        ("9" * 5000, "9" * 5000, "8" * 5000 + " 1e5000"),
        ("3", "3 3e0", "3e99999999999999999999999 nan inf 3j"),
        # Digits that begin with a zero may be bits or a name.
        ("0011", "0011", "11 011 11.0"),
        ("11", "11 11.0", "0011"),
        ("007", "007", "7 7.0"),
        # A number that is no integer has a tolerance.
        ("0.3", "0.3 0.30000000000000004 .3 3e-1 0.3000009", "0.30001 0 1 0_3"),
        ("0.0", "0.0 0 -0.0 1e-7 -0.0000001", "0.00001 -1e-5 zero"),
        ("3.0", "3 3.0 3.00000001", "3.1 4"),
        ("0.33333333333", "0.3333333", "0.3334"),
        ("123456.789", "123456.789 123457", "123459 123454"),
        ("0.000123", "0.000123 0.0001234", "0.000125 0.00012"[:8]),
        ("1e-07", "1e-7 0.0000001 1.000001e-07", "0 1.1e-7 2e-7"),
        ("0.000000009", "0.000000009 9e-9", "0 0.000000008"),
        ("1.1102230246251565e-16", "0.0 0 -1e-16", "1e-11"),
        ("1e+20", "1e20 100000000000000000000", "1e21"),
        ("1.0E10", "10000000000.0 1e10", "1.1e10"),
        ("1e+400", "1e+400", "1 inf"),
        # Words are words.
        ("12e3", "12e3", "12000 12E3"),
        ("1_000", "1_000", "1000"),
        ("inf", "inf", "1e400 Infinity"),
        ("nan", "nan", "0 NaN"),
        ("YES", "YES", "yes Yes"),
        (".", ".", "0 0.0 1"),
        ("1-2", "1-2", "-1 1-2.0"),
        ("v1.10", "v1.10", "v1.1"),
        # The entries of a printed list.
        ("[0.3]", "[0.3] [0.30000000000000004]", "[0.31] [0.3 0.3 (0.3)"),
        ("[0.5,1,x]", "[0.5,1,x] [0.50,1,x]", "[0.5,1,y] [0.5,2,x] [0.5,1.5,x] [0.5,x,1]"),
        ("(1.5,", "(1.5, (1.50,", "(1.6, [1.5, (1.5"),
        ("{'a':0.1}", "{'a':0.1}", "{'a':0.2} {'b':0.1}"),
    ],
)
def test_words_that_are_the_same(wanted, same, different):
    for got in same.split():
        assert outputs_agree(got, wanted), got
    for got in different.split():
        assert not outputs_agree(got, wanted), got


@pytest.mark.parametrize(
    "got, wanted, same",
    [
        (3, 3, True),
        (3.0, 3, True),
        (3.0000000001, 3, False),
        (1000000007.5, 1000000007, False),
        (5e17, 500000000499999999, False),
        (2**53, 2**53 + 1, False),
        (float(2**53), 2**53 + 1, False),
        (10**400, 10**400, True),
        (0.30000000000000004, 0.3, True),
        (3, 3.0, True),
        (10**400, 1.5, False),
        (float("inf"), 1.5, False),
        (float("nan"), 1.5, False),
        (float("inf"), float("inf"), True),
        ([0.1 + 0.2, [1]], [0.3, [1]], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": 0.30000000000000004}, {"a": 0.3}, True),
        ({"a": 1}, {"b": 1}, False),
        (True, True, True),
        (False, None, False),
        (None, None, True),
        (True, 1.0000001, False),
        ("3", 3, False),
        (3, "3", False),
        ("abc", "abd", False),
        ("3.0", "3", True),
    ],
)
def test_values_that_are_the_same(got, wanted, same):
    assert outputs_agree(got, wanted) == same


@pytest.mark.parametrize(
    "text, lines",
    [
        ("1 2 \n\n 3\t4\n", [["1", "2"], ["3", "4"]]),
        ("1 2\r\n3\r\n", [["1", "2"], ["3"]]),
        ("", []),
        (" \n\t\n\r\n", []),
    ],
)
def test_lines_and_words(text, lines):
    assert words(text) == lines


@pytest.mark.parametrize("sign", "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\xa0\u3000\0")
def test_other_signs_neither_end_a_line_nor_a_word(sign):
    text = f"a{sign}b"
    assert words(text) == [[text]]
    assert words(text) not in (words("a\nb"), words("a b"))


@pytest.mark.parametrize(
    "look",
    [
        lambda: find_program("```py" + "." * 100_000 + "`"),
        lambda: find_program("```python" + "3" * 100_000 + "x\n"),
        lambda: outputs_agree("1" * 100_000 + "x", "3"),
        lambda: outputs_agree("1" * 100_000 + ".5x", "3.5"),
        lambda: outputs_agree("1." + "5" * 100_000 + "ex", "3.5"),
        lambda: outputs_agree("[" + "1" * 100_000 + "x]", "[3]"),
    ],
)
def test_no_text_takes_long_to_look_at(look):
    """This work is done in the process that trains, where no deadline ends it."""
    began = time.process_time()
    assert not look()
    assert time.process_time() - began < 1


def block(code):
    return f"Some words.\n```python\n{textwrap.dedent(code)}\n```\n"


@pytest.mark.parametrize(
    "code, wanted, score",
    [
        ("print('1_000')", "1000", 0.0),
        ("print(f'{-0.2:.0f}')", "0", 1.0),
        ("print('a\\x0cb')", "a\nb", 0.0),
        ("print('a\\u2028b')", "a\nb", 0.0),
        ("print('a', 'b', sep='\\r\\n')", "a\nb", 1.0),
        ("print([0.1 + 0.2, 1])", "[0.3, 1]", 1.0),
        ("print(1000000007.5)", "1000000007", 0.0),
        ("print(0)", "0.000000009", 0.0),
        ("print(1e-7)", "0.0", 1.0),
    ],
)
def test_what_programs_print(code, wanted, score):
    tests = {"inputs": [""], "outputs": [wanted]}
    assert grader.grade_code(block(code), tests) == score


def test_other_marks_of_a_block():
    tests = {"inputs": ["1"], "outputs": ["2"]}
    code = "print(int(input()) + 1)"
    for mark, score in (("py", 1.0), ("Python", 1.0), ("python3", 1.0), ("", 0.0), ("cpp", 0.0)):
        assert grader.grade_code(f"```{mark}\n{code}\n```", tests) == score


# ----------------------------------------------------------------------------------------------
# functions

WITH_ARGUMENTS = """
    class Solution:
        def __init__(self, n):
            self.n = n
        def f(self):
            return self.n + 1
    """
PLAIN = """
    def f(n):
        return n + 1
    """
METHOD = """
    class Solution:
        def f(self, n):
            return n + 1
    """
OTHER_METHOD = """
    class Solution:
        def g(self, n):
            return n + 1
    """
NO_CLASS = """
    Solution = 5
    """
STATIC = """
    class Solution:
        @staticmethod
        def f(n):
            return n + 1
    """
FAILING = """
    class Solution:
        def __init__(self):
            raise KeyError('x')
    """


@pytest.mark.parametrize(
    "code, score",
    [
        (PLAIN, 1.0),
        (METHOD, 1.0),
        (STATIC, 1.0),
        (WITH_ARGUMENTS + PLAIN, 1.0),
        (PLAIN + WITH_ARGUMENTS, 1.0),
        (OTHER_METHOD + PLAIN, 1.0),
        (NO_CLASS + PLAIN, 1.0),
        (FAILING + PLAIN, 1.0),
        (WITH_ARGUMENTS, 0.0),
        (OTHER_METHOD, 0.0),
        (FAILING, 0.0),
        # Names that the call itself uses.
        (PLAIN + "\n    def find(n): return 0\n    json = name = print = 0", 1.0),
    ],
)
def test_the_function_may_be_a_method_of_solution(code, score):
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2]}
    assert grader.grade_code(block(code), tests) == score


@pytest.mark.slow
def test_megabytes_of_a_value_are_not_read():
    """A list of 200,000 lists takes 14 MB of the caller's memory, per concurrent call."""
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [[[]]]}
    tracemalloc.start()
    try:
        assert grader.grade_code(block("def f(n): return [[]] * n"), tests) == 1.0
        code = block("def f(n): return [[] for _ in range(200_000)]")
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert grader.grade_code(code, tests) == 0.0
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The output itself is 0.8 MB, of which there are some copies.
    assert peak - before < 8e6


# ----------------------------------------------------------------------------------------------
# tests


@pytest.mark.parametrize(
    "value, same",
    [
        ("b'ab'", True),
        ("b'ac'", False),
        ("'ab'", False),
        ("bytearray(b'ab')", True),
        ("type('B', (bytes,), {})(b'ab')", True),
        ("[b'ab']", False),
    ],
)
def test_bytes_are_plain_data(value, same):
    tests = ["assert f() == b'ab'", "x = f()\nassert x[:1] + x[1:] == b'ab' and len(x) == 2"]
    assert grader.grade_code(block(f"def f(): return {value}"), tests) == same


def test_ranges_are_plain_data():
    code = block("def f(n): return range(1, n, 2)")
    tests = ["assert f(6) == range(1, 6, 2)", "assert f(6)[1] == 3", "assert f(6) == [1, 3, 5]"]
    assert grader.grade_code(code, tests) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": "12", "outputs": "34"},
        {"inputs": None, "outputs": ["1"]},
        {"inputs": ["1"]},
        {"inputs": ["1"], "outputs": ["1"], "fn_name": 5},
        {},
        [],
        [None],
        [3],
        [["assert f(1) == 2"]],
        ["assert f(1) == 2", " "],
        ["# nothing\x0c # but this"],
        ["# nothing\u2028assert f(2) == 5"],
        "nonsense",
        "3",
        "null",
        None,
        3,
    ],
)
def test_what_is_no_test(tests):
    with pytest.raises(ValueError):
        read_tests(tests)


def test_tests_as_text():
    tests = {"inputs": ["1"], "outputs": ["2"]}
    assert read_tests(json.dumps(tests)) == [("1", "2", None)]
    assert read_tests('["assert f(1) == 2"]') == ["assert f(1) == 2"]
