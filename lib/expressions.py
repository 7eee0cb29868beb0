r"""
Expressions and their values: when are two of them equal?

An expression is a tree of Node. Its value at a point is exact as long as it is rational, else it
has as many digits as are needed. Two expressions are equal if they are at a dozen points that
depend on both texts of the comparison: so nobody can write a difference that is zero just there,
and the same two texts always get the same verdict.

What is not understood is a Node "name": its value is a random number that depends on its name and
on the values of its parts. It equals nothing but the same name of equal parts.

A differential, letters under a bar and an unknown function are Nodes "whole": names that may stand
at another place, but never cancel, vanish or add up. Both expressions must have each of them
equally often.

A sum, product, integral or limit, and any expression with one in it, is a Node "written". It has no
value at all: it equals only what is written alike, part by part, in the same order.
"""

import collections
import functools
import hashlib
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import mpmath
from mpmath.libmp import from_man_exp, from_rational, round_down

from lib.latex import FUNCTIONS, Unparsed

# An exact number with more bits is rounded; a number with a longer exponent is refused.
MAX_BITS = 64_000
MAX_EXPONENT_BITS = 60
MAX_FACTORIAL = 4096
# Bits of a first look, and the most that are ever used: of a constant, and at a point.
FIRST_BITS = 256
MAX_PRECISION = 20_000
MAX_PRECISION_OF_POINT = 1024
# Bits that may be lost to rounding without anybody noticing.
SLACK = 64
# Steps of one comparison, each of about 3 microseconds.
MAX_STEPS = 150_000

# A context of our own, so that nobody else's precision changes.
mp = mpmath.MPContext()
mp.prec = FIRST_BITS

TWO = Fraction(2)


class Node(NamedTuple):
    """An operation on other nodes; for "number", "constant", "name", "whole" and "written" the
    first part is what it is called. The last three have a text and any number of nodes."""

    operation: str
    parts: tuple


class TooBig(Unparsed):
    """Too costly to work out."""


class Work:
    """The comparison at hand: what its points are drawn from, the steps that it took, and the bits
    that it turned out to need."""

    salt = b""
    steps = 0
    needed = 0
    # What has been drawn for each variable at each point.
    values = {}


def begin(*texts: str):
    """Starts a comparison of texts, in whatever order: its points depend on them alone."""
    joined = "\n".join(sorted(texts)).encode("utf-8", "replace")
    Work.salt = hashlib.blake2b(joined, digest_size=16).digest()
    Work.steps = 0
    Work.values = {}


# --- making nodes ---


def number(x: Fraction) -> Node:
    return Node("number", (x,))


def name(text: str, *parts: Node) -> Node:
    """A variable, or anything that is not understood."""
    if any(map(is_written, parts)):
        return written(text, *parts)
    return Node("name", (text, *parts))


def whole(text: str, *parts: Node) -> Node:
    """A name that never cancels: a differential, letters under a bar, an unknown function."""
    if any(map(is_written, parts)):
        return written(text, *parts)
    return Node("whole", (text, *parts))


def written(text: str, *parts: Node) -> Node:
    """What is never calculated with: a sum, or an operation or a name with a sum in it."""
    return Node("written", (text, *parts))


def is_written(node: Node) -> bool:
    return node.operation == "written"


def letter(text: str) -> Node:
    """A constant or a variable."""
    if text in CONSTANTS:
        return Node("constant", (text,))
    return name(text)


def operation(sign: str, *parts: Node) -> Node:
    """sign: a key of TABLE. Long sums and products are kept flat, as trees may not be deep."""
    if sign == "-" and len(parts) == 2:
        return operation("+", parts[0], negative(parts[1]))
    has_written = any(map(is_written, parts))
    if sign in ("+", "*"):
        first = parts[0]
        if first.operation == sign:
            parts = first.parts + parts[1:]
        elif is_written(first) and first.parts[0] == sign:
            parts = first.parts[1:] + parts[1:]
    if sign not in TABLE:
        raise Unparsed(sign)
    return written(sign, *parts) if has_written else Node(sign, parts)


def negative(node: Node) -> Node:
    if node.operation == "number":
        return number(-node.parts[0])
    return operation("negative", node)


def has_names(node: Node) -> bool:
    """Does the value depend on the point?"""
    if node.operation in ("name", "whole", "written"):
        return True
    if node.operation in ("number", "constant"):
        return False
    return any(map(has_names, node.parts))


# --- arithmetic: numbers are fractions where possible, else mpmath's ---

# "type(x) is Fraction" takes a tenth of the time of isinstance, which asks abstract classes.


def are_exact(*numbers) -> bool:
    return {Fraction}.issuperset(map(type, numbers))


def bits(x) -> int:
    """The length of a fraction in binary digits, zero for other numbers."""
    if type(x) is Fraction:
        return x.numerator.bit_length() + x.denominator.bit_length()
    return 0


def size(x) -> int:
    """The binary exponent of a number that is not zero."""
    if type(x) is Fraction:
        return x.numerator.bit_length() - x.denominator.bit_length()
    return mp.mag(x)


def inexact(x):
    """mp.convert(x), without its detours for fractions."""
    if type(x) is not Fraction:
        return mp.convert(x)
    numerator = x.numerator
    denominator = x.denominator
    if denominator & (denominator - 1) == 0:
        # A power of two, as at all points: nothing to divide.
        shift = denominator.bit_length() - 1
        return mp.make_mpf(from_man_exp(numerator, -shift, mp.prec, round_down))
    return mp.make_mpf(from_rational(numerator, denominator, mp.prec))


def is_nan(x) -> bool:
    return type(x) is not Fraction and bool(mp.isnan(x))


def is_finite(x) -> bool:
    return type(x) is Fraction or mp.isfinite(x)


def need(precision: int):
    """Notes that the result means nothing with fewer bits than these."""
    Work.needed = max(Work.needed, precision)


def add(*numbers):
    """The sum. A difference that vanishes in all digits is zero: more digits confirm it later."""
    total = numbers[0]
    for x in numbers[1:]:
        if are_exact(total, x):
            total += x
        else:
            total = add_inexact(total, x)
    return total


def add_inexact(a, b):
    if not a or not b or not (is_finite(a) and is_finite(b)):
        return inexact(a) + inexact(b)
    total = inexact(a) + inexact(b)
    largest = max(size(a), size(b))
    # Of 2^2023 + 1 the 1 needs 2023 bits.
    need(largest - min(size(a), size(b)))
    lost = mp.prec
    if total:
        lost = largest - size(total)
    if lost > SLACK:
        need(max(min(lost, mp.prec), bits(a), bits(b)))
    if lost > mp.prec - 30:
        return Fraction(0)
    return total


def multiply(*numbers):
    product = numbers[0]
    for x in numbers[1:]:
        if are_exact(product, x) and bits(product) + bits(x) > MAX_BITS:
            product = inexact(product)
        if are_exact(product, x):
            product = product * x
        else:
            product = inexact(product) * inexact(x)
    return product


def divide(a, b):
    if not b:
        raise ZeroDivisionError
    if are_exact(a, b):
        return a / b
    return inexact(a) / inexact(b)


def remainder(a, b):
    multiple = b * floor(divide(a, b))
    if are_exact(a, multiple):
        return a - multiple
    return inexact(a) - inexact(multiple)


def power(base, exponent):
    is_whole = is_integer(exponent)
    if is_whole and base in (1, -1):
        return base if exponent % 2 else base * base
    if bits(exponent) > 2 * MAX_EXPONENT_BITS:
        raise TooBig("exponent")
    if is_whole and type(base) is Fraction:
        if not base and exponent <= 0:
            return Fraction(1) if exponent == 0 else divide(Fraction(1), base)
        if abs(exponent) * bits(base) <= MAX_BITS:
            return base ** int(exponent)
    check_size(base, exponent)
    if not base:
        return Fraction(0) if mp.re(exponent) > 0 else mp.nan

    # An odd root of a negative number is real: the cube root of -8 is -2.
    is_odd_root = type(exponent) is Fraction and exponent.denominator % 2 == 1
    if is_odd_root and not is_whole and not mp.im(base) and mp.re(base) < 0:
        sign = -1 if exponent.numerator % 2 else 1
        return sign * power(-base, exponent)
    if type(base) is Fraction and bits(base) > FIRST_BITS // 2:
        need(2 * min(bits(base), MAX_BITS))
    if type(exponent) is Fraction and exponent.denominator == 2:
        return exact_root(base, exponent)
    if is_whole:
        return mp.power(inexact(base), int(exponent))
    if type(base) is not Fraction and base == mp.e:
        # Without the logarithm of e.
        return mp.exp(inexact(exponent))
    return mp.power(inexact(base), inexact(exponent))


def check_size(base, exponent):
    """Raises TooBig if a power has too long an exponent to be written as a number."""
    if not base or not is_finite(base) or not is_finite(exponent):
        return
    factor = abs(size(base)) + 1
    if type(exponent) is Fraction and abs(exponent.numerator) * factor < 2**MAX_EXPONENT_BITS:
        return
    length = abs(inexact(exponent)) * factor
    if length > 2**MAX_EXPONENT_BITS:
        raise TooBig("power")


def exact_root(base, exponent: Fraction):
    """A power whose exponent is a half of an odd number, exact where it is rational."""
    if type(base) is Fraction and base > 0:
        numerator = math.isqrt(base.numerator)
        denominator = math.isqrt(base.denominator)
        if numerator**2 == base.numerator and denominator**2 == base.denominator:
            return power(Fraction(numerator, denominator), Fraction(exponent.numerator))
    square_root = mp.sqrt(inexact(base))
    return square_root if exponent.numerator == 1 else mp.power(square_root, exponent.numerator)


def root(x, degree=TWO):
    return power(x, divide(Fraction(1), degree))


@functools.lru_cache(64)
def small_factorial(n: int) -> Fraction:
    return Fraction(math.factorial(n))


def factorial(n):
    if type(n) is Fraction and n.denominator == 1 and 0 <= n <= MAX_FACTORIAL:
        return small_factorial(int(n))
    if not is_finite(n) or abs(n) > 1e12 or mp.prec > 2 * MAX_PRECISION_OF_POINT:
        raise TooBig("factorial")
    return mp.gamma(inexact(n) + 1)


def double_factorial(n):
    r"""7!! = 7*5*3*1. Of other numbers by the formula that holds for even and odd ones."""
    if type(n) is Fraction and n.denominator == 1 and -1 <= n <= MAX_FACTORIAL:
        return Fraction(math.prod(range(int(n), 0, -2)))
    if not is_finite(n) or abs(n) > 1e12 or mp.prec > 2 * MAX_PRECISION_OF_POINT:
        raise TooBig("factorial")
    return mp.fac2(inexact(n))


def binomial(n, k):
    if is_integer(n) and is_integer(k):
        if n < 0:
            raise ValueError("binomials of negative integers are defined in several ways")
        if k < 0 or k > n:
            return Fraction(0)
        k = min(k, n - k)
        if k * bits(n) <= MAX_BITS:
            return Fraction(math.comb(int(n), int(k)))
    if is_integer(k) and 0 <= k <= 200:
        value = Fraction(1)
        for j in range(int(k)):
            value = divide(multiply(value, add(n, Fraction(-j))), Fraction(j + 1))
        return value
    return divide(factorial(n), multiply(factorial(k), factorial(add(n, -k))))


def is_integer(x) -> bool:
    return type(x) is Fraction and x.denominator == 1


def floor(x):
    if type(x) is Fraction:
        return Fraction(math.floor(x))
    if not is_finite(x) or mp.im(x):
        raise TooBig("floor")
    length = mp.mag(x)
    if length > mp.prec - SLACK:
        raise TooBig("floor")
    # A number that was rounded may lie a little below the integer that it is.
    margin = mp.ldexp(1, SLACK - mp.prec + max(0, length))
    return Fraction(int(mp.floor(mp.re(x) + margin)))


def ceiling(x):
    return -floor(-x)


def gcd(*numbers):
    numerator = math.gcd(*(x.numerator for x in numbers))
    denominator = math.lcm(*(x.denominator for x in numbers))
    return Fraction(numerator, denominator)


def lcm(*numbers):
    if not all(numbers):
        return Fraction(0)
    return 1 / gcd(*(1 / x for x in numbers))


def check_real(*numbers):
    if any(mp.im(x) for x in numbers):
        raise ValueError("complex numbers have no order")


def largest(*numbers):
    check_real(*numbers)
    return max(numbers)


def smallest(*numbers):
    check_real(*numbers)
    return min(numbers)


def determinant(*entries):
    """entries: those of a square matrix, row by row. By elimination, exact for fractions."""
    n = math.isqrt(len(entries))
    if n * n != len(entries) or n > 12:
        raise TooBig("determinant")
    rows = [list(entries[start : start + n]) for start in range(0, len(entries), n)]
    value = Fraction(1)
    for column in range(n):
        pivots = [row for row in range(column, n) if rows[row][column]]
        if not pivots:
            return Fraction(0)
        # A row that passes an odd number of others changes the sign.
        rows.insert(column, rows.pop(pivots[0]))
        if (pivots[0] - column) % 2 == 1:
            value = -value
        pivot = rows[column][column]
        value = multiply(value, pivot)
        for row in range(column + 1, n):
            ratio = divide(rows[row][column], pivot)
            for k in range(column, n):
                rows[row][k] = add(rows[row][k], -multiply(ratio, rows[column][k]))
    return value


def logarithm(x, base=None):
    if not x:
        raise ZeroDivisionError
    if base is None:
        return transcendental("log")(x)
    return divide(logarithm(x), logarithm(base))


def decimal_logarithm(x):
    return logarithm(x, Fraction(10))


def transcendental(function: str):
    """mpmath's function of this name."""

    def compute(x):
        if not x and function in VANISHING:
            return Fraction(0)
        if not is_finite(x):
            return getattr(mp, function)(x)
        length = abs(size(x)) if x else 0
        if length > 3000 or (length > 60 and function not in ("log", "atan") and size(x) > 0):
            raise TooBig(function)
        # sin(1e-100) differs from 1e-100 in the 200th digit only.
        if length > 60 and function != "log":
            need(3 * length)
        return getattr(mp, function)(inexact(x))

    return compute


VANISHING = ("sin", "tan", "asin", "atan", "sinh", "tanh", "asinh", "atanh")


def hyperbolic(name_of: str):
    """cosh and others from powers of e, so that cosh 1000 and sinh 1000 are not equal."""

    def compute(x):
        grown = transcendental("exp")(x)
        shrunk = transcendental("exp")(-x)
        cosh = divide(add(grown, shrunk), TWO)
        sinh = divide(add(grown, -shrunk), TWO)
        if name_of == "cosh":
            return cosh
        return sinh if name_of == "sinh" else divide(sinh, cosh)

    return compute


def inverse_tanh(x):
    """Raises TooBig beyond ±1, where the sign of the imaginary part depends on the formula."""
    if not mp.im(x) and abs(x) > 1:
        raise TooBig("on a branch cut")
    return transcendental("atanh")(x)


def inverse_coth(x):
    return inverse_tanh(divide(Fraction(1), x))


def reciprocal(function: Callable):
    """1 over a function."""

    def compute(x):
        return divide(Fraction(1), function(x))

    return compute


def gamma(x):
    return factorial(add(x, Fraction(-1)))


def cis(x):
    """cos x + i sin x"""
    return transcendental("exp")(multiply(mp.mpc(0, 1), x))


def zeta(x):
    if mp.im(x) or not abs(x) < 1000 or x == 1 or mp.prec > 2 * MAX_PRECISION_OF_POINT:
        raise TooBig("zeta")
    return mp.zeta(inexact(x))


TABLE = {"\\" + function: transcendental(function) for function in FUNCTIONS}
TABLE |= {
    "+": add,
    "negative": operator.neg,
    "*": multiply,
    "/": divide,
    ":": divide,
    "\\frac": divide,
    "#": remainder,
    "^": power,
    "!": factorial,
    "!!": double_factorial,
    "\\sqrt": root,
    "\\binom": binomial,
    "\\abs": abs,
    "\\lvert": abs,
    "\\floor": floor,
    "\\lfloor": floor,
    "\\ceil": ceiling,
    "\\lceil": ceiling,
    "\\gcd": gcd,
    "\\lcm": lcm,
    "\\max": largest,
    "\\min": smallest,
    "\\log": logarithm,
    "\\lg": decimal_logarithm,
    "\\sinh": hyperbolic("sinh"),
    "\\cosh": hyperbolic("cosh"),
    "\\tanh": hyperbolic("tanh"),
    "\\sec": reciprocal(transcendental("cos")),
    "\\csc": reciprocal(transcendental("sin")),
    "\\cot": reciprocal(transcendental("tan")),
    "\\sech": reciprocal(hyperbolic("cosh")),
    "\\csch": reciprocal(hyperbolic("sinh")),
    "\\coth": reciprocal(hyperbolic("tanh")),
    "\\atanh": inverse_tanh,
    "\\acoth": inverse_coth,
    "\\det": determinant,
    "\\Gamma": gamma,
    "\\cis": cis,
    "\\zeta": zeta,
}
CONSTANTS = {
    "i": lambda: mp.mpc(0, 1),
    "e": lambda: +mp.e,
    "\\pi": lambda: +mp.pi,
    "\\infty": lambda: mp.inf,
    "%": lambda: Fraction(1, 100),
    "°": lambda: mp.pi / 180,
}


# --- points ---


class Range(NamedTuple):
    """Where the variables lie at one point: between low and high, and for those that stand for
    integers between the other two. signs: "+", "-", or "±" for one of each."""

    low: float
    high: float
    low_integer: int
    high_integer: int
    signs: str
    integers_only: bool = False


# Two neighbours have variables in opposite orders, and of opposite signs where they are mixed.
RANGES = [
    Range(1.2, 7, 2, 9, "+"),
    Range(0.02, 1.1, 1, 8, "+"),
    Range(0.3, 4, 2, 9, "±"),
    Range(0.5, 9, 2, 9, "±"),
    Range(20, 3000, 10, 40, "+"),
    Range(0.2, 60, 5, 30, "+"),
    Range(1e4, 1e7, 10**4, 10**6, "±"),
    Range(1e4, 1e7, 10**4, 10**6, "±"),
    Range(0.3, 6, 2, 9, "-"),
    Range(1, 2, 10, 40, "+", integers_only=True),
    Range(1, 2, 2, 9, "+", integers_only=True),
    Range(1, 2, 2, 30, "-", integers_only=True),
]
# Where a function has kinks or steps, variables are also drawn from many narrow ranges that cover
# this one, and those that stand for integers take all values from 1 to the number of ranges.
KINKS = 32
KINK_RANGE = Range(-12, 12, 1, KINKS, "+")
# One more point, at which variables that may be complex are.
COMPLEX = len(RANGES) + KINKS
COMPLEX_LETTERS = "zw"
# Letters of which everybody thinks as integers; the first three are as often even as odd together.
INTEGERS = "nkmjlNKMᚠᚡᚢᚣᚤᚥ"


class Point(NamedTuple):
    """The values of all variables. index: that of its range."""

    index: int

    @property
    def range(self) -> Range:
        return RANGES[self.index % len(RANGES)]

    @property
    def is_positive(self) -> bool:
        return self.index < len(RANGES) and self.range.signs == "+"

    def value(self, text: str):
        """The value of a variable."""
        if self.index == COMPLEX and text[:1] in COMPLEX_LETTERS:
            draw = self.draw(text)
            return mp.mpc(2 + draw % 4096 / mp.mpf(1024), 1 + (draw >> 12) % 4096 / mp.mpf(4096))
        if len(RANGES) <= self.index < COMPLEX:
            return self.value_among_kinks(text)
        # Draws are shared by two neighbours: one has the variables in the order of the draws, the
        # other in the opposite order.
        pair, is_second = divmod(self.index, 2)
        draw = self.draw(f"{pair} {text}")
        share = Fraction(draw % 4096, 4096)
        if is_second:
            share = 1 - share
        bounds = self.range
        is_integer = text[:1] in INTEGERS or bounds.integers_only
        if is_integer:
            x = self.integer(text, share, draw)
        elif bounds.high > 100:
            x = Fraction(
                round(1024 * bounds.low * (bounds.high / bounds.low) ** float(share)), 1024
            )
        else:
            x = Fraction(round(1024 * (bounds.low + (bounds.high - bounds.low) * share)), 1024)

        is_negative = bounds.signs == "-"
        if bounds.signs == "±":
            is_negative = (draw >> 20) % 2 != is_second
        return -x if is_negative else x

    def value_among_kinks(self, text: str) -> Fraction:
        """A value in the narrow range that this point has for this variable."""
        draw = self.draw(f"kinks {text}")
        place = ((self.index - len(RANGES)) * (2 * draw + 1) + (draw >> 8)) % KINKS
        if text[:1] in INTEGERS:
            return Fraction(1 + place)
        # With integers only, as operations of fractions are slow.
        share = self.draw(f"{self.index} {text}") % 1024
        low, high = KINK_RANGE[:2]
        parts = 1024 * KINKS
        return Fraction(low * parts + (high - low) * (1024 * place + share), parts)

    def integer(self, text: str, share: Fraction, draw: int) -> Fraction:
        """An integer that is even at half of the points, for several letters independently."""
        low = self.range.low_integer
        high = self.range.high_integer
        x = round(low + (high - low) * share)
        rank = INTEGERS.find(text[:1])
        is_odd = (self.index >> rank) % 2 if 0 <= rank < 3 else (draw >> 21) % 2
        if self.index % 2 and not 0 <= rank < 3:
            is_odd = not is_odd
        if x % 2 != is_odd:
            x += 1 if x < high else -1
        return Fraction(x)

    def draw(self, text: str) -> int:
        digest = hashlib.blake2b(text.encode("utf-8", "replace"), key=Work.salt, digest_size=6)
        return int.from_bytes(digest.digest())


ANYWHERE = Point(0)


# --- evaluation ---


def evaluate(node: Node, point: Point = ANYWHERE):
    """The value at a point: a fraction or a number of mpmath; NaN where there is none.

    Raises TooBig if it is too costly.
    """
    Work.steps += 1
    if Work.steps > MAX_STEPS:
        raise TooBig("too many steps")
    kind = node.operation
    if kind == "number":
        return node.parts[0]
    if kind == "constant":
        return CONSTANTS[node.parts[0]]()
    if kind in ("name", "whole"):
        return value_of_name(node, point)

    numbers = [evaluate(part, point) for part in node.parts]
    longest = 0
    is_exact = True
    for x in numbers:
        if type(x) is Fraction:
            longest = max(longest, bits(x))
            if longest > MAX_BITS:
                raise TooBig(kind)
        else:
            is_exact = False
            if mp.isnan(x):
                return mp.nan
    Work.steps += cost(kind, longest, is_exact)
    try:
        x = TABLE[kind](*numbers)
        Work.steps += (bits(x) // 1500) ** 2
    except (ArithmeticError, TypeError, ValueError, AttributeError):
        return mp.nan
    if isinstance(x, mp.mpc):
        return complex_value(x, numbers, node, point)
    return x


def complex_value(x, numbers: list, node: Node, point: Point):
    """A value of a node; NaN for the root of a negative variable, which depends on the branch."""
    if not mp.im(x):
        return mp.re(x)
    is_branch = not any(mp.im(y) for y in numbers)
    if is_branch and not point.is_positive and has_names(node):
        return mp.nan
    return x


def cost(kind: str, longest: int, is_exact: bool) -> int:
    """Steps that an operation takes: inexact functions are slow, and so are long numbers.

    longest: bits of the longest fraction. is_exact: are there only fractions?
    """
    steps = 0
    if is_exact:
        # Fractions are reduced, which takes a time that is quadratic in their length.
        steps = (longest // 1500) ** 2
        if kind in EXACT:
            return steps
    words = 1 + mp.prec // 256
    if kind in ("+", "*", "negative"):
        return steps + words
    if kind in COSTS:
        return steps + COSTS[kind] * words**2
    return steps + int(12 * words**1.5)


# Operations that keep fractions exact, and those that are slower than most.
EXACT = {"+", "*", "/", "\\frac", ":", "negative", "\\abs", "\\lvert", "\\max", "\\min"}
COSTS = {"!": 60, "!!": 60, "\\binom": 100, "\\Gamma": 60, "\\zeta": 400, "\\det": 500}


def value_of_name(node: Node, point: Point):
    text = node.parts[0]
    if len(node.parts) == 1:
        key = (text, point.index)
        if key not in Work.values:
            Work.values[key] = point.value(text)
        return Work.values[key]
    texts = []
    for part in node.parts[1:]:
        x = evaluate(part, point)
        if is_nan(x):
            return mp.nan
        texts.append(digits_of(x))
    return point.value(f"{text}{texts}")


def digits_of(x) -> str:
    """A number as text, without the last digits, which may be wrong."""
    if type(x) is Fraction:
        return str(x)
    decimals = int((mp.prec - SLACK) * 0.3)
    if is_finite(x) and not mp.im(x):
        x = mp.re(x)
        nearest = mp.nint(x)
        if nearest and abs(x - nearest) < abs(x) * mp.ldexp(1, SLACK - mp.prec):
            return str(int(nearest)) if mp.mag(x) < mp.prec else mp.nstr(x, decimals)
    return mp.nstr(x, decimals)


def constant(node: Node):
    """The value of an expression without variables, None if it has some.

    Raises TooBig if it is too costly.
    """
    if has_names(node):
        return None
    return at_precision(FIRST_BITS, node)


def at_precision(precision: int, node: Node, point: Point = ANYWHERE):
    """The value with so many bits."""
    previous = mp.prec
    mp.prec = precision
    try:
        return evaluate(node, point)
    finally:
        mp.prec = previous


# --- equality ---


def are_equal(a: Node, b: Node) -> bool:
    """Are two expressions equal at all points at which both have a value, at least at two?"""
    if a == b:
        return True
    if is_written(a) or is_written(b):
        return are_written_alike(a, b)
    if not has_names(a) and not has_names(b):
        return agree_at(ANYWHERE, a, b) is True
    if not have_same_wholes(a, b):
        return False
    agreements = 0
    for point in points_for(a, b):
        verdict = agree_at(point, a, b)
        if verdict is False:
            return False
        agreements += verdict is True
    return agreements >= 2


def are_written_alike(a: Node, b: Node) -> bool:
    r"""The same signs with equal parts in the same order: x + \int f is not \int f + x.

    Of a part without a sum or an integral only the value counts.
    """
    if a.operation != b.operation or len(a.parts) != len(b.parts):
        return False
    sign = a.parts[0]
    other_sign = b.parts[0]
    # \frac and / are one sign, as \lvert and \abs are.
    if TABLE.get(sign, sign) != TABLE.get(other_sign, other_sign):
        return False
    return all(map(are_equal, a.parts[1:], b.parts[1:]))


def have_same_wholes(a: Node, b: Node) -> bool:
    """Is each differential, bar and unknown function equally often in both?

    f(x) - f(x) is not 0, nor dx + dx 2 dx. The y' of dy/dx may be a letter in the other one.
    """
    if not (has_whole(a) or has_whole(b)):
        return True
    found = names_in(a)
    others = names_in(b)
    texts = set()
    for kind, text in found + others:
        if kind == "whole":
            texts.add(text)
    counts = collections.Counter(text for _, text in found if text in texts)
    other_counts = collections.Counter(text for _, text in others if text in texts)
    return counts == other_counts


def has_whole(node: Node) -> bool:
    if node.operation == "whole":
        return True
    return any(isinstance(part, Node) and has_whole(part) for part in node.parts)


def names_in(node: Node) -> list[tuple[str, str]]:
    """All names and wholes in an expression: which of both, and its text with its arguments."""
    found = []
    nodes = [node]
    while nodes:
        node = nodes.pop()
        parts = [part for part in node.parts if isinstance(part, Node)]
        nodes += parts
        if node.operation in ("name", "whole"):
            arguments = [text_of_argument(part) for part in parts]
            found.append((node.operation, " ".join([node.parts[0], *arguments])))
    return found


def text_of_argument(node: Node) -> str:
    """The value of an argument at some point, so that f(x + 1) is f(1 + x)."""
    try:
        return digits_of(at_precision(FIRST_BITS, node))
    except TooBig:
        if Work.steps > MAX_STEPS:
            raise
        return repr(node)


def points_for(*nodes: Node) -> list[Point]:
    """More points for what has steps or kinks: these may lie between others."""
    operations = set()
    for node in nodes:
        operations |= operations_of(node)
    if not operations & (STEPS | KINKED | CUT):
        return [Point(index) for index, one in enumerate(RANGES) if not one.integers_only]
    points = [Point(index) for index in range(len(RANGES) + KINKS)]
    if operations & KINKED:
        points.append(Point(COMPLEX))
    return points


STEPS = {"\\floor", "\\lfloor", "\\ceil", "\\lceil", "#", "\\gcd", "\\lcm", "!", "!!", "\\binom"}
# Functions that are real on a short range only, which needs points of its own.
CUT = {"\\atanh"}
FACTORIALS = {"!", "\\binom"}
KINKED = {"\\abs", "\\lvert", "\\max", "\\min"}


def operations_of(node: Node) -> set[str]:
    found = {node.operation}
    for part in node.parts:
        if isinstance(part, Node):
            found |= operations_of(part)
    return found


def agree_at(point: Point, a: Node, b: Node) -> bool | None:
    """Are they equal at a point? None if it cannot be said there.

    Raises TooBig if a constant is too costly.
    """
    Work.needed = 0
    try:
        x = at_precision(FIRST_BITS, a, point)
        if not point.is_positive and is_nan(x):
            return None
        y = at_precision(FIRST_BITS, b, point)
    except TooBig:
        if point is ANYWHERE or Work.steps > MAX_STEPS:
            raise
        return None
    if are_exact(x, y):
        return x == y
    if is_nan(x) or is_nan(y):
        # Where all variables are positive, both must have a value, or none; but (n - k)! has none
        # where n choose k is zero.
        is_one_sided = is_nan(x) != is_nan(y)
        if not is_one_sided or not point.is_positive:
            return None
        has_factorials = (operations_of(a) | operations_of(b)) & FACTORIALS
        return None if has_factorials else False
    if not (is_finite(x) and is_finite(y)):
        return bool(x == y)

    # A first look at 30 digits: most pairs differ in these. At two points all digits are compared.
    if Work.needed < FIRST_BITS // 2:
        error = abs(inexact(x) - inexact(y))
        if error > mp.ldexp(max(abs(inexact(x)), abs(inexact(y)), mp.ldexp(1, -99)), -99):
            return False
        if point.index > 1:
            return True
    return agree_closely(point, a, b, x, y)


def agree_closely(point: Point, a: Node, b: Node, x_rough, y_rough) -> bool:
    """The same with so many digits that no rounding can hide a difference.

    x_rough, y_rough: their values in the first digits. At most points fewer digits than for a
    constant will do, as each point has to agree. Raises TooBig if a constant is too costly.
    """
    # One of them may be a fraction, all of whose bits count.
    length = max(bits(x_rough), bits(y_rough))
    limit = MAX_PRECISION if point is ANYWHERE else MAX_PRECISION_OF_POINT
    precision = FIRST_BITS
    while precision < min(2 * max(Work.needed, length) + FIRST_BITS, limit):
        precision = 2 * max(Work.needed, length) + FIRST_BITS
        if precision > limit:
            if point is ANYWHERE:
                raise TooBig("digits")
            precision = limit
        x_rough = at_precision(precision, a, point)
        y_rough = at_precision(precision, b, point)

    # What changes with more digits is the error of the fewer ones, so that of more is known.
    precision += FIRST_BITS
    x = at_precision(precision, a, point)
    y = at_precision(precision, b, point)
    with mp.workprec(precision):
        errors = [abs(inexact(x) - inexact(x_rough)), abs(inexact(y) - inexact(y_rough))]
        errors.append(mp.ldexp(abs(inexact(x)), FIRST_BITS - precision))
        difference = abs(inexact(x) - inexact(y))
        return bool(difference <= mp.ldexp(max(errors), SLACK - FIRST_BITS))


def is_constant_ratio(a: Node, b: Node, positive: bool) -> bool:
    """Is a/b the same number at all points, not zero, and if asked for positive?"""
    if not have_same_wholes(a, b):
        return False
    ratio = operation("/", a, b)
    first = None
    seen = 0
    for point in points_for(a, b):
        try:
            x = at_precision(2 * FIRST_BITS, ratio, point)
        except TooBig:
            if Work.steps > MAX_STEPS:
                raise
            continue
        if mp.isnan(x):
            continue
        if not x or not is_finite(x) or positive and (mp.im(x) or mp.re(x) < 0):
            return False
        seen += 1
        if first is None:
            first = x
        if are_exact(x, first):
            if x != first:
                return False
        elif abs(inexact(x) - inexact(first)) > abs(inexact(first)) * mp.ldexp(1, -FIRST_BITS // 2):
            return False
    return seen >= 2


# --- linear expressions ---


class Linear(NamedTuple):
    """slope * x + offset; without an x it is a constant."""

    x: Node | None
    slope: Fraction
    offset: Node


def linear(node: Node) -> Linear | None:
    """A linear expression in one letter for a real number, None for any other."""
    if not has_names(node):
        return Linear(None, Fraction(0), node)
    if node.operation in ("name", "whole"):
        is_real = node.parts[0] not in COMPLEX_LETTERS
        return Linear(node, Fraction(1), number(Fraction(0))) if is_real else None
    if node.operation not in ("+", "negative", "*", "/", "\\frac"):
        return None
    found = [linear(part) for part in node.parts]
    letters = {part.x for part in found if part is not None and part.x is not None}
    if None in found or len(letters) > 1:
        return None
    x = letters.pop()
    if node.operation == "+":
        slope = sum(part.slope for part in found)
        return Linear(x, slope, operation("+", *(part.offset for part in found)))

    # A product with constants, or a quotient by one.
    slope = Fraction(-1 if node.operation == "negative" else 1)
    for k, part in enumerate(found):
        factor = part.slope if part.x is not None else constant(part.offset)
        if not factor or type(factor) is not Fraction:
            return None
        is_divisor = node.operation in ("/", "\\frac") and k > 0
        if part.x is not None and (is_divisor or found.count(part) > 1):
            return None
        slope = slope / factor if is_divisor else slope * factor
    inner = next(part for part in found if part.x is not None)
    ratio = number(slope / inner.slope)
    return Linear(x, slope, operation("*", ratio, inner.offset))


def mentions(node: Node, x: Node) -> bool:
    return node == x or any(isinstance(part, Node) and mentions(part, x) for part in node.parts)
