"""The judge of mathematical answers: rules by example, properties, hostile answers, the pool."""

import doctest
import gzip
import itertools
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import time

import pytest
import sympy
from equality_examples import DIFFERENT, EQUAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import grader
from grader import Grader, GraderError, grade_math, is_equiv
from lib import expressions, latex, mathexpr, units, values

ROOT = pathlib.Path(grader.__file__).parent


def reference(gold):
    return {"ability": "math", "ground_truth": gold}


# ----------------------------------------------------------------------------------------------
# the rules, by example


def pairs(table):
    found = []
    for category, examples in table.items():
        for gold, answer in examples:
            name = f"{category}: {gold} | {answer}"
            found.append(pytest.param(gold, answer, id=name[:80]))
    return found


@pytest.mark.parametrize("gold, answer", pairs(EQUAL))
def test_accepts(gold, answer):
    assert is_equiv(answer, gold)


@pytest.mark.parametrize("gold, answer", pairs(DIFFERENT))
def test_rejects(gold, answer):
    assert not is_equiv(answer, gold)


@pytest.mark.parametrize("rule", latex.REWRITES, ids=lambda rule: rule.example[0])
def test_each_rewriting_rule_does_what_its_example_says(rule):
    before, after = rule.example
    assert before != after
    assert latex.apply(rule.pattern, rule.replacement, before) == after


@pytest.mark.slow
def test_units_of_different_names_differ():
    """A is no V, and mg no Mg: whatever the table says of each alone."""
    symbols = sorted(units.SYMBOLS - {"unit"})
    for one, other in itertools.combinations(symbols, 2):
        assert not units.agree(units.canonical(one), units.canonical(other)), (one, other)


@pytest.mark.parametrize("module", [grader, latex, mathexpr, units, values])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_large_numbers_that_differ_by_one():
    ones = "1" * 300
    assert is_equiv(ones, ones)
    assert not is_equiv("1" * 299 + "2", ones)
    assert is_equiv("e^{120} + 1", "1 + e^{120}")
    assert not is_equiv("e^{120}", "1 + e^{120}")


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("1/3", "0.33333"),
        ("500", "5"),
        ("5", "0.05"),
        ("102018", "102019"),
        ("[0,1)", "[0,1]"),
        ("52_8", "52"),
    ],
)
def test_parity_is_the_lenient_reading(gold, answer):
    assert is_equiv(answer, gold, parity=True)
    assert not is_equiv(answer, gold)


def test_parity_does_not_accept_everything():
    assert not is_equiv("2", "3", parity=True)
    assert not is_equiv("5", r"\infty", parity=True)


def test_tolerance_is_absolute_and_for_numbers_only():
    assert is_equiv("9.95", "10", tolerance=0.1)
    assert is_equiv("10.1", "10", tolerance=0.1)
    assert not is_equiv("10.11", "10", tolerance=0.1)
    assert not is_equiv("9.95", "10")
    assert is_equiv("1.1, 2.9", "3, 1", tolerance=0.2)
    assert not is_equiv("x+0.1", "x", tolerance=0.2)
    assert grade_math(r"\boxed{9.95}", "10", tolerance=0.1)


def test_golds_of_several_kinds():
    assert grade_math(r"\boxed{5}", ["4", "5"])
    assert not grade_math(r"\boxed{6}", ["4", "5"])
    assert is_equiv("5", 5)
    assert not is_equiv(None, "5")


# ----------------------------------------------------------------------------------------------
# properties

EXACT_CATEGORIES = [
    "integers",
    "fractions",
    "radicals",
    "functions",
    "complex",
    "expressions",
    "equations",
    "intervals",
    "tuples",
    "several",
    "matrices",
]


def exact_answers():
    """The answers in the tables that are neither decimals nor approximations."""
    found = []
    for table in (EQUAL, DIFFERENT):
        for category in EXACT_CATEGORIES:
            for pair in table.get(category, ()):
                found += [text for text in pair if text and not re.search(r"\.|approx", text)]
    return found


EXACT = st.sampled_from(exact_answers())


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(EXACT, EXACT)
def test_equality_is_symmetric(a, b):
    assert is_equiv(a, b) == is_equiv(b, a)


def spaces_around_signs(text):
    if re.search(r"@|\d,(?:\\!)?\d{3}|[a-z]-[a-z]|10\*\*|\d[eE]", text):
        return text
    return re.sub(r"(?<!\\)([-+=,])", r" \1 ", text)


def left_and_right(text):
    if "sqrt[" in text:
        return text
    return re.sub(r"([(\[])([^()\[\]]*)([)\]])", r"\\left\1\2\\right\3", text)


HARMLESS = {
    "spaces": spaces_around_signs,
    "left": left_and_right,
    "dfrac": lambda text: re.sub(r"\\[dt]?frac", r"\\dfrac", text),
    "dollars": lambda text: f"${text}$",
    "parens": lambda text: rf"\({text}\)",
    "dot": lambda text: text + ".",
    "boxed": lambda text: rf"\boxed{{{text}}}",
    "display": lambda text: r"\displaystyle " + text,
    "thin space": lambda text: text + r"\,",
    "doubled": lambda text: re.sub(r"\\(?=[a-z]{2})", r"\\\\", text),
}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(EXACT, st.sampled_from(sorted(HARMLESS)))
def test_harmless_rewriting_changes_nothing(text, name):
    rewritten = HARMLESS[name](text)
    assert is_equiv(rewritten, text)
    assert is_equiv(text, rewritten)


NOTES = [
    r"\text{ (rejected)}",
    r"\ (\text{extraneous})",
    " (invalid)",
    r"\text{ does not work}",
    r",\text{ which is impossible}",
    r"~[\text{not valid}]",
    r"\quad\text{reject}",
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(EXACT, st.sampled_from(NOTES))
def test_what_an_answer_takes_back_is_not_its_answer(text, note):
    assert not is_equiv(text + note, text)
    assert not is_equiv(text, text + note)


x, y = sympy.symbols("x y")
INTEGERS = st.integers(-9, 9).map(sympy.Integer)
CONSTANTS = [sympy.pi, sympy.E, sympy.sqrt(2), sympy.Rational(2, 3), sympy.Rational(-7, 5)]
LEAVES = st.one_of(INTEGERS, st.sampled_from([x, y, *CONSTANTS]))


def larger(expressions):
    """sympy expressions that are made of others."""
    two = st.tuples(expressions, expressions)
    return st.one_of(
        two.map(lambda pair: pair[0] + pair[1]),
        two.map(lambda pair: pair[0] * pair[1]),
        two.map(lambda pair: pair[0] - 2 * pair[1]),
        expressions.map(lambda e: e**2),
        expressions.map(lambda e: sympy.sqrt(e**2 + 1)),
        expressions.map(lambda e: sympy.exp(-e / 3)),
        expressions.map(lambda e: 1 / (e**2 + 2)),
        expressions.map(lambda e: sympy.log(e**2 + 3)),
        expressions.map(sympy.sin),
        expressions.map(sympy.cos),
    )


EXPRESSIONS = st.recursive(LEAVES, larger, max_leaves=6)
STYLES = {
    "plain": sympy.latex,
    "short fractions": lambda e: sympy.latex(e, fold_short_frac=True),
    "dots": lambda e: sympy.latex(e, mul_symbol="dot"),
    "ln": lambda e: sympy.latex(e, ln_notation=True, inv_trig_style="full"),
    "powers": lambda e: sympy.latex(e, order="rev-lex", root_notation=False),
    "dfrac": lambda e: sympy.latex(e).replace(r"\frac", r"\dfrac").replace(" ", "  "),
    "program": lambda e: re.sub(r"\bE\b", "e", str(e)),
}
STEPS = [1, sympy.Rational(1, 7), x, -2]


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    EXPRESSIONS,
    st.sampled_from(sorted(STYLES)),
    st.sampled_from(sorted(STYLES)),
    st.sampled_from(STEPS),
)
def test_expressions_in_all_styles_of_sympy(expression, one, other, step):
    if expression.has(sympy.zoo, sympy.nan, sympy.oo) or len(str(expression)) > 300:
        return
    gold = STYLES[other](expression)
    assert is_equiv(STYLES[one](expression), gold)
    assert not is_equiv(STYLES[one](expression), STYLES[other](expression + step))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**40), 10**40), st.integers(1, 10**6))
def test_integers_of_any_size(n, step):
    grouped = f"{n:,}"
    assert is_equiv(grouped, str(n))
    assert is_equiv(grouped.replace(",", "{,}"), str(n))
    assert is_equiv(f"{n}.0", str(n))
    assert not is_equiv(str(n + step), str(n))


# What nobody can know the meaning of: it must not be calculated with.
UNKNOWN_SIGNS = [
    r"\foo",
    r"\circ",
    r"\otimes",
    r"\to",
    r"\Rightarrow",
    r"\subset",
    r"\star",
    r"\mapsto",
    r"\prec",
    r"\bullet",
    r"\notin",
    r"\in",
    r"\propto",
]
UNKNOWN_THINGS = [
    r"\foo{%s}",
    r"%s\,dx",
    r"\overrightarrow{AB}%s",
    r"\int_0^1 %s\,dx",
    r"\sum_{k=1}^{n} %sk",
    r"\lim_{x\to 0} %s",
    r"\operatorname{foo}(%s)",
    r"\frac{\partial %s}{\partial y}",
    r"\Lambda(%s)",
    "Q(%s)",
    r"\mathbb{Q}(%s)",
    r"\mathbb{Z}_2[%s]",
    r"\begin{Vmatrix}%s&0\\0&1\end{Vmatrix}",
]
OPERANDS = ["x", "y", "n", "2", "3", r"\pi", "x_1", r"\sqrt{2}", r"\frac{1}{3}", "f(x)", "P(A)"]
SIGN = st.sampled_from(UNKNOWN_SIGNS)
OPERAND = st.sampled_from(OPERANDS)
THING = st.builds(str.__mod__, st.sampled_from(UNKNOWN_THINGS), OPERAND)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(OPERAND, OPERAND, SIGN, SIGN)
def test_unknown_signs_are_not_calculated_with(a, b, sign, other):
    statement = f"{a} {sign} {b}"
    if a != b:
        assert not is_equiv(f"{b} {sign} {a}", statement)
        assert not is_equiv(rf"\frac{{{a} {sign} x}}{{{b} {sign} x}}", rf"\frac{{{a}}}{{{b}}}")
    if sign != other:
        assert not is_equiv(f"{a} {other} {b}", statement)
    assert not is_equiv(f"{a} {b}", statement)
    assert not is_equiv(f"2{a} {sign} {b}", f"{a} {sign} 2{b}")
    assert not is_equiv(f"0 {sign} {a}", "0")
    assert not is_equiv(f"({statement})^0", "1")
    assert not is_equiv(f"({statement})-({statement})", "0")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(THING, THING, OPERAND)
def test_names_are_not_calculated_with(one, other, operand):
    if one != other:
        assert not is_equiv(one, other)
    assert not is_equiv(f"2({one})", one)
    assert not is_equiv(one, operand)
    assert not is_equiv(f"{operand}+7{one}", f"{operand}-7{one}")
    assert not is_equiv(f"({one})^2", one)


# One name each, with %s inside. Bars and differentials have letters inside, functions anything.
BARS = [r"\overline{%s}", r"\widehat{%s}", r"\overrightarrow{%s}", r"\triangle %s"]
FUNCTIONS_OF = ["f(%s)", "g'(%s)", r"\phi(%s)", "P(%s)", "E[%s]", r"\operatorname{foo}(%s)"]
CAPITALS = st.lists(st.sampled_from("ABCDKMNXY"), min_size=2, max_size=3, unique=True)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(BARS), CAPITALS)
def test_letters_under_a_bar_stay_together(bar, letters):
    whole = bar % "".join(letters)
    others = [
        bar % "".join(letters[1:] + letters[:1]),
        "".join(letters),
        letters[0] + bar % "".join(letters[1:]),
        bar % letters[0] + bar % "".join(letters[1:]),
    ]
    for other in others:
        assert not is_equiv(other, whole)
        assert not is_equiv(whole, other)
    fraction = rf"\frac{{{whole}}}{{{bar % letters[0]}}}"
    assert not is_equiv(bar % "".join(letters[1:]), fraction)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FUNCTIONS_OF), st.integers(2, 9), st.sampled_from("abuvx"))
def test_nothing_leaves_an_unknown_function(function, number, letter):
    """It is not linear, and has no powers, products or differences of its arguments."""
    whole = function % f"{number}{letter}"
    others = [
        f"{number}" + function % letter,
        function % f"{number}" + function % letter,
        function % f"{letter}+{number}",
        whole.replace(letter, letter + "^2"),
        f"({function % letter})^{number}",
    ]
    for other in others:
        assert not is_equiv(other, whole)
        assert not is_equiv(whole, other)
    difference = function % f"{letter}+{number}"
    assert not is_equiv(f"{difference}-{function % letter}", function % f"{number}")
    assert not is_equiv(rf"\frac{{{whole}}}{{{function % letter}}}", f"{number}")


# Differentials, bars and functions, each as a whole.
BARS_OF_LETTERS = [r"\overline{AB}", r"\bar{x}", r"\hat{p}", r"\overrightarrow{CD}", r"\dot{y}"]
UNKNOWN = ["f(x)", "g'(t)", r"\phi(u)", "P(A)", "E[X]", "f(x + 1, 2)", "h(g(x))"]
DERIVATIVES = ["dx", r"\mathrm{d}y", r"\frac{dy}{dt}", r"\frac{d^2y}{dx^2}"]
WHOLES = st.sampled_from([*BARS_OF_LETTERS, *UNKNOWN, *DERIVATIVES])
FACTOR = st.sampled_from(["2", "7", "a", "b^2", r"\sin a", r"\frac{a}{3}", "(a+b)"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(WHOLES, FACTOR)
def test_what_is_no_number_never_cancels_vanishes_or_adds_up(whole, factor):
    pairs = [
        (f"{factor} + {whole} - {whole}", factor),
        (rf"\frac{{{factor} {whole}}}{{{whole}}}", factor),
        (f"0 \\cdot {whole}", "0"),
        (f"{whole} - {whole}", "0"),
        (f"{factor} {whole} + {factor} {whole}", f"2 {factor} {whole}"),
        (f"({whole})^0", "1"),
        (f"({whole}) ({whole})", f"({whole})^2"),
    ]
    for one, other in pairs:
        assert not is_equiv(one, other)
        assert not is_equiv(other, one)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(WHOLES, WHOLES, FACTOR)
def test_what_is_no_number_may_stand_elsewhere(one, other, factor):
    assert is_equiv(f"{factor} + {one} - {other}", f"-{other} + {factor} + {one}")
    assert is_equiv(f"{factor} \\cdot {one} + {other}", f"{other} + {one} \\cdot {factor}")
    if one != other:
        assert not is_equiv(f"{factor} + {one}", f"{factor} + {other}")


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.sampled_from("uvwxyt"), st.sampled_from("pqrsxy"))
def test_a_differential_is_no_product_with_d(one, other):
    assert not is_equiv(f"d{one}", f"d \\cdot {one}")
    assert not is_equiv(f"d{one}", one)
    if one != other:
        assert not is_equiv(rf"\frac{{d{one}}}{{d{other}}}", rf"\frac{{{one}}}{{{other}}}")
        assert not is_equiv(rf"\frac{{d{one}}}{{d{other}}}", rf"\frac{{d{other}}}{{d{one}}}")
        assert not is_equiv(f"{one}\\,d{other}", f"{other}\\,d{one}")
        assert not is_equiv(f"d({one}{other})", f"d{one}\\,d{other}")


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(THING, OPERAND, SIGN), min_size=1, max_size=6), st.data())
def test_everything_equals_itself_in_another_spacing(pieces, data):
    text = " ".join(pieces)
    blanks = data.draw(st.lists(st.sampled_from([" ", "  ", r"\, "]), min_size=6, max_size=6))
    spaced = "".join(piece + blank for piece, blank in zip(pieces, blanks))
    assert is_equiv(spaced, text)


SUMS = [
    r"\int_0^1 %s\,dx",
    r"\int %s\,dx",
    r"\int_{-1}^{n} x^2 %s\,dx",
    r"\sum_{k=1}^{n} %s k",
    r"\sum_{k=0}^{\infty} \frac{%s}{k!}",
    r"\sum_{i=1}^{n}\sum_{j=i}^{n} %s a_{ij}",
    r"\prod_{k=1}^{n} (%s+k)",
    r"\lim_{x\to 0} %s",
    r"\oint_C %s\,dx",
    r"\max_{x} f(%s)",
    r"\mathbb{Q}(%s)",
    r"%s\mathbb{Z}",
]
SUM = st.builds(str.__mod__, st.sampled_from(SUMS), OPERAND)
# What is equal for numbers, with S for a sum and A for an operand.
CALCULATIONS = [
    ("0(S)", "0"),
    ("1(S)", "S"),
    ("(S)-(S)", "0"),
    ("(S)+(S)", "2(S)"),
    ("(S)(S)", "(S)^2"),
    ("(S)^0", "1"),
    ("(S)^1", "S"),
    ("-(-(S))", "S"),
    (r"\frac{S}{S}", "1"),
    (r"\frac{A}{S}", r"A\frac{1}{S}"),
    ("A(S)", "(S)A"),
    ("A+(S)", "(S)+A"),
    ("A-(S)", "-(S)+A"),
    ("A(x+(S))", "Ax+A(S)"),
    ("2A(S)", "A(2(S))"),
    (r"e^{\ln(S)}", "S"),
    (r"|-(S)|", "|S|"),
    (r"\cos(-(S))", r"\cos(S)"),
    ("(S)=A", "2(S)=2A"),
    ("(S)=A", "(S)-A=0"),
    ("2(S)<A", "4(S)<2A"),
    ("|S|<3", "-3<(S)<3"),
    ("2(S,A)", "(2(S),2A)"),
    (r"\begin{vmatrix}S&0\\0&1\end{vmatrix}", "S"),
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(SUM, OPERAND, st.sampled_from(CALCULATIONS))
def test_sums_are_not_calculated_with(total, operand, calculation):
    one, other = (text.replace("A", operand).replace("S", total) for text in calculation)
    assert not is_equiv(one, other)
    assert not is_equiv(other, one)


# Other spellings, which say the same of a sum.
SPELLINGS = {
    "blanks": lambda text: text.replace(" ", "  ").replace("=", " = "),
    "thin spaces": lambda text: text.replace(" ", r"\, "),
    "limits": lambda text: re.sub(r"(\\(?:sum|prod|int|lim|max))", r"\1\\limits", text),
    "display": lambda text: r"\displaystyle " + text,
    "left and right": lambda text: text.replace("(", r"\left(").replace(")", r"\right)"),
    "dfrac": lambda text: text.replace(r"\frac", r"\dfrac"),
    "upright d": lambda text: text.replace(r"\,dx", r"\,\mathrm{d}x"),
    "d without a space": lambda text: text.replace(r"\,dx", " dx"),
    "braces": lambda text: re.sub(r"([_^])([\dn])(?!\w)", r"\1{\2}", text),
    "unicode": lambda text: text.replace(r"\sum", "∑").replace(r"\int", "∫"),
    "another letter": lambda text: re.sub(r"(?<![a-z\\])k", "j", text),
    "dollars": lambda text: f"${text}$",
}
PLACES = ["S", "2S", "-S", "x+S", "y-2(S)", r"\frac{1}{n}(S)", "(S)^2", "y = S", "(S, 1)", "3, S"]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(SUM, st.sampled_from(PLACES), st.sampled_from(sorted(SPELLINGS)))
def test_a_sum_equals_itself_in_another_spelling(total, place, name):
    text = place.replace("S", total)
    rewritten = SPELLINGS[name](text)
    assert is_equiv(rewritten, text)
    assert is_equiv(text, rewritten)


def test_no_text_is_an_exception():
    for text in [
        r"(0, \infty + 0i) \cup (2, 3)",
        r"(1,\ln(0i))\cup(2,3)",
        r"\{1\}\cup\{\infty+0i\}",
        r"\mathbb{R}\setminus\{\ln(1+i^2)\}",
    ]:
        assert not is_equiv(text, "5")
        assert not is_equiv("5", text)
        assert grader.verdict(text, "5")[0] is False


def test_nobody_can_know_the_points():
    """A product that is zero at the points of one comparison is not zero at those of another."""
    expressions.begin("0", "x")
    factors = []
    for index in range(len(expressions.RANGES)):
        root = expressions.Point(index).value("x")
        factors.append(f"(x-({root.numerator}/{root.denominator}))")
    product = "".join(factors)
    assert not is_equiv(product, "0")
    assert not is_equiv(f"x+{product}", "x")


CHARACTERS = "0123456789xyei+-*/^_!=<>()[]{}|,;:.%°'\"\\$&@ ~#\n\t\u0000²½π√∞①Ａ"
COMMANDS = r"""
    \frac \sqrt \boxed{ \text{ \begin{pmatrix} \end{pmatrix} \\ \left \right \pm \infty \cup \in
    \le \sin \log \binom \lfloor \rfloor \sum \int \overline{ \mathbb{R} \circ cm and or sqrt
    10**9 1e9 \cdot \setminus \emptyset \{ \} \bmod \gcd( \ne \approx 00 \mathrm{
"""
PIECES = st.sampled_from([*CHARACTERS, *COMMANDS.split()])
ANY_TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))
GOLDS = [
    "7",
    r"\frac{1}{2}",
    "x=5",
    "(1,2)",
    r"[0,\infty)",
    r"\pm 3",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    "52_8",
    r"5\%",
    r"\text{red}",
    "0.25",
    r"3\text{ cm}",
    "x > 2",
    "1,2",
]


@pytest.mark.slow
@settings(max_examples=600, deadline=2000)
@given(ANY_TEXT, st.sampled_from(GOLDS))
def test_any_text_is_judged(text, gold):
    assert is_equiv(text, gold) in (True, False)
    assert is_equiv(gold, text) in (True, False)
    grade_math(text, gold, fallback=True)
    grade_math("\\boxed{" + text + "}", gold)


# ----------------------------------------------------------------------------------------------
# hostile answers

HOSTILE = {
    # costly to compute
    "tower": "9^{9^{9^{9}}}",
    "factorial": "(10^{9})!",
    "double factorial": "((99!)!)!",
    "gamma": "(x+10^{5})!",
    "binomial": r"\binom{1000000000}{500000000}",
    "roots": r"\sqrt{2}^{" * 30 + "2" + "}" * 30,
    "powers": "2^" * 5000 + "2",
    "trig": r"\sin(10^{10^{5}})",
    "functions": r"\sin x!" * 2000,
    "sum": r"\sum_{n=1}^{\infty} n^{-n}",
    "integral": r"\int_0^1 \sin(\sin(x^{x^{x}})) dx",
    "integrals": r"\int_0^1 x^2 dx+" * 450 + "1",
    "sums": r"\sum_{k=1}^n " * 600 + "k",
    "expansion": "(x+1)^{3000}",
    "product": "(10^{99999})" * 400,
    "bmod": r"10^{60000} \bmod 7^{9999}",
    # long
    "digits": "1" * 100_000,
    "exponent": "1e999999999",
    "huge": "x" * 1_000_000,
    "minus": "-" * 15_000 + "1",
    "list": ",".join(map(str, range(5000))),
    "commas": "1," * 9000,
    "bars": "|" * 9000,
    "primes": "x" + "'" * 9000,
    "indices": "x" + "_1" * 5000,
    "spaces": "1" + " " * 19_000 + "2",
    "moduli": "1" + "(mod 7)" * 2800,
    "choose": r"{n\choose k}" * 1600,
    "pm": r"\pm" * 4000 + "1",
    "ratio": "1:" * 3900 + "1",
    "powers of variables": "2^x" * 2500,
    "mixture": r"x^{999}+{a\choose b}+" * 300 + "1",
    "gammas": r"\Gamma(x)+" * 700 + "1",
    "absolute values": "|x|+" * 1500 + "x",
    "derivatives": r"\frac{dy}{dx}" * 500,
    "currencies": r"\$5 " * 1900,
    "decimals": "0." + "3" * 7900,
    "percent": "5" + "%" * 9000,
    "backslashes": "\\" * 19_000,
    # nested
    "braces": "{" * 50_000,
    "nested": "(" * 5000 + "1" + ")" * 5000,
    "fractions": r"\frac{1}{1+" * 400 + "1" + "}" * 400,
    "boxes": r"\boxed{" * 20_000,
    "text": r"\text{" * 3000 + "a" + "}" * 3000,
    "open displays": r"[\[" * 3000,
    # programs
    "import": "__import__('os').system('touch PWNED')",
    "open": r"open('PWNED','w').write('x')*2\pi",
    "lambda": "(lambda: open('PWNED','w'))()",
    "list comprehension": "[open('PWNED','w') for _ in [0]]",
    "class walk": "(1).__class__.__mro__[1].__subclasses__()",
    "exit": "exit()",
    "sympify": "sympify('__import__(\"os\").abort()')",
    # odd
    "nan": "nan",
    "nul": "7\u0000",
    "arabic": "\u0668",
}


@pytest.mark.slow
@pytest.mark.parametrize("gold", ["7", r"2\pi", "x=7", r"\begin{pmatrix}1\\2\end{pmatrix}"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_wrong_cheap_and_not_run(name, gold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert not grade_math("\\boxed{" + HOSTILE[name] + "}", gold)
    assert time.process_time() - start < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_golds_are_cheap_and_not_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    grade_math(r"\boxed{7}", HOSTILE[name])
    grade_math("\\boxed{" + HOSTILE[name] + "}", "[open('PWNED','w')]")
    assert time.process_time() - start < 10
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_long_sum_is_worked_out():
    assert is_equiv("x+" * 3000 + "x", "3001x")


# ----------------------------------------------------------------------------------------------
# the pool


@pytest.fixture
def tricky(tmp_path, monkeypatch):
    """Children of the pool in which the answers HANG, EAT, DIE and so on do what they say."""
    child = tmp_path / "tricky_child.py"
    child.write_text(f"""
import os
import sys

sys.path.insert(0, {str(ROOT)!r})
import grader

honest_verdict = grader.verdict


def verdict(answer, *rest):
    if answer == "HANG":
        while True:
            pass
    if answer == "EAT":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    if answer == "DIE":
        os.abort()
    if answer == "DIE ONCE" and not os.path.exists({str(tmp_path / "mark")!r}):
        open({str(tmp_path / "mark")!r}, "w").close()
        os.abort()
    if answer == "BUG":
        raise KeyError("a bug")
    if answer == "PRINT":
        print("noise")
        os.write(1, b"more noise")
    return honest_verdict(answer, *rest)


grader.verdict = verdict
grader.end_with_parent()
grader.serve(grader.answer_task)
""")
    monkeypatch.setattr(grader, "CHILD_FILE", str(child))


def test_pool_keeps_the_order():
    responses = [f"\\boxed{{{k}}}" for k in range(200)]
    # Golds are 0, 0, 2, 2, 4, 4, ...: every other answer is right.
    references = [reference(str(k - k % 2)) for k in range(200)]
    with Grader(workers=2) as pool:
        scores = pool.grade(responses, references)
        assert scores == [1.0, 0.0] * 100
        assert [score.failure for score in scores] == [None] * 200
        assert not pool.failures


@pytest.mark.slow
def test_pool_counts_what_it_could_not_read():
    responses = ["no box", r"\boxed{9^{9^{9^9}}}", r"\boxed{5}"]
    with Grader(workers=1) as pool:
        scores = pool.grade(responses, [reference("5")] * 3)
        assert scores == [0.0, 0.0, 1.0]
        assert [score.failure for score in scores] == [None, "unparsed", None]
        assert (pool.timeouts, pool.crashes, pool.unparsed) == (0, 0, 1)


def test_a_score_keeps_its_failure_between_processes():
    score = pickle.loads(pickle.dumps(grader.Score(0.0, "unparsed")))
    assert score == 0.0
    assert score.failure == "unparsed"


@pytest.mark.slow
def test_pool_takes_all_kinds_of_text_and_gold():
    with Grader(workers=1) as pool:
        lone_surrogate = "\\boxed{\ud800½}"
        assert pool.submit(lone_surrogate, reference(r"\frac12")).result() in (0.0, 1.0)
        assert pool.submit(r"\boxed{5}", reference(["4", "5"])).result() == 1.0
        rounded = reference("10") | {"tolerance": 0.1}
        assert pool.submit(r"\boxed{9.95}", rounded).result() == 1.0
        assert pool.submit(r"\boxed{9.95}", reference("10")).result() == 0.0


@pytest.mark.parametrize("bad", [{"ground_truth": "5"}, {"ability": "art", "ground_truth": "5"}])
def test_a_reference_needs_a_known_ability(bad):
    with Grader(workers=1) as pool, pytest.raises(ValueError, match="ability"):
        pool.submit(r"\boxed{5}", bad)


@pytest.mark.slow
def test_pool_with_fallback():
    with Grader(workers=1, fallback=True) as pool:
        assert pool.grade(["The answer is 5."], [reference("5")]) == [1.0]


@pytest.mark.slow
def test_pool_survives_hostile_items(tricky):
    responses = [r"\boxed{5}"] * 100
    hostile = {10: "HANG", 20: "EAT", 30: "DIE", 40: "HANG", 50: "DIE", 60: "PRINT"}
    for k, word in hostile.items():
        responses[k] = f"\\boxed{{{word}}}"
    with Grader(workers=2, timeout=1.0, memory_mb=400) as pool:
        start = time.time()
        scores = pool.grade(responses, [reference("5")] * 100)
        assert time.time() - start < 60
        assert scores == [float(k not in hostile) for k in range(100)]
        kinds = [scores[k].failure for k in (9, 10, 30, 40, 50, 60)]
        assert kinds == [None, "timeouts", "crashes", "timeouts", "crashes", None]
        assert scores[20].failure in ("timeouts", "crashes")
        assert pool.timeouts + pool.crashes == 5
        assert pool.grade([r"\boxed{5}"], [reference("5")]) == [1.0]


@pytest.mark.slow
def test_a_child_that_somebody_else_ends_costs_nothing(tricky, tmp_path):
    """What it was asked is asked again, of another child."""
    with Grader(workers=1) as pool:
        scores = pool.grade([r"\boxed{5}", r"\boxed{DIE ONCE}"], [reference("5")] * 2)
        assert scores == [1.0, 0.0]
        assert [score.failure for score in scores] == [None, None]
        (tmp_path / "mark").unlink()
        assert pool.is_equiv("DIE ONCE", "DIE ONCE")


@pytest.mark.slow
def test_a_bug_costs_its_item_and_is_shown(tricky, capsys):
    boxes = [r"\boxed{5}", r"\boxed{BUG}", r"\boxed{5}", r"\boxed{BUG}"]
    with Grader(workers=1) as pool:
        scores = pool.grade(boxes, [reference("5")] * 4)
        assert scores == [1.0, 0.0, 1.0, 0.0]
        assert [score.failure for score in scores] == [None, "crashes", None, "crashes"]
        assert pool.crashes == 2
    assert capsys.readouterr().err.count("KeyError: 'a bug'") == 1


def test_children_that_never_start_end_the_run(monkeypatch, capsys):
    """One costs its item; so many in a row are no accident."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    # Not those that have started in other tests.
    monkeypatch.setattr("lib.sandbox.FAILING_SINCE", {}, raising=False)
    with Grader(workers=2) as pool:
        score = pool.submit(r"\boxed{5}", reference("5")).result()
        assert score == 0.0
        assert score.failure == "crashes"
        with pytest.raises(GraderError):
            pool.grade([r"\boxed{5}"] * 20, [reference("5")] * 20)
    assert "does not start" in capsys.readouterr().err


SLOW_START = """
import pathlib
import sys
import time

sys.path.insert(0, {root!r})
import grader

log = pathlib.Path({log!r})
log.write_text(log.read_text() + "started\\n")
if log.read_text().count("started") <= {number}:
    {mishap}
grader.end_with_parent()
grader.serve(grader.answer_task)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["import os; os.kill(os.getpid(), 9)", "time.sleep(100)"])
def test_children_that_are_slow_or_killed_while_they_start(mishap, tmp_path, monkeypatch):
    """They cost the first item, at most."""
    log = tmp_path / "log"
    log.write_text("")
    child = tmp_path / "child.py"
    monkeypatch.setattr(grader, "CHILD_FILE", str(child))
    monkeypatch.setattr("lib.sandbox.START_SECONDS", 5)
    child.write_text(SLOW_START.format(root=str(ROOT), log=str(log), number=2, mishap=mishap))
    with Grader(workers=1) as pool:
        scores = pool.grade([r"\boxed{5}"] * 3, [reference("5")] * 3)
    assert scores[1:] == [1.0, 1.0]
    assert scores[0].failure in (None, "crashes")


@pytest.mark.slow
def test_nothing_is_left_of_a_pool_that_is_kept():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def own_children():
        found = []
        for path in pathlib.Path("/proc/self/task").glob("*/children"):
            found += path.read_text().split()
        return found

    files = descriptors()
    children = own_children()
    kept = []
    for _ in range(2):
        with Grader(workers=2) as pool:
            pool.grade([r"\boxed{5}"] * 20, [reference("5")] * 20)
        kept.append(pool)
    assert descriptors() == files
    assert own_children() == children


@pytest.mark.slow
def test_a_child_that_died_while_idle_costs_nobody():
    with Grader(workers=1) as pool:
        assert pool.grade([r"\boxed{5}"], [reference("5")]) == [1.0]
        (child,) = pool.threads.submit(lambda: pool.child.idle).result()
        child.process.kill()
        child.process.wait()
        assert pool.grade([r"\boxed{5}"], [reference("5")]) == [1.0]
        assert pool.crashes == 0


def is_alive(pid):
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


BUSY_OR_IDLE = """
import time


def reward(response, problem):
    time.sleep(1)
    while response == "busy":
        pass
    return 1
"""
CALLER = """
import os
import sys
import time

sys.path.insert(0, {root!r})
import grader


def children():
    found = []
    for task in os.listdir("/proc/self/task"):
        found += open(f"/proc/self/task/{{task}}/children").read().split()
    return found


pool = grader.Grader(workers=2, timeout=100, reward={reward!r})
futures = [pool.submit({response!r}, {{}}) for _ in range(2)]
while len(children()) < 2:
    time.sleep(0.1)
time.sleep(2)
print(*children(), flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("response", ["busy", "idle"])
def test_children_die_with_their_parent(response, tmp_path):
    """The caller has no __main__ guard, and is killed while its children are busy or idle."""
    reward = tmp_path / "reward.py"
    reward.write_text(BUSY_OR_IDLE)
    script = tmp_path / "caller.py"
    script.write_text(CALLER.format(root=str(ROOT), reward=str(reward), response=response))
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pids = caller.stdout.readline().split()
    assert len(pids) == 2
    assert all(map(is_alive, pids))

    caller.kill()
    caller.wait()
    caller.stdout.close()
    deadline = time.time() + 10
    while any(map(is_alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_importing_the_grader_has_no_side_effects():
    code = """
import sys, threading
import grader
assert not {"torch", "numpy"} & set(sys.modules)
assert threading.active_count() == 1
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ----------------------------------------------------------------------------------------------
# the labelled files: accuracy in %, and no wrong answer accepted


def read_rows(folder, name):
    plain = folder / (name + ".jsonl")
    if plain.exists():
        lines = plain.read_text("utf-8").splitlines()
    else:
        with gzip.open(folder / (name + ".jsonl.gz"), "rt", encoding="utf-8") as file:
            lines = file.readlines()
    return [json.loads(line) for line in lines]


def judge_row(row):
    """Free text is graded with fallback, but not the attacks, which are in pieces."""
    gold = row["gold"]
    if "prediction_parts" in row:
        text = "".join(part * count for part, count in row["prediction_parts"])
        return grade_math(text, gold)
    if "response" in row:
        return grade_math(row["response"], gold, fallback=True)
    if row.get("kind") == "response":
        return grade_math(row["prediction"], gold, fallback=True)
    return is_equiv(row["prediction"], gold)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, target",
    [
        ("cases", 97),
        ("near_misses", 100),
        ("latex_parse", 92),
        ("public_reports", 99),
        ("real_math", 99.6),
        ("real_gsm8k", 99.95),
        ("security", 100),
    ],
)
def test_labelled_files(shared, name, target, tmp_path, monkeypatch):
    rows = read_rows(shared / "data" / "grader", name)
    monkeypatch.chdir(tmp_path)
    accepted = []
    right = 0
    counted = 0
    for row in rows:
        verdict = judge_row(row)
        if row["expected"] is None:
            continue
        counted += 1
        right += verdict == row["expected"]
        if verdict and not row["expected"]:
            accepted.append(row)
    assert not accepted
    assert 100 * right / counted >= target
    assert not list(tmp_path.iterdir())
