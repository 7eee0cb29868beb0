r"""Where the answer of a response is, and that of a gold that is a worked solution."""

import doctest
import math
import time

import numpy as np
import pytest

import grader
from grader import Grader, extract_answer, golds, grade_math
from lib import extraction
from lib.code_tests import find_program

MINUS = "\u2212"


def test_examples_in_docstrings():
    result = doctest.testmod(extraction)
    assert result.attempted > 0
    assert result.failed == 0


# ----------------------------------------------------------------------------------------------
# boxes


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\fbox{3}", "3"),
        (r"\boxed 7", "7"),
        (r"\\boxed{-3}", "-3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"<think>maybe \boxed{3}?</think> No: \boxed{4}", "4"),
        # a box that does not close, or has nothing in it, is no box
        (r"\boxed{5", None),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"\boxed{}", None),
        (r"\boxed{ \, }", None),
        (r"\boxed{$ $}", None),
        (r"\boxed{\text{ }}", None),
        (r"\boxed{4} then \boxed{}", "4"),
        (r"\boxed{0}", "0"),
        # a minus before the box
        (r"$-\boxed{256}$", "-256"),
        (r"x = -\boxed{5}", "-5"),
        (r"$10-\boxed{256}$", "256"),
        # no box
        ("The answer is 5.", None),
        ("", None),
        ("}}{{", None),
    ],
)
def test_the_last_box_counts(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "response, answer",
    [
        (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1, 2, 3"),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1, 2"),
        (r"$x = \boxed{1} \lor x = \boxed{2}$", "1, 2"),
        (r"$x_{1} = \boxed{1}, \quad x_{12} = \boxed{2}$", "1, 2"),
        (r"\(\boxed{1}\) and \(\boxed{2}\)", "1, 2"),
        (r"\[\boxed{1} \text{ and } \boxed{2}\]", "1, 2"),
        (r"$\boxed{1}$ and $\boxed{1}$", "1"),
        ("The solutions are\n- \\boxed{1}\n- \\boxed{2}", "1, 2"),
        # signs between them
        (r"$\boxed{2}, -\boxed{3}$", "2, -3"),
        (rf"$\boxed{{2}}$ or ${MINUS}\boxed{{3}}$", "2, -3"),
        (r"$-\boxed{2}$ and $-\boxed{3}$", "-2, -3"),
        # words, labels or a new paragraph between them
        (r"\boxed{10} and then \boxed{42}", "42"),
        (r"(a) \boxed{3} (b) \boxed{5}", "5"),
        ("1. \\boxed{3}\n2. \\boxed{5}", "5"),
        ("\\boxed{1}\n\n\\boxed{2}", "2"),
        # what only comes near it is not a second answer
        (r"$\boxed{\frac13} \approx \boxed{0.333}$", r"\frac13"),
        (r"$\boxed{\sqrt 2}$ ($\approx \boxed{1.41}$)", r"\sqrt 2"),
    ],
)
def test_boxes_of_one_sentence(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "response, gold",
    [
        (r"$\boxed{\frac12}$ or $\boxed{0.5}$", "1/2"),
        (r"$\boxed{x=2}$, $\boxed{2}$", "2"),
        (r"$\boxed{\frac12} = \boxed{0.5}$", "1/2"),
        (r"\boxed{\text{red}} or \boxed{red}", "red"),
        (r"$\boxed{(1,2)}$, $\boxed{x=1,y=2}$", "(1,2)"),
        (r"$\boxed{50\%}$ or $\boxed{0.5}$", "1/2"),
        (r"$\boxed{-3}$ and $-\boxed{3}$", "-3"),
    ],
)
def test_an_answer_in_two_spellings_is_one(response, gold):
    assert grade_math(response, gold)
    assert not grade_math(response, "7")


def test_long_prose_around_the_box():
    assert grade_math("blah " * 200_000 + r"\boxed{7}", "7")
    assert grade_math(r"\boxed{7}" + " blah" * 200_000, "7")


def test_two_answers_are_not_one():
    both = r"\boxed{2} or \boxed{3}"
    assert grade_math(both, "2, 3")
    assert not grade_math(both, "2")
    # Either is right, but not both.
    assert not grade_math(both, ["2", "3"])


# ----------------------------------------------------------------------------------------------
# the sign before a box

HAVE_A_MINUS = r"""
$-\boxed{5}$
$@\boxed{5}$
$ - \boxed{5}$
$@ \boxed{5}$
$-\,\boxed{5}$
$-\;\!\boxed{5}$
$-\ \boxed{5}$
$-~\boxed{5}$
$-\quad\boxed{5}$
$-\left(\boxed{5}\right)$
${-}\boxed{5}$
$-{\boxed{5}}$
$-\mathbf{\boxed{5}}$
$-\displaystyle\boxed{5}$
$$-\boxed{5}$$
\[-\boxed{5}\]
\(-\boxed{5}\)
\( - \boxed{5} \)
-$\boxed{5}$
@$\boxed{5}$
-\(\boxed{5}\)
-\[\boxed{5}\]
-$$\boxed{5}$$
$-$\boxed{5}
$-$ $\boxed{5}$
-**\boxed{5}**
**-\boxed{5}**
-\$\boxed{5}
is -$\boxed{5}$
is - $\boxed{5}$
is @ $\boxed{5}$
is -\boxed{5}.
is @\boxed{5}.
is - \boxed{5}.
is: -\boxed{5}
equals $ - \boxed{5}$
we get @ \boxed{5}
we find -\boxed{5}
it's -\boxed{5}
$\displaystyle-\boxed{5}$
answer: @$\boxed{5}$
**-$\boxed{5}$**
$x = -\boxed{5}$
$x = @\boxed{5}$
$x=-\,\boxed{5}$
$x =$ -\boxed{5}
$x = $ $-\boxed{5}$
$x$ is $-\boxed{5}$
\(x=\) @\boxed{5}
$a+b = 3-8 = -\boxed{5}$
$x \approx -\boxed{5}$
$x \le @\boxed{5}$
$3 \implies -\boxed{5}$
$\Rightarrow -\boxed{5}$
$\text{so }-\boxed{5}$
$\text{The answer is } -\boxed{5}$
\begin{align*} x &= -\boxed{5} \end{align*}
It costs $5 and $7, and so the loss is -\boxed{5}
It costs \$7. The profit is $-\boxed{5}$
It costs $7. The profit is $-\boxed{5}$
1. -\boxed{5}
(a) -\boxed{5}
So. -\boxed{5}
Answer (in metres): -\boxed{5}
the temperature (in degrees) is -\boxed{5}
is minus \boxed{5}
is negative $\boxed{5}$
$2$ or $-\boxed{5}$
– is the sign: –\boxed{5}
= －\boxed{5}
"""

HAVE_NO_MINUS = r"""
\boxed{5}
$\boxed{5}$
$10-\boxed{5}$
$10 - \boxed{5}$
$10 -\boxed{5}$
$10@\boxed{5}$
$10 @ \boxed{5}$
$x - \boxed{5}$
$x -\boxed{5}$
$x^2-\boxed{5}$
$\pi - \boxed{5}$
$\frac{1}{2} - \boxed{5}$
$f(x) - \boxed{5}$
$3! - \boxed{5}$
$3\text{ cm} - \boxed{5}$
$10$ - $\boxed{5}$
$10$-$\boxed{5}$
\(10\) - \(\boxed{5}\)
\(10-\boxed{5}\)
\[ 10 - \boxed{5} \]
10 - \boxed{5}
10 @ \boxed{5}
10 minus \boxed{5}
x - \boxed{5}
- \boxed{5}
- $\boxed{5}$
* \boxed{5}
So:
- \boxed{5}
The answer - \boxed{5}
The answer – \boxed{5}
The answer — \boxed{5}
**Answer** - \boxed{5}
answer-\boxed{5}
$\lim_{x\to 0^-}\boxed{5}$
$\lim_{x\to 0^{-}} \boxed{5}$
-- \boxed{5}
$10 = 15 - \boxed{5}$
\begin{align*} x &= 10 - \boxed{5} \end{align*}
$$x = 10$$
- \boxed{5}
-3. \boxed{5}
$x=-3$, \boxed{5}
"""


def responses(text):
    """One per line; a line that ends with a colon or a display goes on. @ is the minus U+2212."""
    joined = text.replace("So:\n", "So:\r").replace("$$x = 10$$\n", "$$x = 10$$\r")
    lines = joined.replace("@", MINUS).split("\n")
    return [line.replace("\r", "\n") for line in lines if line]


@pytest.mark.parametrize("response", responses(HAVE_A_MINUS))
def test_a_minus_belongs_to_the_box(response):
    assert grade_math(response, "-5")
    assert not grade_math(response, "5")


@pytest.mark.parametrize("response", responses(HAVE_NO_MINUS))
def test_a_difference_a_dash_or_a_bullet_is_no_sign(response):
    assert grade_math(response, "5")
    assert not grade_math(response, "-5")


@pytest.mark.parametrize(
    "response, gold, wrong",
    [
        (r"$-\boxed{x+1}$", "-x-1", "-x+1"),
        (r"$-\boxed{-5}$", "5", "-5"),
        (rf"$-\boxed{{{MINUS}5}}$", "5", "-5"),
        (r"negative \boxed{-5}", "-5", "5"),
        (r"$-\boxed{\frac{x+1}{2}}$", r"-\frac{x+1}{2}", r"\frac{x+1}{2}"),
        (r"$-\boxed{\sqrt{3}}$", r"-\sqrt{3}", r"\sqrt{3}"),
        (r"$x = \pm\boxed{5}$", r"\pm 5", "5"),
        ("$x = \u00b1\\boxed{5}$", "5, -5", "-5"),
        (r"$10 \pm \boxed{5}$", "5", r"\pm 5"),
        (r"$-\boxed{\boxed{5}}$", "-5", "5"),
        (r"$\boxed{-\boxed{5}}$", "-5", "5"),
    ],
)
def test_a_sign_is_for_all_of_the_box(response, gold, wrong):
    assert grade_math(response, gold)
    assert not grade_math(response, wrong)


HOSTILE = {
    "boxes": r"$-\boxed{1}$, " * 5000,
    "signs": "-" * 100_000 + r"\boxed{1}",
    "dollars": "$" * 100_000 + r"\boxed{1}",
    "words": r"\boxed{1}" + " and" * 50_000 + r"\boxed{2}",
    "bullets": r"\boxed{1}" + "\n \n - " * 5000 + r"x \boxed{2}",
    "lines": r"\boxed{1}" + "\n " * 50_000 + r"x \boxed{2}",
    "spaced signs": (" " * 150 + "-") * 1000 + r"\boxed{1}",
    "brackets before": r"-" + r"\left(" * 5000 + r"\boxed{1}",
    "open boxes": r"\boxed{" * 20_000 + "1",
    "a long sum": r"-\boxed{" + "(" * 9000 + "1+" * 9000 + "1" + ")" * 9000 + "}",
    "open braces": r"-\boxed{1}" + "{" * 100_000,
    "phrases": "the answer is " * 5000,
    "phrases and dollars": "the answer is $" * 5000,
    "answers to": "answer to " * 5000,
    "bold": "the answer is " + "*" * 20_000,
    "open formulas": r"\(" * 20_000,
    "blanks": "the answer is" + " " * 100_000,
    "amounts": "$1 " * 50_000,
    "fences": "```python" * 20_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_are_searched_quickly(name):
    start = time.process_time()
    extract_answer(HOSTILE[name], fallback=True)
    golds(HOSTILE[name])
    find_program(HOSTILE[name])
    assert time.process_time() - start < 3


# ----------------------------------------------------------------------------------------------
# prose, for evaluation only

PROSE = [
    # phrases
    ("The answer is 5.", "5"),
    ("A: 1,250", "1250"),
    ("#### 18", "18"),
    ("#### $18", "18"),
    ("####18", "18"),
    ("#### -1,234.5", "-1234.5"),
    (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", "1/2"),
    ("The final answer is Evelyn. I hope it is correct.", "Evelyn"),
    ("the pair is $(7, 6)$. <|im_start|>user", "(7,6)"),
    ("The answer is 3. No, that fails. The answer is 8.", "8"),
    ("The answer is $3$. That misses a case, so the answer is $8$, and we are done.", "8"),
    ("The answer to the problem is 12.", "12"),
    ("The answer is equal to 12.", "12"),
    ("The answer should be 12, not 13.", "12"),
    ("The answer is approximately 3.14", "3.14"),
    ("The answer is therefore $12$.", "12"),
    ("The answer = 12", "12"),
    ("The solutions are $3$, $5$, and $7$ as one can check.", "3, 5, 7"),
    ("The answers are 3 and 5, which can be checked.", "3, 5"),
    ("The answer is\n$$\nx = \\frac{7}{3}\n$$", "7/3"),
    ("The answer is:\n\\[\n\\frac{7}{3}\n\\]\nDone.", "7/3"),
    # numbers
    ("The answer is 2,450.", "2450"),
    ("The answer is 2,450, which is even.", "2450"),
    ("The answer is 50%.", "50%"),
    (r"The answer is 5\% of all people there.", "0.05"),
    ("The answer is $64.", "64"),
    ("The answer is $64 and not $32.", "64"),
    ("The answer is 18 cm.", "18"),
    ("The answer is 6.5 hours.", "6.5"),
    ("The answer is 4.25.", "4.25"),
    ("The answer is .5 of it, more or less.", "0.5"),
    ("The answer is (3, 4).", "(3, 4)"),
    ("The answer is 5 \u20ac.", "5"),
    ("The answer is 3x + 2.", "3x+2"),
    ("The answer is x = 7 because of symmetry.", "7"),
    # minus signs
    ("The answer is -7.", "-7"),
    (f"The answer is {MINUS}7.", "-7"),
    (f"The answer is {MINUS}73.", "-73"),
    (f"The answer is {MINUS} 7.", "-7"),
    (f"The answer is {MINUS}7 as we have seen above.", "-7"),
    ("The answer is -$7$.", "-7"),
    (f"The answer is {MINUS}$7$, as above.", "-7"),
    ("The answer is -$7.", "-7"),
    (r"The answer is -\(7\).", "-7"),
    (f"so we have lost {MINUS}7", "-7"),
    # no phrase
    ("so it is 3 and then 42", "42"),
    (r"We find that $x \lt 3$.", "x < 3"),
    ("the sum is 3-5", "5"),
    ("we get\n$$x = 7$$", "7"),
    ("The price is $7 and then $9", "9"),
    # bold, italics and code
    ("The answer is **73**.", "73"),
    ("The answer is **7**.", "7"),
    ("The answer is **-31**.", "-31"),
    (f"The answer is **{MINUS}31**.", "-31"),
    ("Final Answer: **73**", "73"),
    ("**Final Answer:** 73", "73"),
    ("**Final Answer**: 73", "73"),
    ("**Answer: 73.**", "73"),
    ("**Answer:** **73**", "73"),
    ("**The answer is 73.**", "73"),
    ("**Answer: 73", "73"),
    ("The answer is ***73***.", "73"),
    ("The answer is *73*.", "73"),
    ("The answer is __73__.", "73"),
    ("The answer is `73`.", "73"),
    ("The answer is <b>73</b>.", "73"),
    ("The answer is **$73$**.", "73"),
    ("The answer is $**73**$", "73"),
    ("The answer is **73** apples, as **all** can see.", "73"),
    ("The answer is **15 apples**.", "15"),
    ("The answer is **1,234**.", "1234"),
    ("The answer is **Evelyn**.", "Evelyn"),
    ("The answer is **C**.", "C"),
    ("The answer is **(C)**.", "C"),
    ("so we get **73**", "73"),
    ("**73**", "73"),
    ("## Final Answer\n\n**73**", "73"),
    ("The answer is 2**3.", "8"),
    ("The answer is 10**9", "10^9"),
]


@pytest.mark.parametrize("response, gold", PROSE)
def test_answers_in_prose(response, gold):
    assert grade_math(response, gold, fallback=True)
    assert not grade_math(response, gold)
    assert not grade_math(response, "77", fallback=True)


@pytest.mark.parametrize(
    "response, wrong",
    [
        ("The answer is 2,450.", "2"),
        ("The answer is 2,450.", "450"),
        (f"The answer is {MINUS}7.", "7"),
        ("The answer is -$7$.", "7"),
        ("The answer is 4.25.", "4"),
        ("The answers are 3 and 5, which can be checked.", "3"),
        # Numbers in a row are none of them.
        ("The answer is 3 5.", "3"),
        ("The answer is 3 5.", "5"),
        ("The answer is 10 12", "12"),
        # A letter in prose is no answer: it would be too easy to hit.
        ("The correct answer is (E).", "E"),
        ("The answer is 12, so \\boxed{13}.", "12"),
    ],
)
def test_what_prose_does_not_say(response, wrong):
    assert not grade_math(response, wrong, fallback=True)


def test_a_letter_in_a_box_is_an_answer():
    assert grade_math(r"\boxed{\text{(E)}}", "E", fallback=True)


# ----------------------------------------------------------------------------------------------
# golds


@pytest.mark.parametrize(
    "gold, answer, wrong",
    [
        (r"We find that $x = \boxed{5}$.", "5", "x"),
        (r"so it is $-\boxed{5}$.", "-5", "5"),
        ("Suppose the answer is $3$. That fails. So the answer is $5$.", "5", "3"),
        ("The answer is 1,234.", "1234", "1"),
        ("The answer is 50%.", r"50\%", "5"),
        ("The answer is $18.", "18", "1"),
        ("So the answer is $18, of which $3 are left.", "18", "3"),
        ("The answer is 6.5 hours.", "6.5", "6"),
        ("The answer is 12 cm.", "12", "1"),
        ("The answer is \u22127.", "-7", "7"),
        ("The answer is -$7$.", "-7", "7"),
        ("The answer is **73**.", "73", "7"),
        ("**Answer:** 73", "73", "7"),
        ("The answer is Evelyn.", "Evelyn", "answer"),
        ("The answer is approximately 3.14.", "3.14", "3"),
        ("The answer should be 12.", "12", "1"),
        ("Thus, the answer is\n\\[\\frac{1}{2}\\]", r"\frac12", "1"),
        ("The answer is\n$$\n-3\n$$", "-3", "3"),
        ("The answer is (E).", "E", "A"),
        ("The answers are $3$ and $5$.", "3, 5", "3"),
        ("The answers are $3$, $5$, and $7$, by symmetry.", "3, 5, 7", "3"),
        (r"The answer is $\frac{5}{6}$, as claimed.", r"\frac56", "5"),
        ("We add.\n#### 18", "18", "1"),
        ("We add.\n#### $18", "18", "1"),
        ("We add.\n#### 1,234", "1234", "234"),
        ("We add.\n#### -5", "-5", "5"),
        ("We add.\n#### 50%", "50%", "5"),
        ("#### Step 1\nWe add.\n#### 18", "18", "1"),
        ("The answer is 3.\n#### 18", "18", "3"),
        (r"Final Answer: The final answer is $28 \%$. I hope it is correct.", r"28\%", "2"),
    ],
)
def test_golds_that_are_worked_solutions(gold, answer, wrong):
    assert grade_math(f"\\boxed{{{answer}}}", gold)
    assert not grade_math(f"\\boxed{{{wrong}}}", gold)


MISSING = [
    None,
    "",
    " ",
    "\n\t",
    "$$",
    "$ $",
    r"\boxed{}",
    math.nan,
    [],
    {},
    (),
    [None],
    [""],
    [[]],
]


@pytest.mark.parametrize("gold", MISSING, ids=repr)
def test_a_gold_that_is_missing_matches_nothing(gold):
    assert golds(gold) == []
    for answer in ("None", "nan", "", " ", "{}", "[]", "null", "0", r"\emptyset", r"\{\}"):
        assert not grade_math(f"\\boxed{{{answer}}}", gold)


def test_golds_that_are_there():
    assert golds([None, "5", " "]) == ["5"]
    assert golds(["4", ["5", 6]]) == ["4", "5", "6"]
    assert golds(0) == ["0"]
    assert golds(0.5) == ["0.5"]
    assert golds(np.array(["4", "5"])) == ["4", "5"]
    assert golds([np.int64(4), np.float64(0.5), np.nan]) == ["4", "0.5"]
    assert golds("None") == ["None"]
    assert golds(r"\textbf{(B)}\ 7") == [r"\textbf{(B)}\ 7"]
    assert grade_math(r"\boxed{\text{None}}", "none")


# ----------------------------------------------------------------------------------------------
# the judge never raises

ODD = [
    r"(0, \infty + 0i) \cup (2, 3)",
    r"(1,\ln(0i))\cup(2,3)",
    r"\{1\}\cup\{\infty+0i\}",
    r"\mathbb{R}\setminus\{\ln(1+i^2)\}",
    r"\{\frac{0}{0}\}\cap[0,1]",
    "\ud800",
    "\0",
]


@pytest.mark.slow
def test_odd_answers_cost_themselves_alone():
    boxes = [f"\\boxed{{{text}}}" for text in [*ODD, "5"]]
    wanted = [0.0] * len(ODD) + [1.0]
    for gold in ("5", 5):
        reference = dict(ability="math", ground_truth=gold)
        with Grader(workers=1) as pool:
            assert pool.grade(boxes, [reference] * len(boxes)) == wanted
            assert pool.crashes == 0
    # The odd ones as golds.
    references = [dict(ability="math", ground_truth=text) for text in [*ODD, "5"]]
    with Grader(workers=1) as pool:
        assert pool.grade([r"\boxed{5}"] * len(references), references) == wanted


@pytest.mark.parametrize(
    "error", [TypeError, RecursionError, MemoryError, ZeroDivisionError, KeyError, AssertionError]
)
def test_an_exception_of_any_kind_is_an_answer_that_cannot_be_read(error, monkeypatch):
    def judge(answer, *_):
        if answer == "odd":
            raise error("of sympy, say")
        return answer == "5"

    monkeypatch.setattr(grader, "judge", judge)
    assert grader.verdict("odd", "5") == (False, True)
    assert grader.verdict("5", "5") == (True, False)
    assert not grader.is_equiv("odd", ["5", "7"])
    assert not grade_math(r"\boxed{odd}", "5")


@pytest.mark.parametrize("gold", [[10**5000], {"a": 1}, object(), 1j, True, b"5"], ids=type)
def test_golds_of_any_type(gold):
    assert not grade_math(r"\boxed{5}", gold)
