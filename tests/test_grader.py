"""The judge of mathematical answers: its rules as worked examples, properties, hostile answers, and the pool.   pytest tests/test_grader.py"""
import importlib.util
import pathlib
import pickle
import re
import subprocess
import sys
import time

import pytest
import sympy
from hypothesis import HealthCheck, given, settings, strategies as st

import grader
from bench_grader import ours, read_rows
from grader import Grader, GraderError, extract_answer, grade_math, is_equiv

# ---------------------------------------------------------------------------------------------------------------------------
# the rules, one pair (gold, answer) each

SAME = {
    "integers": [("1234", "1,234"), ("10,\\!080", "10080"), ("14{,}916", "14916"), ("1000000", "1\\,000\\,000"), ("045", "45"), ("-5", "−5"), ("7", "７"),
                 ("2^{100}", "1267650600228229401496703205376"), ("12", "12."), ("1000", "10^3 = 1000"), ("12", "12th grade"), ("6", "3!"), ("8", "2^3")],
    "fractions": [("1/2", "\\frac12"), ("\\frac{1}{2}", "\\dfrac{2}{4}"), ("\\frac 59", "\\tfrac{5}{9}"), ("-\\frac{1}{3}", "\\frac{-1}{3}"), ("0.5", "1/2"),
                  ("2\\frac{3}{4}", "11/4"), ("2 3/4", "2.75"), ("\\frac{7}{3}", "2\\frac13"), ("1/2x", "\\frac{x}{2}"), ("\\frac{a}{bc}", "a/bc"), ("0.\\overline{3}", "1/3"),
                  ("\\frac{1}{6}", "0.1\\overline{6}"), ("-1./3", "-\\frac13"), ("\\frac{\\sqrt3}{3}", "\\frac{1}{\\sqrt{3}}")],
    "decimals": [("0.5", ".5"), ("3.0", "3"), ("0.33", "1/3"), ("3.14", "\\pi"), ("1000.99", "1,000.99"), ("16386.20", "16386.21"), ("\\frac{1}{12}", "0.0833333333333333"),
                 ("3e8", "3 \\times 10^8"), ("6.43e16", "6.43 \\cdot 10^{16}"), ("3e8", "3*10**8"), ("1E-4", "0.0001"), ("4.5e33", "4.5\\times10^{33}")],
    "percent": [("50\\%", "50"), ("50", "50\\%"), ("0.5", "50\\%"), ("50%", "1/2"), ("33.5\\%", "33.5 percent"), ("12\\%", "12 \\text{ percent}")],
    "units": [("10", "10 \\text{ cm}"), ("10 \\text{ cm}", "10"), ("10", "10 cm^2"), ("864 \\mbox{ inches}^2", "864"), ("30^\\circ", "30"), ("30", "30^{\\circ}"),
              ("5\\text{ inches}", "5\\text{ in}"), ("\\$36", "36"), ("36", "\\$36.00"), ("15", "15\\mathrm{~m/s}"), ("3", "3 apples"), ("25", "25°"), ("5\\sqrt2\\text{ cm}", "5\\sqrt{2}"),
              ("60", "60 miles per hour"), ("60\\text{ mph}", "60 \\text{ miles per hour}"), ("12", "12\\text{ square units}"), ("50\\pi", "50\\pi square inches"), ("7", "7 sq. ft."),
              ("9.8", "9.8 m/s^2"), ("10", "10 \\mathrm{~kg} \\cdot \\mathrm{m} / \\mathrm{s}"), ("15", "15^{\\text{th}}"), ("20", "20 \\text{ dollars per hour}")],
    "radicals": [("2\\sqrt{5}", "\\sqrt{20}"), ("\\sqrt2", "2^{1/2}"), ("\\sqrt[3]{-8}", "-2"), ("\\sqrt{6}+3\\sqrt{2}", "3\\sqrt2 + \\sqrt6"), ("\\sqrt{3+2\\sqrt2}", "1+\\sqrt2"),
                 ("sqrt(2)", "\\sqrt{2}"), ("√5", "\\sqrt{5}")],
    "functions": [("\\ln 4", "2\\ln 2"), ("\\log_2 8", "3"), ("\\log_{10} 100", "2"), ("\\sin 30^\\circ", "1/2"), ("\\sin^2 x + \\cos^2 x", "1"), ("\\cos\\frac{\\pi}{5}", "\\frac{1+\\sqrt5}{4}"),
                  ("e^{i\\pi}", "-1"), ("\\exp(2)", "e^2"), ("np.arcsin(10/13)", "\\arcsin{\\frac{10}{13}}"), ("\\tan^{-1} x", "\\arctan x"), ("sqrt[3]{8}", "tan^{-1}(0) + 2"), ("\\binom{6}{2}", "15"), ("|x|^2", "x^2"),
                  ("\\lfloor 3.7 \\rfloor", "3"), ("\\max(2, 5)", "5"), ("\\operatorname{lcm}(4, 6)", "12"), ("17 \\bmod 5", "2")],
    "complex": [("1+2i", "2i+1"), ("(1+i)^2", "2i"), ("\\frac{1}{1+i}", "\\frac{1-i}{2}"), ("6 - 5i", "6-5i")],
    "expressions": [("x^2+2x+1", "(x+1)^2"), ("\\frac{x+2}{7}", "\\frac{x}{7}+\\frac{2}{7}"), ("e^{x+y}", "e^x e^y"), ("\\sqrt{x}\\sqrt{y}", "\\sqrt{xy}"), ("x^{-1}", "\\frac1x"),
                    ("n!", "n (n-1)!"), ("x_1 + x_2", "x_{2}+x_{1}"), ("2x", "x \\cdot 2"), ("\\frac{n(n+1)}{2}", "\\binom{n+1}{2}"), ("k_{\\mathrm{B}} T", "k_B T"),
                    ("\\ln(x^2)", "2 \\ln x"), ("\\frac{1}{LC s^2}", "\\frac{1}{L C s^{2}}"), ("x'", "x^{\\prime}"), ("\\frac{3 m}{2}-1", "\\frac{3}{2}m - 1"), ("\\dot{x}_{0} + 1", "1 + \\dot{x}_0")],
    "equations": [("5", "x = 5"), ("x = 5", "5"), ("5 = x", "5"), ("x=5", "x = 3 + 2 = 5"), ("2x+3", "f(x) = 2x+3"), ("y=2x+3", "2x - y + 3 = 0"), ("x^2+y^2=1", "x^2 = 1-y^2"),
                  ("1", "|AB| = 1"), ("74", "\\angle APC = 74^\\circ"), ("\\sqrt{3}", "\\sqrt3 \\approx 1.73"), ("11", "x \\approx 11"), ("x<3", "3 > x"), ("-x \\ge -1", "x \\leq 1"),
                  ("7:32", "S_1:S_2 = 7:32"), ("2:4", "1:2"), ("3", "f(2) = 3")],
    "intervals": [("[0,1)", "\\left[0, 1\\right)"), ("(-\\infty,1]\\cup[10,\\infty)", "[10,+\\infty) \\cup (-\\infty, 1]"), ("x \\in [-2,7]", "[-2,7]"), ("[-2,7]", "-2 \\le x \\le 7"),
                  ("(5,\\infty)", "x > 5"), ("(-\\infty,-1)\\cup(3,\\infty)", "x < -1 \\text{ or } x > 3"), ("1 < x < 2", "2 > x > 4/4"),
                  ("(2,\\infty)", "\\{x \\mid x > 2\\}"), ("[2,\\infty)", "\\{x : x \\ge 2\\}"), ("(\\frac{1}{2},\\infty)", "\\left\\{x | x > \\frac{1}{2}\\right\\}"),
                  ("[x, 1+x]", "[x, x+1]"), ("(0,9)\\cup(9,36)", "(0,36)\\setminus\\{9\\}"), ("(0,36)", "(0,36)\\setminus\\{40\\}"),
                  ("(-\\infty,-8)\\cup(-8,3)\\cup(3,\\infty)", "\\mathbb{R} \\setminus \\{3,-8\\}"), ("x \\in \\mathbb{R}", "(-\\infty,\\infty)"), ("\\{-1\\}\\cup[0,7)", "[0,7)\\cup\\{-1\\}"),
                  ("(0,3)", "(0,2)\\cup[1,3)"), ("[1,2]", "[1,2)\\cup\\{2\\}"), ("[\\frac12,1]", "[0,1]\\cap[0.5,2]"), ("(-\\infty,0)\\cup(0,\\infty)", "x \\neq 0"),
                  ("(-\\infty,\\sqrt8)\\cup(\\sqrt8,\\infty)", "\\mathbb{R} - \\{2\\sqrt2\\}"), ("(2,3)", "[2,3]\\setminus\\{2,3\\}"), ("x<2\\cup x>3", "(3,\\infty)\\cup(-\\infty,2)"),
                  ("\\emptyset", "(0,1)\\cap(1,2)"), ("(-\\infty,a)\\cup(b,\\infty)", "(b,\\infty)\\cup(-\\infty,a)"), ("\\{b\\}", "\\{a,b\\}\\cap\\{b,c\\}")],
    "tuples": [("(1,2)", "\\left( 1, 2 \\right)"), ("(3,\\frac{\\pi}{2})", "(3, \\pi/2)"), ("(1,2)", "1, 2"), ("(x,y)=(1,2)", "(1,2)"), ("(100,200)", "(100, 200)"), ("(0;1)", "(0,1)")],
    "several": [("1, 2", "2, 1"), ("1,2", "\\{2, 1\\}"), ("\\{1,2,3\\}", "3, 2, 1"), ("19, 46, and 82", "19, 46, \\text{ and } 82"), ("2 \\text{ or } 3", "3, 2"), ("1, -1", "\\pm 1"),
                ("3 \\pm 2\\sqrt2", "3+2\\sqrt{2}, 3-2\\sqrt{2}"), ("x=1, x=2", "1, 2"), ("k=45, n=2", "n=2, k=45"), ("(1,2),(3,4)", "(3,4), (1,2)"), ("\\{1,2\\}\\cap\\{2,3\\}", "2")],
    "matrices": [("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\\\\\end{bmatrix}"), ("\\begin{pmatrix} 1/2 \\\\ 2 \\end{pmatrix}", "(0.5, 2)"),
                 ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\end{pmatrix}"), ("\\frac15\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1/5 \\\\ 2/5 \\end{pmatrix}"),
                 ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "[[1,2],[3,4]]"),
                 ("-2", "\\begin{vmatrix} 1 & 2 \\\\ 3 & 4 \\end{vmatrix}"), ("ad-bc", "\\begin{vmatrix} a & b \\\\ c & d \\end{vmatrix}")],
    "bases": [("52_8", "52_{8}"), ("4210_7", "4210_7")],
    "text": [("\\text{(B)}", "B"), ("B", "B."), ("B", "\\textbf{(B)}"), ("C", "(C)"), ("B", "(B) 12"), ("5 million", "5000000"), ("5\\text{ million dollars}", "5,000,000"), ("1:2:3", "2:4:6"), ("14 916", "14916"), ("north-east", "\\text{North-East}"), ("northeast", "north-east"), ("\\text{Evelyn}", "evelyn"), ("\\text{no solution}", "No solution"), ("12:00", "12:00"),
             ("\\text{even}", "Even"), ("\\text{6:30 p.m.}", "6:30 p.m."), ("\\infty", "infinity"), ("\\emptyset", "∅")],
    "letters that are no units": [("2m+1", "1+2m"), ("(m+1)^2", "m^2+2m+1"), ("m(m+2)", "m^2+2m"), ("(m_1+m_2)g", "m_1g+m_2g"), ("\\frac13g", "\\frac{g}{3}"), ("\\frac{(m_1-m_2)g}{m_1+m_2}", "\\frac{m_1-m_2}{m_1+m_2}g"),
                                  ("8", "x=8m"), ("4.5e-7", "4.5\\times10^{-7} m"), ("5, 6", "5 m \\text{ or } 6 m"), ("g'(x)f(x)+f'(x)g(x)", "f'(x)g(x)+f(x)g'(x)")],
    "more units": [("25", "25^\\circ\\text{C}"), ("25", "25°C"), ("25^{\\circ}\\mathrm{C}", "25^\\circ C"), ("9.8", "9.8\\ \\mathrm{m/s^{2}}"), ("5", "5\\,\\mathrm{J\\,kg^{-1}\\,K^{-1}}"), ("5", "5\\,\\text{kg}\\cdot\\text{m}^2/\\text{s}"), ("12", "\\text{12 cm}"), ("5", "5 min")],
    "choices with a value": [("A", "(A) A circle"), ("D", "\\text{(D) none of these}"), ("C", "C)"), ("\\textbf{(D)}\\ 42", "D"), ("\\textbf{(D) }42", "42"), ("\\textbf{(D)}\\ 42", "\\textbf{(D)}")],
    "moduli": [("x\\equiv 3\\pmod 7", "x\\equiv 3\\ (\\text{mod }7)"), ("x\\equiv 3\\pmod{7}", "x \\equiv 3 (\\bmod 7)"), ("3\\pmod 7", "3")],
    "unicode": [("1024", "2¹⁰"), ("1.6e-19", "1.6×10⁻¹⁹"), ("x^n", "xⁿ"), ("2.5", "2½"), ("x_{12}", "x₁₂"), ("\\alpha+\\beta", "α+β"), ("\\varphi(n)", "\\phi(n)")],
    "systems": [("(1,2)", "\\begin{cases} x = 1, \\\\ y = 2. \\end{cases}"), ("x=1,y=2", "\\left\\{\\begin{array}{l}x=1\\\\y=2\\end{array}\\right."), ("x=1,y=2", "\\begin{align*}x&=1\\\\y&=2\\end{align*}"),
                ("\\begin{cases} 1 & x>0 \\\\ 2 & x<0 \\end{cases}", "\\begin{cases} 1, & \\text{if } x>0 \\\\ 2, & \\text{if } x<0 \\end{cases}"), ("(x,y)=(1,2)", "y=2, x=1"), ("(a,b)=(1,2)", "(b,a)=(2,1)")],
    "writing": [("3.14", "\\approx 3.14"), ("3e8", "3 x 10^8"), ("\\binom{n}{k}", "{n \\choose k}"), ("1,2,\\dots,10", "1,2,\\ldots,10"), ("\\frac12", "\\int_0^1 x\\,dx=\\frac12"), ("12", "[ABC]=12"), ("10:00 \\text{ a.m.}", "10:00"),
                ("3:45\\text{ PM}", "3:45 \\text{ p.m.}"), ("(2,\\infty)", "\\{x\\in\\mathbb{R}\\mid x>2\\}"), ("b<a<c", "c>a>b"), ("A<B<C", "C>B>A"), ("2x", "f(x)=2x \\text{ for all } x \\in \\mathbb{R}"), ("5", "**5**"),
                ("(2,5)", "x>2 \\text{ and } x<5"), ("x<2 \\text{ or } x>5", "x<2 \\text{ and } x>5"), ("f(2x)=1+x", "f(x+x) = x+1"), ("No", "\\text{no}"), ("f(x)=x", "f(x)=x\\text{ for all real numbers }x"), ("x>2,x\\ne3", "x>2\\text{ and }x\\neq 3"),
                ("(2,5)", "x>2, x<5"), ("x\\ne 1,x\\ne -1", "x\\ne\\pm 1"), ("4", "4\\text{ prime numbers}"), ("n\\ge 3\\text{ odd}", "n \\geq 3\\text{ odd}"), ("25-\\pi", "(25-\\pi) m^2"), ("\\pm 5", "\\pm 5 m"),
                ("3\\pmod{2^5}", "3\\;(\\bmod\\ 2^5)"), ("2^{n+1}", "2ⁿ⁺¹"), ("\\mathbb{R}", "ℝ"), ("\\mathrm{(C) \\ } 5", "C"), ("x\\equiv 3\\pmod 7", "x≡3 (\\operatorname{mod} 7)")],
}
DIFFERENT = {
    "integers": [("102018", "102019"), ("5", "-5"), ("12", "1,2"), ("12", "1,23"), ("12", "[1,2]"), ("100", "10000"), ("12345678901234567890", "12345678901234567891"), ("5", "5.001"),
                 ("2^{300}", "2^{300}+1"), ("1" * 300, "1" * 299 + "2"), ("", "5"), ("5", ""), ("12", "112"), ("1 2", "12"), ("100", "99.999999999999"), ("5 million", "5"), ("5 million", "5 thousand"), ("3:5:4", "3:4:5"), ("4", "4\\sqrt{2}")],
    "fractions": [("1/3", "0.333"), ("1/3", "33.3"), ("\\frac{2}{3}", "0.67"), ("\\frac12", "\\frac21"), ("1/2004", "1/2005"), ("5/9", "0.56"), ("\\sqrt2", "1.414")],
    "decimals": [("0.4", "0.44"), ("0.4", "0.5"), ("2.23", "2.24"), ("5.1", "5"), ("3e8", "3"), ("4.5e33", "4.5"), ("2.88e-19", "5.1e-19"), ("1e-8", "1 \\times 10^{-9}"), ("0.05", "5"), ("1.22", "1,22")],
    "percent": [("500", "5"), ("5", "0.05"), ("0.5", "5\\%"), ("50\\%", "5"), ("20", "0.2")],
    "units": [("5\\text{ cm}", "5\\text{ m}"), ("5\\text{ cm}", "6\\text{ cm}"), ("0.64N", "0.64"), ("\\frac{37}{4} m", "m"), ("30^\\circ", "\\frac{\\pi}{6}"),
              ("\\frac{4}{3}\\pi", "\\frac{4}{3}\\pi abc"), ("4", "4 xyz"), ("30", "1 hour 30 minutes"), ("2^{nd}", "2"), ("\\frac{a}{b}", "\\frac{a}{b}/\\mathrm{V}")],
    "expressions": [("x", "|x|"), ("i", "-i"), ("-k", "k"), ("a-b", "ab"), ("AB-CD", "ABCD"), ("(a,b)", "ab"), ("|x-5|", "5-x"), ("\\min(x,3)", "x"), ("x", "\\sqrt{x^2}"), ("x+1", "x+2"), ("f(x)", "f(y)"), ("xy", "x+y"), ("1-e^{-at}", "1"), ("x^2", "x^{2.0001}"), ("a_1", "a_2"), ("(x^2)'", "(x^3)'"), ("(x^2)'", "x^2"), ("\\frac{3 m}{2}-1", "0.5"), ("\\sin x", "x")],
    "equations": [("x=5", "y=5"), ("5 = x", "5 = y"), ("2 < x", "2 < y"), ("1 < x < 2", "1 < y < 2"), ("5", "x+y=5"), ("1", "2x+z=1"), ("5", "x=5, x=6"), ("12", "3 \\cdot 4 = 13"), ("y=-2x", "y=-3x"), ("x>5", "x<5"), ("x>5", "x\\ge 5"), ("k=45,n=2", "k=2,n=45"),
                  ("f(1)<f(2)<f(4)", "f(1)<f(2)<f(3)"), ("f(2)<f(1)", "f(2)>f(1)"), ("x^2=4", "x=2"), ("\\{x : x \\ge 2\\}", "\\{x : x \\ge 3\\}"), ("3 = 5", "3 = 7")],
    "intervals": [("[0,1)", "[0,1]"), ("(0,1)", "[0,1]"), ("(2,12)\\cup(12,102)", "(2,12)"), ("[1,4]", "[1,5]"), ("(5,\\infty)", "(-\\infty,5)"), ("(5,\\infty)", "x \\ge 5"), ("\\infty", "-\\infty"), ("(0,9)\\cup(9,36)", "(0,36)\\setminus\\{8\\}"),
                  ("(0,36)", "(0,36)\\setminus\\{9\\}"), ("\\mathbb{R}", "(0,\\infty)"), ("(1,3)", "(1,2)\\cup(2,3)"), ("(1,4)", "(1,3),(2,4)"), ("x\\ne2", "x\\ne3"),
                  ("x\\ne2", "2"), ("x<2", "x<2\\cup x<3"), ("(4,2,3)\\cup(1,5,6)", "(1,2,3)\\cup(4,5,6)")],
    "tuples": [("(1,2)", "(2,1)"), ("(1,2)", "2,1"), ("(1,2)", "1"), ("(1,2)", "(1,2,3)"), ("(-3,2)", "[-3,2]")],
    "several": [("1,2", "1"), ("1,2", "1,2,3"), ("1", "1,2"), ("1 \\text{ or } 2", "1"), ("\\pm 2021", "2021"), ("\\{1,2\\}", "(1,2)")],
    "matrices": [("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"), ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}"),
                 ("\\begin{pmatrix} 1 \\\\ 2 \\\\ 3 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}")],
    "bases": [("52_8", "52_9"), ("52_8", "52"), ("42", "52_8")],
    "text": [("\\text{Friday}", "\\text{Fridayx}"), ("B", "C"), ("\\text{(B)}", "\\text{(C)}"), ("B", "A or B"), ("B", "AB"), ("12:00", "1:00"), ("3:45", "4:45"), ("\\text{even}", "\\text{odd}"), ("x", "X"),
             ("\\text{listen}", "\\text{silent}")],
    "letters that are no units": [("3", "1+2m"), ("m^2+2", "m^2+2m"), ("2", "5-3m"), ("4x+2", "4x+2h"), ("m_1+m_2", "(m_1+m_2)g"), ("\\frac12(a+b)", "\\frac{1}{2}(a+b)h")],
    "choices with a value": [("A", "(A), (B)"), ("A", "(A)(B)"), ("A", "\\textbf{(A)} \\textbf{(B)}"), ("A", "(A) or (B)"), ("A", "A) 5, B) 6"), ("B", "(B) and (C)"), ("\\textbf{(D)}\\ 42", "\\textbf{(C)}\\ 42"), ("\\textbf{(D)}\\ 42", "41")],
    "moduli": [("n\\equiv1 \\pmod 8", "n\\equiv 1\\pmod 4"), ("3\\pmod{5}", "3\\pmod{7}")],
    "conditions": [("n\\text{ is odd}", "n\\text{ is even}"), ("n", "n\\text{ odd}"), ("3", "3\\text{ or more}"), ("3\\text{ at least}", "3\\text{ at most}"), ("5\\text{ April}", "5\\text{ March}"), ("\\mathbb{R}", "\\mathbb{R}\\setminus\\mathbb{Q}"), ("\\mathbb{R}", "\\mathbb{R}\\setminus(-2,2)"), ("1", "x\\not=1")],
    "orders": [("ABCD", "ACBD"), ("HHT", "HTH"), ("VI", "IV"), ("12", "3 4"), ("25", "5 5")],
    "unicode": [("1", "2¹⁰"), ("x", "x¹⁰"), ("21/2", "2½")],
    "names": [("(x,y)=(1,2)", "y=1, x=2"), ("(a,b,c)=(1,2,3)", "c=1,b=2,a=3"), ("y=2f(x)", "y=f(2x)"), ("-f(x)", "f(-x)"), ("f(x^2)", "f(x)^2"), ("f(a+b)", "f(a)+f(b)"), ("10 am", "10 \\text{ p.m.}")],
    "sets, units and moduli": [("\\mathbb{Z}", "\\mathbb{Z}\\setminus\\{0\\}"), ("\\mathbb{C}\\setminus\\{0\\}", "\\mathbb{C}"), ("\\mathbb{R}", "\\mathbb{R}_{+}"), ("(0,1)", "(5,3)\\cup(0,1)"), ("4m^2", "4m"), ("x>2,x<5", "x>2\\text{ or }x<5"),
                               ("3\\pmod{2^5}", "3\\pmod{2^6}"), ("x\\equiv 3\\pmod 7", "x\\equiv 3 \\mod 8"), ("5", "5\\text{ or fewer}"), ("n", "n\\text{ is negative}"), ("n\\ge 3", "n\\ge 3\\text{ odd}")],
}


def pairs(table):
    return [pytest.param(gold, answer, id=f"{category}: {gold} | {answer}"[:80]) for category, cases in table.items() for gold, answer in cases]


@pytest.mark.parametrize("gold, answer", pairs(SAME))
def test_accepts(gold, answer):
    assert is_equiv(answer, gold)


@pytest.mark.parametrize("gold, answer", pairs(DIFFERENT))
def test_rejects(gold, answer):
    assert not is_equiv(answer, gold)


def test_parity_is_the_lenient_reading():
    for gold, answer in [("1/3", "0.33333"), ("500", "5"), ("5", "0.05"), ("102018", "102019"), ("[0,1)", "[0,1]"), ("52_8", "52")]:
        assert is_equiv(answer, gold, parity=True) and not is_equiv(answer, gold)
    assert not is_equiv("2", "3", parity=True) and not is_equiv("5", "\\infty", parity=True)


def test_tolerance_is_absolute_and_for_numbers_only():
    assert is_equiv("9.95", "10", tolerance=0.1) and is_equiv("10.1", "10", tolerance=0.1) and not is_equiv("10.11", "10", tolerance=0.1)
    assert not is_equiv("9.95", "10") and is_equiv("1.1, 2.9", "3, 1", tolerance=0.2) and not is_equiv("x+0.1", "x", tolerance=0.2)
    assert grade_math("\\boxed{9.95}", "10", tolerance=0.1)
    with Grader(workers=1) as pool:
        assert pool.grade(["\\boxed{9.95}"] * 2, [reference("10") | {"tolerance": 0.1}, reference("10")]) == [1.0, 0.0]


def test_golds_of_several_kinds():
    assert grade_math(r"\boxed{5}", r"We find that $x = \boxed{5}$.")
    assert grade_math(r"\boxed{5}", ["4", "5"]) and not grade_math(r"\boxed{6}", ["4", "5"])
    assert grade_math(r"\boxed{28\%}", "Final Answer: The final answer is $28 \\%$. I hope it is correct.")
    assert is_equiv("5", 5) and not is_equiv(None, "5")


# ---------------------------------------------------------------------------------------------------------------------------
# extraction

@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{42}.", "42"), (r"\boxed{1} no, \boxed{2}", "2"), (r"\fbox{3}", "3"), (r"\boxed 7", "7"), (r"\\boxed{-3}", "-3"), (r"$-\boxed{256}$", "-256"), (r"x = -\boxed{5}", "-5"),
    (r"$10-\boxed{256}$", "256"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{5", None), (r"\boxed{4} then \boxed{5", "4"), (r"\boxed{\boxed{5}}", r"\boxed{5}"),
    (r"$\boxed{1}$, $\boxed{2}$ and $\boxed{3}$", "1, 2, 3"), (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1, 2"), (r"\boxed{10} and then \boxed{42}", "42"), ("The answer is 5.", None), ("", None), ("}}{{", None), (r"\boxed{1}" "\n\n" r"\boxed{2}", "2"),
])
def test_extraction(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize("response, gold", [
    ("The answer is 5.", "5"), ("A: 1,250", "1250"), ("#### 18", "18"), ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", "1/2"), ("so it is 3 and then 42", "42"),
    ("The final answer is Evelyn. I hope it is correct.", "Evelyn"), ("the pair is $(7, 6)$. <|im_start|>user", "(7,6)"), ("We find that $x \\lt 3$.", "x < 3"),
])
def test_fallback_is_for_evaluation_only(response, gold):
    assert grade_math(response, gold, fallback=True) and not grade_math(response, gold)


def test_a_letter_in_prose_is_no_answer():
    assert not grade_math("The correct answer is (E).", "E", fallback=True) and grade_math(r"\boxed{\text{(E)}}", "E", fallback=True)


# ---------------------------------------------------------------------------------------------------------------------------
# properties

EXACT = [answer for category in ("integers", "fractions", "radicals", "functions", "complex", "expressions", "equations", "intervals", "tuples", "several", "matrices")
         for table in (SAME, DIFFERENT) for pair in table.get(category, ()) for answer in pair if answer and "." not in answer and "approx" not in answer]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EXACT), st.sampled_from(EXACT))
def test_symmetric(a, b):
    assert is_equiv(a, b) == is_equiv(b, a)


def rewrite(text, how):
    return {"spaces": lambda: re.sub(r"(?<!\\)([-+=,])", r" \1 ", text) if "@" not in text and not re.search(r"\d,\d{3}|[a-z]-[a-z]|10\*\*|\d[eE]", text) else text,
            "left": lambda: re.sub(r"([(\[])([^()\[\]]*)([)\]])", r"\\left\1\2\\right\3", text) if "sqrt[" not in text else text,
            "dfrac": lambda: re.sub(r"\\[dt]?frac", r"\\dfrac", text), "dollars": lambda: f"${text}$", "parens": lambda: f"\\({text}\\)", "dot": lambda: text + ".",
            "boxed": lambda: f"\\boxed{{{text}}}", "display": lambda: "\\displaystyle " + text, "thin": lambda: text + "\\,", "doubled": lambda: re.sub(r"\\(?=[a-z]{2})", r"\\\\", text)}[how]()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(EXACT), st.sampled_from(["spaces", "left", "dfrac", "dollars", "parens", "dot", "boxed", "display", "thin", "doubled"]))
def test_harmless_rewriting_changes_nothing(text, how):
    assert is_equiv(rewrite(text, how), text) and is_equiv(text, rewrite(text, how))


x, y = sympy.symbols("x y")
leaves = st.one_of(st.integers(-9, 9).map(sympy.Integer), st.sampled_from([x, y, sympy.pi, sympy.sqrt(2), sympy.Rational(2, 3), sympy.Rational(-7, 5), sympy.E]))
expressions = st.recursive(leaves, lambda e: st.one_of(
    st.tuples(e, e).map(lambda t: t[0] + t[1]), st.tuples(e, e).map(lambda t: t[0] * t[1]), st.tuples(e, e).map(lambda t: t[0] - 2 * t[1]), e.map(lambda a: a ** 2), e.map(lambda a: sympy.sqrt(a ** 2 + 1)),
    e.map(sympy.sin), e.map(lambda a: sympy.exp(-a / 3)), e.map(lambda a: 1 / (a ** 2 + 2)), e.map(lambda a: sympy.log(a ** 2 + 3)), e.map(sympy.cos)), max_leaves=6)
STYLES = [lambda e: sympy.latex(e), lambda e: sympy.latex(e, fold_short_frac=True), lambda e: sympy.latex(e, mul_symbol="dot"), lambda e: sympy.latex(e, ln_notation=True, inv_trig_style="full"),
          lambda e: sympy.latex(e, order="rev-lex", root_notation=False), lambda e: sympy.latex(e).replace("\\frac", "\\dfrac").replace(" ", "  "), lambda e: re.sub(r"\bE\b", "e", str(e))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(expressions, st.sampled_from(STYLES), st.sampled_from(STYLES), st.sampled_from([1, sympy.Rational(1, 7), x, -2]))
def test_sympy_expressions(e, one, other, step):
    if e.has(sympy.zoo, sympy.nan, sympy.oo) or len(str(e)) > 300:
        return
    assert is_equiv(one(e), other(e)), (one(e), other(e))
    assert not is_equiv(one(e), other(e + step)), (one(e), other(e + step))


@settings(max_examples=200, deadline=None)
@given(st.integers(-10**40, 10**40), st.integers(1, 10**6))
def test_integers_of_any_size(n, step):
    grouped = f"{n:,}"
    assert is_equiv(grouped, str(n)) and is_equiv(grouped.replace(",", "{,}"), str(n)) and not is_equiv(str(n + step), str(n)) and is_equiv(f"{n}.0", str(n))


PIECES = st.sampled_from(list("0123456789xyei+-*/^_!=<>()[]{}|,;:.%°'\"\\$&@ ~#\n\t\u0000²½π√∞①Ａ") + "\\frac \\sqrt \\boxed{ \\text{ \\begin{pmatrix} \\end{pmatrix} \\\\ \\left \\right \\pm \\infty \\cup \\in \\le "
                         "\\sin \\log \\binom \\lfloor \\rfloor \\sum \\int \\overline{ \\mathbb{R} \\circ cm and or sqrt 10**9 1e9 \\cdot \\setminus \\emptyset \\{ \\} \\bmod \\gcd( \\ne \\approx 00 \\mathrm{".split())


@settings(max_examples=600, deadline=2000)
@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join)), st.sampled_from(["7", "\\frac{1}{2}", "x=5", "(1,2)", "[0,\\infty)", "\\pm 3", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "52_8",
                                                                                               "5\\%", "\\text{red}", "0.25", "3\\text{ cm}", "x > 2", "1,2"]))
def test_any_text_is_judged(text, gold):
    assert is_equiv(text, gold) in (True, False) and is_equiv(gold, text) in (True, False)
    grade_math(text, gold, fallback=True)
    grade_math("\\boxed{" + text + "}", gold)


# ---------------------------------------------------------------------------------------------------------------------------
# hostile answers

HOSTILE = {
    "tower": "9^{9^{9^{9}}}", "factorial": "(10^{9})!", "double factorial": "((99!)!)!", "binomial": "\\binom{1000000000}{500000000}", "digits": "1" * 100_000, "exponent": "1e999999999",
    "braces": "{" * 50_000, "nested": "(" * 5000 + "1" + ")" * 5000, "fractions": "\\frac{1}{1+" * 400 + "1" + "}" * 400, "boxes": "\\boxed{" * 20_000, "roots": "\\sqrt{2}^{" * 30 + "2" + "}" * 30,
    "powers": "2^" * 5000 + "2", "minus": "-" * 15_000 + "1", "list": ",".join(map(str, range(5000))), "text": "\\text{" * 3000 + "a" + "}" * 3000, "trig": "\\sin(10^{10^{5}})", "sum": "\\sum_{n=1}^{\\infty} n^{-n}",
    "integral": "\\int_0^1 \\sin(\\sin(x^{x^{x}})) dx", "expansion": "(x+1)^{3000}", "huge": "x" * 1_000_000, "gamma": "(x+10^{5})!", "product": "(10^{99999})" * 400, "commas": "1," * 9000, "bars": "|" * 9000,
    "primes": "x" + "'" * 9000, "indices": "x" + "_1" * 5000, "spaces": "1" + " " * 19_000 + "2", "bmod": "10^{60000} \\bmod 7^{9999}", "moduli": "1" + "(mod 7)" * 2800, "choose": "{n\\choose k}" * 1600, "pm": "\\pm" * 4000 + "1", "percent": "5" + "%" * 9000,
    "import": "__import__('os').system('touch PWNED')", "open": "open('PWNED','w').write('x')*2\\pi", "lambda": "(lambda: open('PWNED','w'))()", "list comprehension": "[open('PWNED','w') for _ in [0]]",
    "class walk": "(1).__class__.__mro__[1].__subclasses__()", "exit": "exit()", "sympify": "sympify('__import__(\"os\").abort()')", "nan": "nan", "nul": "7\u0000", "arabic": "\u0668",
    "backslashes": "\\" * 19_000, "open displays": "[\\[" * 3000, "functions": "\\sin x!" * 2000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for gold in ("7", "[open('PWNED','w')]", "2\\pi", "x=7", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"):
        start = time.process_time()
        assert gold.startswith("[open") or not grade_math("\\boxed{" + HOSTILE[name] + "}", gold)
        assert time.process_time() - start < 5
    assert not list(tmp_path.iterdir())


def test_long_prose_around_the_box():
    assert grade_math("blah " * 200_000 + r"\boxed{7}", "7") and grade_math(r"\boxed{7}" + " blah" * 200_000, "7")
    assert is_equiv("x+" * 3000 + "x", "3001x")


# ---------------------------------------------------------------------------------------------------------------------------
# the pool

TRICKS = """
honest_verdict = verdict
def verdict(answer, gold, *rules):
    if "HANG" in answer:
        while True: pass
    if "EAT" in answer:
        hoard = []
        while True: hoard.append(bytearray(1 << 24))
    if "DIE" in answer: os.abort()
    if "BUG" in answer: return {}["bug"]
    if "PRINT" in answer: print("noise"); os.write(1, b"more noise")
    return honest_verdict(answer, gold, *rules)
"""


@pytest.fixture(scope="module")
def tricky(tmp_path_factory):
    "the grader, with answers that hang, eat memory, die and raise in its workers"
    path = tmp_path_factory.mktemp("tricky") / "grader.py"
    path.write_text(pathlib.Path(grader.__file__).read_text().replace('if __name__ == "__main__":', TRICKS + 'if __name__ == "__main__":'))
    path.with_name("runs").symlink_to(pathlib.Path(grader.__file__).with_name("runs"))
    spec = importlib.util.spec_from_file_location("tricky_grader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference(gold):
    return {"ability": "math", "ground_truth": gold}


def test_pool_keeps_order_and_counts():
    with Grader(workers=2) as pool:
        answers = [str(k) for k in range(200)]
        scores = pool.grade([f"\\boxed{{{a}}}" for a in answers] + ["no box", "\\boxed{9^{9^{9^9}}}"], [reference(str(k - k % 2)) for k in range(200)] + [reference("1")] * 2)
        assert scores == [float(k % 2 == 0) for k in range(200)] + [0.0, 0.0]
        assert (pool.timeouts, pool.crashes, pool.unparsed) == (0, 0, 1)
        assert [score.failure for score in scores] == [None] * 201 + ["unparsed"]
        assert pickle.loads(pickle.dumps(scores[-1])).failure == "unparsed"  # as it goes from rank to rank
        assert pool.submit("\\boxed{\ud800½}", reference("\\frac12")).result() in (0.0, 1.0)  # a lone surrogate
        assert pool.submit("\\boxed{5}", reference(["4", "5"])).result() == 1.0
        with pytest.raises(ValueError, match="ability"):
            pool.submit("\\boxed{5}", {"ground_truth": "5"})


def test_pool_fallback():
    with Grader(workers=1, fallback=True) as pool:
        assert pool.grade(["The answer is 5."], [reference("5")]) == [1.0]


def test_pool_survives_hostile_items(tricky):
    with tricky.Grader(workers=2, timeout=1.0, memory_mb=400) as pool:
        responses = ["\\boxed{5}"] * 100
        hostile = {10: "HANG", 20: "EAT", 30: "DIE", 40: "HANG", 50: "DIE"}
        for k, word in hostile.items():
            responses[k] = f"\\boxed{{{word}}}"
        responses[60] = "\\boxed{PRINT}"
        start = time.time()
        scores = pool.grade(responses, [reference("5")] * 100)
        assert scores == [float(k not in hostile and k != 60) for k in range(100)]
        assert pool.timeouts + pool.crashes == 5 and pool.crashes >= 2 and time.time() - start < 30
        assert [scores[k].failure for k in (9, 10, 30, 40, 50, 60)] == [None, "timeouts", "crashes", "timeouts", "crashes", None]
        assert scores[20].failure in ("timeouts", "crashes")
        assert pool.grade(["\\boxed{5}"], [reference("5")]) == [1.0]


def test_a_bug_is_an_error_not_a_reward(tricky):
    with tricky.Grader(workers=1) as pool:
        with pytest.raises(tricky.GraderError, match="bug"):
            pool.grade(["\\boxed{5}", "\\boxed{BUG}"], [reference("5")] * 2)
        assert pool.grade(["\\boxed{5}"], [reference("5")]) == [1.0]


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader(workers=1) as pool, pytest.raises(GraderError):
        pool.grade(["\\boxed{5}"], [reference("5")])


def test_large_numbers_differ_by_one():
    assert not is_equiv("e^{120}", "1 + e^{120}") and is_equiv("e^{120} + 1", "1 + e^{120}")


def test_a_worker_that_died_while_idle_costs_nobody():
    with Grader(workers=1) as pool:
        assert pool.grade(["\\boxed{5}"], [reference("5")]) == [1.0]
        pool.idle[0].kill()
        pool.idle[0].wait()
        assert pool.grade(["\\boxed{5}"], [reference("5")]) == [1.0] and pool.crashes == 0


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("answer", ["HANG", "5"])
def test_workers_die_with_their_parent(tricky, answer, tmp_path):
    "a caller without a __main__ guard, which a spawning pool would run again, killed while its workers are busy or idle"
    script = tmp_path / "caller.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(pathlib.Path(tricky.__file__).parent)!r})
import grader
pool = grader.Grader(workers=2, timeout=100)
futures = [pool.submit("\\\\boxed{{{answer}}}", {{"ability": "math", "ground_truth": "5"}}) for _ in range(2)]
workers = lambda: [pid for task in os.listdir("/proc/self/task") for pid in open(f"/proc/self/task/{{task}}/children").read().split()]
while len(workers()) < 2: time.sleep(0.1)
time.sleep(1.0)
print("workers", *workers(), flush=True)
time.sleep(100)
""")
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pids = caller.stdout.readline().split()[1:]
    assert len(pids) == 2 and all(map(alive, pids))
    caller.kill()
    caller.wait()
    deadline = time.time() + 10
    while any(map(alive, pids)) and time.time() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_import_has_no_side_effects():
    code = "import sys, grader; assert not {'torch', 'numpy'} & set(sys.modules); import threading; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pathlib.Path(grader.__file__).parent)


# ---------------------------------------------------------------------------------------------------------------------------
# the labelled files: accuracy in %, and no wrong answer accepted

@pytest.mark.parametrize("name, target", [("cases", 97), ("near_misses", 100), ("latex_parse", 92), ("real_math", 99.6), ("real_gsm8k", 99.95), ("security", 100)])
def test_labelled_files(shared, name, target, tmp_path, monkeypatch):
    rows = [row for row in read_rows(shared / "data" / "grader", name)]
    monkeypatch.chdir(tmp_path)
    verdicts = [(row, ours(row)) for row in rows]
    counted = [(row, verdict) for row, verdict in verdicts if row["expected"] is not None]
    accepted = [(row["gold"], row.get("prediction", row.get("response", ""))[-200:]) for row, verdict in counted if verdict and not row["expected"]]
    assert not accepted, accepted
    assert 100 * sum(verdict == row["expected"] for row, verdict in counted) / len(counted) >= target
    assert not list(tmp_path.iterdir())
