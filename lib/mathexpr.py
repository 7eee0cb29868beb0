r"""
Mathematical answers: tokens -> values -> equality.

    >>> judge(r"\frac{1}{2}\text{ cm}", "0.5")
    True

A parser of our own computes the value of an answer while it reads it, so nothing that a model wrote
reaches eval or sympify. The value is exact as long as it is rational, else it has 220 digits. An
expression with variables has its values at four random points, which depend on the names of the
variables alone; two expressions are equal if they are at these points. Long numbers, powers and
factorials are refused before they are computed; a time limit is up to the caller.

In this order: arithmetic, values, the parser, relations, sets, equality, and `judge`, which
compares two texts. lib/latex.py has the step before, from text to tokens.
"""

import contextlib
import functools
import itertools
import math
import operator
import re
import zlib
from fractions import Fraction
from typing import NamedTuple

import mpmath
import sympy

from lib.latex import FUNCTIONS, Unparsed, clean, tokenize

# A number with more bits, and a power that would have more, is refused.
MAX_BITS = 64_000
MAX_FACTORIAL = 4096
MAX_MEMBERS = 30

TWO = Fraction(2)

# A context of our own, so that nobody else's precision changes.
mp = mpmath.MPContext()
mp.dps = 220


# --- arithmetic at one point: numbers are fractions where possible, else mpmath's ---


def are_exact(*numbers) -> bool:
    return all(isinstance(x, Fraction) for x in numbers)


def bits(x) -> int:
    """The length of a number in binary digits."""
    if isinstance(x, Fraction):
        return x.numerator.bit_length() + x.denominator.bit_length()
    if mp.isnormal(x):
        return abs(mp.mag(x))
    return 0


def subtract(a, b):
    return a + -b


def divide(a, b):
    return a * (1 / b)


def remainder(a, b):
    return a - b * floor(divide(a, b))


def power(base, exponent):
    if abs(mp.convert(exponent)) * (bits(base) + 1) > MAX_BITS:
        raise Unparsed("power too big")
    if are_exact(base, exponent) and exponent.denominator == 1:
        return base ** int(exponent)

    # An odd root of a negative number is real: the cube root of -8 is -2.
    is_odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 == 1
    if is_odd_root and not mp.im(base) and mp.re(base) < 0:
        return mp.power(-base, exponent) * (-1) ** exponent.numerator
    return mp.power(base, exponent)


def root(x, degree=TWO):
    return power(x, 1 / degree)


@functools.lru_cache(256)
def factorial(n):
    if not abs(mp.convert(n)) < MAX_FACTORIAL:
        raise Unparsed("factorial too big")
    if isinstance(n, Fraction) and n.denominator == 1 and n >= 0:
        return Fraction(math.factorial(int(n)))
    return mp.gamma(n + 1)


def binomial(n, k):
    return factorial(n) / (factorial(k) * factorial(n - k))


def floor(x):
    # A number that was computed in 220 digits may lie a little below the integer that it is.
    return Fraction(int(mp.floor(mp.re(x) + mp.mpf("1e-50"))))


def ceiling(x):
    return -floor(-x)


def gcd(*numbers):
    numerator = math.gcd(*(x.numerator for x in numbers))
    denominator = math.lcm(*(x.denominator for x in numbers))
    return Fraction(numerator, denominator)


def lcm(*numbers):
    return 1 / gcd(*(1 / x for x in numbers))


def largest(*numbers):
    return max(numbers, key=mp.re)


def smallest(*numbers):
    return min(numbers, key=mp.re)


def determinant(*entries):
    """entries: those of a square matrix, row by row."""
    n = math.isqrt(len(entries))
    rows = [entries[start : start + n] for start in range(0, len(entries), n)]
    return mp.det(rows)


def mpmath_function(name: str):
    """mpmath's function of this name, with no value at huge numbers: exp(10^3000) takes seconds."""

    def compute_mild(x):
        if abs(x) < 1e40:
            return getattr(mp, name)(x)
        return mp.nan

    return compute_mild


TABLE = {"\\" + name: mpmath_function(name) for name in FUNCTIONS}
TABLE |= {
    "+": operator.add,
    "-": subtract,
    "*": operator.mul,
    "/": divide,
    ":": divide,
    "\\frac": divide,
    "#": remainder,
    "^": power,
    "!": factorial,
    "\\sqrt": root,
    "\\binom": binomial,
    "\\abs": abs,
    "\\lvert": abs,
    "\\lfloor": floor,
    "\\lceil": ceiling,
    "\\gcd": gcd,
    "\\lcm": lcm,
    "\\max": largest,
    "\\min": smallest,
    "\\log": mp.log,
    "\\lg": mp.log10,
    "\\det": determinant,
}
CONSTANTS = {
    "i": mp.mpc(0, 1),
    "e": mp.e,
    "\\pi": mp.pi,
    "\\infty": mp.inf,
    "%": Fraction(1, 100),
    "°": mp.pi / 180,
}


# --- values ---


class Value(NamedTuple):
    """What a text means: a number, a collection, or a relation.

    A number has `numbers`: one, or with variables one per point, NaN where it has no value;
    `digits`, the number of significant digits if it is written as a decimal; and a `unit`: cm, %,
    °. A unit that starts with _ must not be left out (_8 is the base of 52_8), one with ≡ is a
    modulus.

    A collection has `items` and `brackets`: "" (a list without brackets), "{}" (a set), "()", "[)",
    ... (a tuple or an interval), "⟦⟧" (a matrix, or a row of one).

    A relation has `signs`, the `sides` between which they stand, and the side that is its `name`:
    the x of x = 5 and x < 5. If it gives its name a value, it has the fields of this value as well.
    """

    numbers: list | None = None
    digits: int = 0
    unit: str = ""
    brackets: str | None = None
    items: list | tuple = ()
    signs: list | tuple = ()
    sides: list | tuple = ()
    name: "Value | None" = None


def collection(items: list[Value], brackets: str = "") -> Value:
    """A collection; but a single item in brackets is that item."""
    if len(items) == 1:
        return items[0]
    return Value(brackets=brackets, items=items)


def members(value: Value) -> list[Value]:
    """The members of a list or set, and of those in it; any other value is its own only member."""
    if value.brackets not in ("", "{}"):
        return [value]
    found = []
    for item in value.items:
        found += members(item)
    return found


def is_tuple(value: Value) -> bool:
    return bool(value.brackets) and value.brackets[0] in "([⟦"


def negative(value: Value) -> Value:
    numbers = value.numbers and [-x for x in value.numbers]
    items = [negative(item) for item in value.items]
    return value._replace(numbers=numbers, items=items)


def unit_as_factor(value: Value) -> Value:
    """50% as 0.5, and 5 g as the product of 5 and g."""
    if not value.unit:
        return value
    product = compute("*", value._replace(unit=""), variable(value.unit))
    return product._replace(digits=value.digits)


def variable(name: str) -> Value:
    """A constant, or a random fraction for each of four points, which depends on the name only.

    They are positive at the first two points, and negative at the last.
    """
    if name in CONSTANTS:
        return Value([CONSTANTS[name]])
    numbers = []
    for point in range(4):
        draw = zlib.crc32(f"{name} {point}".encode())
        if point % 2 == 1:
            number = Fraction(draw % 600 + 1900, 297)
        else:
            number = Fraction(draw % 2200 + 300, 997)
        is_negative = point == 3 or (point == 2 and draw >> 16 & 1)
        numbers.append(-number if is_negative else number)
    return Value(numbers)


def unknown_function(name: str, argument: Value) -> Value:
    """f(x), where nothing is known of f: a random number for each value of its argument."""
    columns = []
    for item in argument.items or [argument]:
        if not item.numbers:
            raise Unparsed("argument of a function")
        columns.append(item.numbers * (4 // len(item.numbers)))

    numbers = []
    for point, arguments in enumerate(zip(*columns)):
        texts = [str(x) if are_exact(x) else mp.nstr(x, 99) for x in arguments]
        numbers.append(variable(f"{name}{texts}").numbers[point])
    return Value(numbers)


def compute(name: str, *arguments: Value) -> Value:
    """A function of numbers, point by point; a factor before a tuple multiplies its items."""
    if name == "*" and is_tuple(arguments[1]):
        factor, vector = arguments
        return vector._replace(items=[compute("*", factor, item) for item in vector.items])

    columns = [unit_as_factor(argument).numbers for argument in arguments]
    if name not in TABLE:
        raise Unparsed(name)
    for column in columns:
        if not column or max(map(bits, column)) > MAX_BITS:
            raise Unparsed(name)

    # A constant has the same number at all points.
    points = max(map(len, columns))
    columns = [column * (points // len(column)) for column in columns]
    return Value([compute_at(name, point, numbers) for point, numbers in enumerate(zip(*columns))])


def compute_at(name: str, point: int, numbers: tuple):
    """The value at one point, NaN if there is none."""
    try:
        x = TABLE[name](*numbers)
        # A root of a negative variable depends on the branch: such points do not count.
        is_branch = not are_exact(x) and mp.im(x) and not any(map(mp.im, numbers))
    except (ArithmeticError, TypeError, ValueError, AttributeError):
        return mp.nan
    if is_branch and point >= 2:
        return mp.nan
    return x


# --- the parser ---

CLOSERS = {
    "": [""],
    "(": [")", "]"],
    "[": [")", "]"],
    "{": ["}"],
    "\\{": ["\\}"],
    "⟦": ["⟧"],
    "\\lvert": ["\\rvert"],
    "\\lfloor": ["\\rfloor"],
    "\\lceil": ["\\rceil"],
}
SEPARATORS = (",", "&", ";", "\\cup")
RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "~", "\\in")

# How tightly a token binds what follows to the operand before it. 2x and 2 sin x are products
# without a sign; tokens that are not in the table are operands (IMPLIED).
END, SET, SUM, PRODUCT, FUNCTION, IMPLIED, POWER = range(7)
LEVELS = {
    "@": SET,
    "\\cap": SET,
    "\\setminus": SET,
    "+": SUM,
    "-": SUM,
    "*": PRODUCT,
    "/": PRODUCT,
    ":": PRODUCT,
    "#": PRODUCT,
}
LEVELS |= dict.fromkeys("^!%°_'", POWER)
LEVELS |= dict.fromkeys(CLOSERS, FUNCTION)
LEVELS |= dict.fromkeys(["\\" + name for name in FUNCTIONS], FUNCTION)
LEVELS |= dict.fromkeys(itertools.chain(*CLOSERS.values()), END)
LEVELS |= dict.fromkeys(SEPARATORS + RELATIONS, END)

CONDITION = r"\b(?:or|at (?:most|least)|(?:even|odd|prime|positive|negative|divisible|is)%s)\b"
CONDITION_ANYWHERE = re.compile(CONDITION % "")
CONDITION_AT_END = re.compile(CONDITION % "(?=@?$)")

TWO_NUMBERS = re.compile(r"(?<![\w.^}])[\d.]+ \d")


@functools.lru_cache(256)
def parse(text: str) -> Value:
    r"""The value of a cleaned text. \pm gives a list of both values.

    Raises Unparsed if it is not mathematics, or too costly; ArithmeticError, ValueError and
    RecursionError occur as well.
    """
    if TWO_NUMBERS.search(text):
        raise Unparsed("two numbers side by side")
    readings = [
        text.replace("\\pm", "+").replace("\\mp", "-"),
        text.replace("\\pm", "-").replace("\\mp", "+"),
    ]
    values = [Parser(tokenize(reading)).bracket("") for reading in dict.fromkeys(readings)]
    return collection(joint(values))


def binding(token: str) -> int:
    if token.startswith(("@", "_")):
        token = token[0]
    return LEVELS.get(token, IMPLIED)


class Parser:
    """Reads tokens from left to right. Each method reads one kind of thing, and computes it."""

    def __init__(self, tokens: list[str]):
        self.tokens = [*tokens, ""]
        self.position = 0

    def peek(self) -> str:
        return self.tokens[self.position]

    def take(self) -> str:
        token = self.tokens[self.position]
        self.position += 1
        return token

    def bracket(self, opener: str) -> Value:
        """A list up to the end of its bracket. The opener "" stands for the whole text."""
        items = []
        separators = set()
        closer = ","
        if self.peek() in CLOSERS[opener]:
            closer = self.take()
        while closer in SEPARATORS:
            separators.add(closer)
            items.append(self.relation())
            closer = self.take()
        if closer not in CLOSERS[opener]:
            raise Unparsed("brackets")

        if "\\cup" in separators:
            return combine("\\cup", *items)
        if ";" not in separators:
            items = joint(items)
        if opener in TABLE:
            return compute(opener, *items)
        return collection(items, opener[-1:] + closer[-1:])

    def relation(self) -> Value:
        """An expression, or several with signs of relation between them."""
        sides = []
        texts = []
        signs = []
        while True:
            start = self.position
            sides.append(self.expression())
            texts.append("".join(self.tokens[start : self.position]))
            if self.peek() not in RELATIONS:
                break
            signs.append(self.take())
        if not signs:
            return sides[0]
        return make_relation(sides, texts, signs)

    def expression(self, lowest: int = END) -> Value:
        """An operand, and all that binds to it more tightly than `lowest`."""
        value = self.operand(lowest)
        while True:
            level = binding(self.peek())
            if level <= lowest:
                return value
            sign = "*"
            if level not in (FUNCTION, IMPLIED):
                sign = self.take()

            if sign[0] in "_'" and not value.numbers:
                raise Unparsed("an index of a set")
            if value.unit.startswith("≡"):
                raise Unparsed("more after a modulus")
            if sign[0] in "%°@_'":
                value = with_unit(value, sign)
            elif sign == "!":
                value = compute(sign, value)
            elif level == SET:
                value = combine(sign, value, self.expression(level))
            else:
                value = compute(sign, value, self.expression(level))

    def operand(self, lowest: int) -> Value:
        """A number, a bracket, a fraction, a function, a variable or a word.

        A sign before it belongs to the product that follows: -2x is -(2x).
        """
        token = self.take()
        if token in ("+", "-"):
            value = self.expression(max(lowest, PRODUCT))
            return negative(value) if token == "-" else value
        if token and token in CLOSERS:
            return self.bracket(token)
        if re.match(r"\.?\d", token):
            return number(token)
        if token in ("\\frac", "\\binom"):
            return compute(token, self.operand(POWER), self.operand(POWER))
        if token == "\\det" and self.peek() == "⟦":
            matrix = self.operand(POWER)
            entries = [row.items for row in matrix.items]
            return compute(token, *itertools.chain(*entries))
        if token[1:] in FUNCTIONS:
            return self.function(token)
        return self.name(token)

    def function(self, name: str) -> Value:
        """sin x, sin^2 x, sin(x), log_2 8, sqrt_3 x, max(a, b)"""
        base = []
        if self.peek().startswith("_"):
            base = [parse(self.take()[1:])]
        exponent = None
        if self.peek() == "^":
            self.take()
            exponent = self.operand(POWER)

        # Without a bracket the argument of sin is a product, which ends before another function.
        if name == "\\sqrt" or self.peek() in CLOSERS:
            argument = self.expression(POWER)
        else:
            argument = self.expression(FUNCTION)
        value = compute(name, *(argument.items or [argument]), *base)
        if exponent is None:
            return value
        return compute("^", value, exponent)

    def name(self, name: str) -> Value:
        """A variable or a word, with its indices and primes."""
        if not name.strip("\\@")[:1].isalpha() or name in LEVELS:
            raise Unparsed("no operand")
        while self.peek().startswith(("_", "'")):
            name += re.sub(r"[@{}\s]", "", self.take())
        if name.strip("'") == "f" and self.peek() == "(":
            return unknown_function(name, self.operand(POWER))
        if name.startswith("@"):
            name = name.strip("@ ").lower()
        return variable(name)


def number(token: str) -> Value:
    digits = 0
    if re.search(r"\.\d|[eE]", token):
        significant = re.sub(r"^[0.]*|[,.]|[eE].*", "", token)
        digits = len(significant)
    return Value([Fraction(token.replace(",", ""))], digits)


def with_unit(value: Value, token: str) -> Value:
    """A value and its first unit, base, condition or prime."""
    if value.unit:
        return value
    unit = re.sub(r"[@{}\s.]", "", token)
    # 4 prime numbers are 4, but "n is odd" is not n, and "3 or more" is not 3.
    has_variables = value.numbers and len(value.numbers) > 1
    condition = CONDITION_ANYWHERE if has_variables else CONDITION_AT_END
    if condition.search(token):
        unit = "_" + unit
    return value._replace(unit=unit)


# --- relations ---


def make_relation(sides: list[Value], texts: list[str], signs: list[str]) -> Value:
    """sides, and their texts without blanks, with signs between them."""
    named = [is_name(text) for text in texts]

    # 3 > x is x < 3.
    if signs[0].startswith(">"):
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
        sides = sides[::-1]
        named = named[::-1]

    name = sides[0]
    if True in named:
        name = sides[named.index(True)]
    value = value_of_name(sides, named, signs)
    return value._replace(signs=signs, sides=sides, name=name)


def is_name(text: str) -> bool:
    """Can an equation give it a value: x, f(2), AB, |AB|, dy/dx, angle APC?"""
    rest = re.sub(
        r"_\s*(?:{[^{}]*}|.)|\^{-1}(?=\()|(?<=[a-zA-Z'}])\([^()]*\)|\\(?:lim|sum|int|prod).*",
        "",
        text,
    )
    if re.search(r"\\(?:pi|infty|sqrt|empty)", rest):
        return False
    return re.fullmatch(r"[a-zA-Z\s\\:/,(){}'@\[\]⟦⟧]*", rest) is not None


def value_of_name(sides: list[Value], named: list[bool], signs: list[str]) -> Value:
    """The value that a relation gives to its name, an empty one if it gives none."""
    kinds = set(signs)
    if kinds <= {"=", "~", "\\in"} and is_right(sides, named, signs):
        return last_exact_side(sides, named, signs)
    if named.count(True) != 1:
        return Value()
    k = named.index(True)

    # x != 5 is all real numbers but 5.
    if signs == ["!="]:
        return combine("\\setminus", parse("(-\\infty,\\infty)"), sides[1 - k])

    # 1 < x <= 2 is an interval, and x < 5 one without a lower end.
    if kinds <= {"<", "<="}:
        ends = [Value([-mp.inf]), *sides, Value([mp.inf])]
        signs = ["<", *signs, "<"]
        opener = "(" if signs[k] == "<" else "["
        closer = ")" if signs[k + 1] == "<" else "]"
        return collection([ends[k], ends[k + 2]], opener + closer)
    return Value()


def is_right(sides: list[Value], named: list[bool], signs: list[str]) -> bool:
    """An equation without a name must be right: 3 * 4 = 13 has no value."""
    if True in named or "~" in signs:
        return True
    return all(equal(sides[-1], side) for side in sides)


def last_exact_side(sides: list[Value], named: list[bool], signs: list[str]) -> Value:
    r"""x = 1 + 1 = 2 and |AB| = 2 \approx 2.1 have the value 2: the last side before an
    approximation that is not a name."""
    exact = len(sides)
    if "~" in signs:
        exact = signs.index("~") + 1
    values = [side for side, is_name in zip(sides[:exact], named) if not is_name]
    return values[-1] if values else sides[-1]


def joint(items: list[Value]) -> list[Value]:
    """x > 2 and x < 5 as one set; but x < 2 and x > 5, which is nowhere, are meant as two."""
    if len(items) < 2:
        return items
    for item in items:
        is_inequality = item.signs and set(item.signs) <= {"<", "<=", "!="}
        if not is_inequality or not equal(item.name, items[0].name):
            return items
    with contextlib.suppress(Unparsed):
        both = combine("\\cap", *items)
        # The empty set is a name, and so has numbers.
        if not both.numbers:
            return [both]
    return items


# --- sets ---

SYMPY_SETS = {
    "\\cup": sympy.Union,
    "\\cap": sympy.Intersection,
    "\\setminus": sympy.Complement,
}


def combine(sign: str, *sets: Value) -> Value:
    """A union, intersection or difference.

    Sets of real numbers are worked out by sympy: (0, 2) and [1, 3) unite to (0, 3). Of other sets
    the members are compared.
    """
    if sum(len(members(one)) for one in sets) > MAX_MEMBERS:
        raise Unparsed("sets too big")
    originals = {}
    try:
        regions = [region(one, originals) for one in sets]
    except Unparsed:
        return combine_members(sign, sets)
    return value_of_region(SYMPY_SETS[sign](*regions), originals)


def region(value: Value, originals: dict) -> sympy.Set:
    """A set of real numbers for sympy. originals: gets our value of each of sympy's numbers."""
    if value.items and not is_tuple(value):
        return sympy.Union(*[region(item, originals) for item in value.items])
    if len(value.items) > 2:
        raise Unparsed("not an interval")

    numbers = []
    for item in value.items or [value]:
        converted = real_number(item)
        originals.setdefault(converted, item)
        numbers.append(converted)
    if not value.items:
        return sympy.FiniteSet(*numbers)
    if numbers[0] > numbers[-1]:
        raise Unparsed("not an interval")
    return sympy.Interval(*numbers, value.brackets[0] == "(", value.brackets[1] == ")")


def real_number(value: Value):
    """A number for sympy."""
    numbers = unit_as_factor(value).numbers
    if not numbers or len(numbers) > 1:
        raise Unparsed("not one number")
    x = numbers[0]
    if mp.im(x) or mp.isnan(x) or bits(x) > MAX_BITS:
        raise Unparsed("not a real number")
    if mp.isinf(x):
        return mp.sign(x) * sympy.oo
    if isinstance(x, Fraction):
        return sympy.Rational(str(x))
    return sympy.Rational(mp.nstr(mp.re(x), 99))


def value_of_region(found: sympy.Set, originals: dict) -> Value:
    """sympy's set as a value of ours."""
    items = []
    for part in sympy.Union.make_args(found):
        if isinstance(part, sympy.Interval):
            opener = "(" if part.left_open else "["
            closer = ")" if part.right_open else "]"
            ends = [originals[part.start], originals[part.end]]
            items.append(collection(ends, opener + closer))
        else:
            items += [originals[x] for x in part]
    if not items:
        return variable("\\emptyset")
    return collection(items)


def combine_members(sign: str, sets: tuple[Value, ...]) -> Value:
    """A union, intersection or difference of sets that are not sets of real numbers."""
    first = members(sets[0])
    others = []
    for one in sets[1:]:
        others += members(one)
    if sign == "\\cup":
        return collection(first + others)

    # Z without {0} is a name: equal if it is written alike.
    if any(map(is_tuple, first + others)) or not all(one.items for one in sets):
        return variable(sign + str(sets))

    wanted = sign == "\\cap"
    return collection([x for x in first if is_answered(x, others, STRICT) == wanted])


# --- equality ---


class Rules(NamedTuple):
    """parity: the lenient reading of published tables. tolerance: an absolute error of numbers."""

    parity: bool = False
    tolerance: float | None = None


STRICT = Rules()
ROUNDING = mp.mpf("1e-200")
TINY = mp.mpf("1e-210")


def equal(gold: Value, answer: Value, rules: Rules = STRICT) -> bool:
    """Does the value `answer` answer `gold`?"""
    if are_all_relations(gold) and are_all_relations(answer):
        gold = as_assignments(gold)
        answer = as_assignments(answer)
    if gold.signs and answer.signs:
        if relations_agree(gold, answer):
            return True
        gold_value = gold._replace(signs=())
        return equal(gold.name, answer.name) and equal(gold_value, answer, rules)
    if gold.numbers and answer.numbers:
        return quantities_agree(gold, answer, rules)
    if is_tuple(gold) or is_tuple(answer):
        return tuples_agree(gold, answer, rules)
    return sets_agree(gold, answer, rules)


def are_all_relations(value: Value) -> bool:
    return all(member.signs for member in members(value))


def as_assignments(value: Value) -> Value:
    """(x, y) = (1, 2) as x = 1, y = 2; any other value as it is."""
    if not value.name or not value.name.items or len(value.name.items) != len(value.items):
        return value
    # signs is a tuple, unlike that of relations which were read: so relations_agree does not hold
    # between the two, and names and values are compared.
    assignments = []
    for name, item in zip(value.name.items, value.items):
        assignments.append(item._replace(signs=("=",), sides=(name, item), name=name))
    return collection(assignments)


def relations_agree(gold: Value, answer: Value) -> bool:
    """Equations up to a constant factor, inequalities up to a positive one, chains side by side."""
    if gold.signs != answer.signs:
        return False
    if len(gold.signs) > 1:
        return all(map(equal, gold.sides, answer.sides))
    for side in [*gold.sides, *answer.sides]:
        if not side.numbers:
            return False

    # left - right of both must have a constant ratio, and not be constant itself: 3 = 5.
    gold_difference = compute("-", *gold.sides)
    answer_difference = compute("-", *answer.sides)
    ratios = compute("/", gold_difference, answer_difference).numbers
    ratios = [ratio for ratio in ratios if not mp.isnan(ratio)]
    if len(set(gold_difference.numbers)) < 2 or len(ratios) < 2:
        return False
    is_inequality = gold.signs[0].startswith("<")
    for ratio in ratios:
        if not ratio or not close(ratio, ratios[0]):
            return False
        if is_inequality and not mp.re(ratio) > 0:
            return False
    return True


def quantities_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Numbers with their units. 50% is 0.5, and where one side only has a unit it is ignored."""
    gold_unit = binding_unit(gold.unit)
    answer_unit = binding_unit(answer.unit)
    if gold_unit != answer_unit and "°" not in (gold_unit, answer_unit):
        gold_product = unit_as_factor(gold)
        answer_product = unit_as_factor(answer)
        if numbers_agree(gold_product, answer_product, rules):
            return True
    return units_agree(gold_unit, answer_unit) and numbers_agree(gold, answer, rules)


def binding_unit(unit: str) -> str:
    """The unit that another must agree with: none for words like apples and inches."""
    if len(unit) >= 4 and unit[0].islower():
        return ""
    return unit


def units_agree(gold_unit: str, answer_unit: str) -> bool:
    """The same units (cm, m^2, May), or a unit on one side only, unless it has a meaning.

    >>> [units_agree("cm", "cm"), units_agree("cm", ""), units_agree("cm", "m")]
    [True, True, False]

    Bases and conditions, which start with _, and primes have a meaning: 52_8 is not 52.
    """
    if gold_unit == answer_unit:
        return True
    if gold_unit and answer_unit:
        return False
    unit = gold_unit or answer_unit
    return "_" not in unit and "'" not in unit


def numbers_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Equal at all points at which both have a value, of four points at least at two.

    Without variables the gold may grant a margin.
    """
    points = max(len(gold.numbers), len(answer.numbers))
    gold_numbers = gold.numbers * (points // len(gold.numbers))
    answer_numbers = answer.numbers * (points // len(answer.numbers))
    pairs = []
    for x, y in zip(gold_numbers, answer_numbers):
        if not mp.isnan(x) and not mp.isnan(y):
            pairs.append((x, y))
    if len(pairs) < min(points, 2):
        return False
    if all(close(x, y) for x, y in pairs):
        return True
    return points == 1 and is_within_margin(gold, answer, rules)


def close(x, y) -> bool:
    """Equal, up to rounding if they are not both fractions."""
    if x == y:
        return True
    if are_exact(x, y):
        return False
    size = max(abs(mp.convert(x)), abs(mp.convert(y)))
    return size < mp.inf and abs(mp.convert(x + -y)) <= size * ROUNDING + TINY


def is_within_margin(gold: Value, answer: Value, rules: Rules) -> bool:
    """Is a number as near to the gold as the gold's digits, the rules or its own digits grant?"""
    x = gold.numbers[0]
    y = answer.numbers[0]
    is_integer = isinstance(x, Fraction) and x.denominator == 1
    error = abs(mp.convert(x + -y))
    x = mp.convert(x)

    # A decimal gold is rounded: half a unit of its last digit. 0.33 grants 1/3.
    half_digit = 0
    if x and gold.digits > 1:
        exponent = mp.floor(mp.log10(abs(x))) + 1 - gold.digits
        half_digit = mp.mpf(10) ** exponent / 2

    # Any decimal gold grants 1e-4; an exact one only that an answer in 12 digits is rounded.
    relative = mp.zero
    if gold.digits or rules.parity:
        relative = mp.mpf("1e-4")
    elif answer.digits >= 12 and not is_integer:
        relative = mp.mpf("1e-12")

    margin = max(rules.tolerance or 0, half_digit, abs(x) * relative)
    margin *= 1 + mp.mpf("1e-50")
    if error <= margin < mp.inf:
        return True
    return rules.parity and is_percentage(x, y)


def is_percentage(x, y) -> bool:
    """Is one the other in percent, as the published graders have it?"""
    scaled = [x * 100, x * mp.mpf("0.01")]
    return any(abs(number - y) < abs(number) / 10000 for number in scaled)


def tuples_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Tuples, intervals and matrices: in order, with the same brackets.

    A list may stand for a tuple, and a matrix has any brackets.
    """
    if gold.brackets is None or answer.brackets is None:
        # One of them is a number or a relation: an empty matrix has as few items as these.
        return False
    brackets = {gold.brackets, answer.brackets} - {"⟦⟧"}
    if len(brackets) > 1 and brackets != {"", "()"}:
        return False
    if len(gold.items) != len(answer.items):
        return False
    return all(equal(x, y, rules) for x, y in zip(gold.items, answer.items))


def sets_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Lists and sets in any order: each member of one is equal to one of the other."""
    wanted = members(gold)
    given = members(answer)
    if len(wanted) < 2 or len(given) < 2:
        return False
    if not all(is_answered(x, given, rules) for x in wanted):
        return False
    return all(is_wanted(y, wanted, rules) for y in given)


def is_answered(gold: Value, answers: list[Value], rules: Rules) -> bool:
    return any(equal(gold, answer, rules) for answer in answers)


def is_wanted(answer: Value, golds: list[Value], rules: Rules) -> bool:
    return any(equal(gold, answer, rules) for gold in golds)


# --- two texts ---


def judge(answer: str, gold: str, parity: bool = False, tolerance: float | None = None) -> bool:
    """Does the text `answer` state what `gold` does?

    Raises Unparsed if one of them cannot be read, or is too costly to work out.
    """
    try:
        return texts_agree(answer, gold, Rules(parity, tolerance))
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise Unparsed(str(error)) from error


def texts_agree(answer: str, gold: str, rules: Rules) -> bool:
    answer = clean(answer)
    gold = clean(gold)
    if rules.parity:
        answer = without_bases(answer)
        gold = without_bases(gold)
    if re.fullmatch(r"\(?[A-F]\)?", gold):
        answer = chosen_letter(answer)

    # Texts that are written alike are equal, and need not be mathematics.
    is_words = are_words(answer, gold)
    answer_text = without_layout(answer, is_words)
    gold_text = without_layout(gold, is_words)
    if answer_text == gold_text:
        return answer_text != ""
    if is_words and len(gold_text) > 1 and answer_text.lower() == gold_text.lower():
        return True

    # HHT is an order and IV a numeral: neither is a product.
    if re.fullmatch("[A-Z]{3,}|[IVX]+", gold_text):
        return False
    return equal(parse(gold), parse(answer), rules)


def without_bases(text: str) -> str:
    """Without the base of 52_8, and with round brackets only."""
    text = re.sub(r"(?<=\d)_({\d+}|\d+)", "", text)
    return text.replace("[", "(").replace("]", ")")


def chosen_letter(answer: str) -> str:
    """The letter of a choice: "(B) 12" and "B." are B; "(B), (C)" stays as it is."""
    another_letter = r"\b[A-F]\b(?! [a-z])"
    text_of_choice = rf"(?:\W{{1,9}}(?=\S)(?:(?!{another_letter}).)*)?"
    pattern = rf"^@?\(?([A-F])[).:]{text_of_choice}$"
    return re.sub(pattern, r"\1", answer, flags=re.S)


def are_words(answer: str, gold: str) -> bool:
    has_word = re.search("[a-z]{3}|^@?no@?$", gold, re.I)
    has_formula = re.search(r"[\d\\^_=+{|]", answer + gold)
    return bool(has_word) and not has_formula


def without_layout(text: str, is_words: bool) -> str:
    """Without what makes no difference: blanks, the brackets of a choice, hyphens in words."""
    if is_words:
        pattern = r"[@\s']|^\(|\)$|(?<=[a-z]{3})-(?=[a-z]{3})"
    else:
        # A blank between two digits stays, unless it is that of 14 916.
        pattern = r"[@\\]|(?<![\d,])\s|\s(?!\d)|\s(?=\d{3}\b)"
    return re.sub(pattern, "", text, flags=re.I).strip(".")
