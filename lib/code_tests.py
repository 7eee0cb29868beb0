"""The tests of a programming problem, in the formats that data sets have them in."""

import json


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
        if "inputs" not in tests or "outputs" not in tests:
            raise ValueError("tests need 'inputs' and 'outputs'")
        name = tests.get("fn_name")
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        tests = [(given, wanted, name) for given, wanted in pairs]
    if not isinstance(tests, list) or not tests:
        raise ValueError("no tests")
    for test in tests:
        if isinstance(test, str) and not has_code(test):
            raise ValueError("no tests")
    return tests


def has_code(text: str) -> bool:
    """Has a program a line that is neither blank nor a comment?"""
    lines = [line.strip() for line in text.splitlines()]
    return any(line and not line.startswith("#") for line in lines)
