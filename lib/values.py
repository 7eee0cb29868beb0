r"""
What an answer means, and when two of them are equal: numbers with their units, lists, sets, tuples,
intervals, matrices, equations, inequalities, and statements of which only the parts are understood.
"""

import contextlib
import re
from fractions import Fraction
from typing import NamedTuple

import sympy

from lib import expressions, units
from lib.expressions import (
    FIRST_BITS,
    Node,
    are_equal,
    bits,
    constant,
    has_names,
    is_constant_ratio,
    is_written,
    letter,
    mp,
    number,
    operation,
)
from lib.latex import Unparsed

MAX_MEMBERS = 30


class Value(NamedTuple):
    """What a text means: a number, a collection, a relation, or a statement.

    A number has a `node`, its expression; `digits`, the number of significant digits if it is
    written as a decimal; and a `unit`: km h^-1, %, °. A unit that starts with _ must not be left
    out (_8 is the base of 52_8), one with ≡ is a modulus. remark: words behind % and °.

    A collection has `items` and `brackets`: "" (a list without brackets), "{}" (a set), "()", "[)",
    ... (a tuple or an interval), "(:" (a ratio), "⟦⟧" (a matrix, or a row of one). What is known to
    be an interval or a union has the unit ∪, a list with "or" in it ∨, one with "and" ∧.

    A relation has `signs`, the `sides` between which they stand, and the side that is its `name`:
    the x of x = 5 and x < 5. If it gives its name a value, it has the fields of this value as well.

    A statement has `signs` and `sides`, too; one of its signs is a word, or a sign of which nothing
    is known. It has no name and no value.
    """

    node: Node | None = None
    digits: int = 0
    unit: str = ""
    remark: str = ""
    brackets: str | None = None
    items: list | tuple = ()
    signs: list | tuple = ()
    sides: list | tuple = ()
    name: "Value | None" = None


NOTHING = Value()
EMPTY_SET = Value(brackets="{}")


def collection(items: list[Value], brackets: str = "") -> Value:
    """A collection; but a single number in brackets is that number."""
    if len(items) == 1:
        return items[0]
    return Value(brackets=brackets, items=items)


def interval(ends: list[Value], brackets: str) -> Value:
    """What cannot be a point, unlike (1, 2) where nothing is known of it."""
    return Value(brackets=brackets, items=ends, unit="∪")


def members(value: Value) -> list[Value]:
    """The members of a list or set; any other value is its own only member."""
    is_list_alone = value.brackets == "" and not value.signs
    if value.brackets != "{}" and not is_list_alone:
        return [value]
    found = []
    for item in value.items:
        found += members(item) if item.brackets == "" else [item]
    return found


def is_tuple(value: Value) -> bool:
    return bool(value.brackets) and value.brackets[0] in "([⟦"


def is_statement(value: Value) -> bool:
    return bool(value.signs) and value.name is None


def negative(value: Value) -> Value:
    if value.signs or value.brackets == "{}":
        raise Unparsed("minus a statement")
    if value.items and has_written(value):
        return Value(expressions.negative(node_of(value)))
    node = value.node and expressions.negative(value.node)
    items = [negative(item) for item in value.items]
    return value._replace(node=node, items=items)


def with_factor(value: Value) -> Node | None:
    """50% as 0.5, and 5 g as the product of 5 and g."""
    if not value.unit or value.node is None:
        return value.node
    if len(value.unit) > 1:
        return expressions.name(value.unit, value.node)
    return operation("*", value.node, letter(value.unit))


def compute(sign: str, *arguments: Value) -> Value:
    """A function of numbers; a factor before a tuple multiplies its items."""
    if sign == "*" and is_tuple(arguments[1]) and arguments[0].node is not None:
        factor, vector = arguments
        if has_written(factor) or has_written(vector):
            return Value(operation("*", node_of(factor), node_of(vector)))
        items = [compute("*", factor, item) for item in vector.items]
        return vector._replace(items=items)
    if sign in ("+", "-") and all(map(is_matrix, arguments)):
        return matrix_sum(sign, *arguments)
    nodes = []
    for argument in arguments:
        if argument.brackets == "{}" and len(argument.items) == 1:
            # Braces may be brackets: {1 + 2}{3 - 4}.
            argument = argument.items[0]
        if argument.signs or argument.node is None:
            raise Unparsed("no number")
        nodes.append(with_factor(argument))
    return Value(operation(sign, *nodes))


def is_matrix(value: Value) -> bool:
    return value.brackets == "⟦⟧"


def determinant(matrix: Value) -> Value:
    entries = []
    for row in matrix.items:
        entries += row.items
    return compute("\\det", *entries)


def transposed(value: Value, exponent: str) -> Value:
    """A matrix whose rows are columns; a vector is the same in a row and in a column.

    Raises Unparsed if the exponent is none that says so.
    """
    if exponent not in ("T", "\\top", "\\intercal"):
        raise Unparsed("a power of a matrix")
    if not all(map(is_matrix, value.items)):
        return value
    rows = [row.items for row in value.items]
    columns = []
    for column in zip(*rows, strict=True):
        columns.append(Value(brackets="⟦⟧", items=list(column)))
    return value._replace(items=columns)


def matrix_sum(sign: str, one: Value, other: Value) -> Value:
    if len(one.items) != len(other.items):
        raise Unparsed("matrices of different shapes")
    if has_written(one) or has_written(other):
        return Value(operation(sign, node_of(one), node_of(other)))
    items = []
    for x, y in zip(one.items, other.items):
        items.append(compute(sign, x, y))
    return one._replace(items=items)


def node_of(value: Value) -> Node:
    """The expression that a value is; a name for anything else."""
    if value.signs and value.sides:
        nodes = []
        for side in value.sides:
            node = expressions.name("") if side == NOTHING else node_of(side)
            nodes.append(node)
        signs = " ".join(value.signs)
        return expressions.name("relation " + signs, *nodes)
    if value.node is not None and value.unit:
        return expressions.name(value.unit, value.node)
    if value.node is not None:
        return compute("+", value).node
    if value.brackets is not None:
        nodes = map(node_of, value.items)
        return expressions.name(f"collection {value.brackets}", *nodes)
    raise Unparsed("no operand")


def has_written(value: Value) -> bool:
    """Is there a sum or an integral in it?"""
    if value.node is not None:
        return is_written(value.node)
    parts = (*value.items, *value.sides)
    return any(map(has_written, parts))


# --- relations ---

RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "~", "\\in")


def make_relation(sides: list[Value], texts: list[str], signs: list[str]) -> Value:
    """sides, and their texts without blanks, with signs between them."""
    is_member_of_name = signs[-1] == "\\in" and not is_set(sides[-1])
    is_known = set(signs) <= set(RELATIONS)
    if not is_known or NOTHING in sides or is_member_of_name:
        return Value(signs=tuple(signs), sides=tuple(sides))
    named = [is_name(text) for text in texts]

    # 3 > x is x < 3.
    if signs[0].startswith(">"):
        signs = [sign.replace(">", "<") for sign in reversed(signs)]
        sides = sides[::-1]
        named = named[::-1]

    solved = absolute_inequality(sides, signs)
    if solved is not None:
        name, value = solved
        return value._replace(signs=signs, sides=sides, name=name)

    name = sides[0]
    if True in named:
        name = sides[named.index(True)]
    value = value_of_name(sides, named, signs)
    return value._replace(signs=signs, sides=sides, name=name)


def is_set(value: Value) -> bool:
    """A collection or the integers, but not a letter."""
    if value.node is None or not is_written(value.node):
        return value.brackets is not None
    return value.node.parts[0].startswith("\\mathbb")


def is_name(text: str) -> bool:
    """Can an equation give it a value: x, f(2), AB, |AB|, dy/dx, angle APC?"""
    rest = re.sub(
        r"_\s*(?:{[^{}]*}|.)|\^{-1}(?=\()|(?<=[a-zA-Z'}])\([^()]*\)|\\(?:lim|sum|int|prod).*",
        "",
        text,
    )
    if re.search(r"\\(?:pi|infty|sqrt|empty)", rest):
        return False
    return re.fullmatch(r"[a-zA-Zᚠ-ᛪ\s\\:/,(){}'@\[\]⟦⟧]*", rest) is not None


def value_of_name(sides: list[Value], named: list[bool], signs: list[str]) -> Value:
    """The value that a relation gives to its name, an empty one if it gives none."""
    kinds = set(signs)
    has_modulus = sides[-1].unit.startswith("≡")
    if has_modulus and True not in named:
        return value_of_congruence(sides)
    if kinds <= {"=", "~", "\\in"} and is_right(sides, named, signs):
        return last_exact_side(sides, named, signs)
    if named.count(True) != 1:
        return NOTHING
    k = named.index(True)

    # x != 5 is all real numbers but 5.
    if signs == ["!="]:
        return combine("\\setminus", real_line(), sides[1 - k])

    # 1 < x <= 2 is an interval, and x < 5 one without a lower end.
    if kinds <= {"<", "<="}:
        infinity = letter("\\infty")
        below = Value(expressions.negative(infinity))
        ends = [below, *sides, Value(infinity)]
        signs = ["<", *signs, "<"]
        opener = "(" if signs[k] == "<" else "["
        closer = ")" if signs[k + 1] == "<" else "]"
        return interval([ends[k], ends[k + 2]], opener + closer)
    return NOTHING


def value_of_congruence(sides: list[Value]) -> Value:
    r"""7 \equiv 2 \pmod 5 says 2, and nothing if it is wrong."""
    last = sides[-1]
    if last.node is None or last.node.operation != "#":
        return NOTHING
    written, modulus = last.node.parts
    for side in sides[:-1]:
        remainder = compute("#", side, Value(modulus))
        if not are_equal(remainder.node, last.node):
            return NOTHING
    return last._replace(node=written)


def linear_in_bars(side: Value) -> expressions.Linear | None:
    """What stands in |2x - 1|, if it is linear and not constant."""
    if side.node is None or side.unit:
        return None
    if side.node.operation not in ("\\lvert", "\\abs"):
        return None
    inner = expressions.linear(side.node.parts[0])
    return inner if inner is not None and inner.slope else None


def absolute_inequality(sides: list[Value], signs: list[str]) -> tuple[Value, Value] | None:
    """The x of |2x - 1| < 3 or 1 < |x| < 2, and where it is; None for any other relation."""
    if not set(signs) <= {"<", "<="}:
        return None
    found = [k for k, side in enumerate(sides) if linear_in_bars(side)]
    if len(found) != 1:
        return None
    k = found[0]
    inner = linear_in_bars(sides[k])
    for bound in sides[:k] + sides[k + 1 :]:
        if bound.node is None or bound.unit:
            return None
        if expressions.mentions(bound.node, inner.x):
            return None
    regions = []
    if k > 0:
        regions.append(outside(inner, sides[k - 1], signs[k - 1]))
    if k < len(signs):
        regions.append(inside(inner, sides[k + 1], signs[k]))
    where = regions[0]
    if len(regions) > 1:
        where = combine("\\cap", *regions)
    return Value(inner.x), where


def ends_of(inner: expressions.Linear, bound: Value) -> list[Value]:
    """The two x with |inner| = bound."""
    ends = []
    for end in (expressions.negative(bound.node), bound.node):
        distance = operation("-", end, inner.offset)
        ends.append(Value(operation("/", distance, number(inner.slope))))
    return ends if inner.slope > 0 else ends[::-1]


def inside(inner: expressions.Linear, bound: Value, sign: str) -> Value:
    """The x with |inner| < bound."""
    return interval(ends_of(inner, bound), "()" if sign == "<" else "[]")


def outside(inner: expressions.Linear, bound: Value, sign: str) -> Value:
    """The x with bound < |inner|."""
    low, high = ends_of(inner, bound)
    infinity = letter("\\infty")
    farthest = Value(expressions.negative(infinity))
    below = interval([farthest, low], "()" if sign == "<" else "(]")
    above = interval([high, Value(infinity)], "()" if sign == "<" else "[)")
    return combine("\\cup", below, above)


def real_line() -> Value:
    infinity = letter("\\infty")
    below = Value(expressions.negative(infinity))
    return interval([below, Value(infinity)], "()")


def is_right(sides: list[Value], named: list[bool], signs: list[str]) -> bool:
    """An equation without a name must be right: 3 * 4 = 13 has no value, and 0 is not about 1."""
    if True in named:
        return True
    if "~" in signs:
        k = signs.index("~")
        return are_near(sides[k], sides[-1])
    return all(equal(sides[-1], side) for side in sides)


def are_near(one: Value, other: Value) -> bool:
    """Do two numbers differ by less than a tenth?"""
    if one.node is None or other.node is None:
        return True
    x = constant(one.node)
    y = constant(other.node)
    if x is None or y is None:
        return True
    x = mp.convert(x)
    y = mp.convert(y)
    larger = max(abs(x), abs(y))
    return abs(x - y) <= larger / 10


def last_exact_side(sides: list[Value], named: list[bool], signs: list[str]) -> Value:
    r"""x = 1 + 1 = 2 and |AB| = 2 \approx 2.1 have the value 2: the last side before an
    approximation that is not a name."""
    exact = len(sides)
    if "~" in signs:
        exact = signs.index("~") + 1
    if any(side.unit.startswith("_") for side in sides[exact:]):
        raise Unparsed("a condition on an approximation")
    values = [side for side, is_name in zip(sides[:exact], named) if not is_name]
    return values[-1] if values else sides[-1]


def joint(items: list[Value]) -> list[Value]:
    """x > 2 and x < 5 as one set; but x < 2 and x > 5, which is nowhere, are meant as two."""
    if len(items) < 2 or len(items) > MAX_MEMBERS:
        return items
    for item in items:
        is_inequality = item.signs and set(item.signs) <= {"<", "<=", "!="}
        if not is_inequality or is_statement(item):
            return items
        if not equal(item.name, items[0].name):
            return items
    with contextlib.suppress(Unparsed):
        both = combine("\\cap", *items)
        if both != EMPTY_SET and both.node is None:
            return [both]
    return items


# --- "and" and "or" ---


def parts_of_logic(value: Value) -> tuple[list[Value], list[str]]:
    r"""The sides of x = 1 \lor x = 2 and a separator for each; p \lor q is one statement."""
    is_logic = is_statement(value) and set(value.signs) <= {"\\vee", "\\wedge"}
    if not is_logic or any(side.name is None for side in value.sides):
        return [value], [","]
    separators = [","]
    for sign in value.signs:
        separators.append(";" if sign == "\\vee" else "&")
    return list(value.sides), separators


def have_several_names(items: list[Value]) -> bool:
    """Are they equations for different unknowns?"""
    if any(item.name is None for item in items):
        return False
    return not all(equal(item.name, items[0].name) for item in items[1:])


def alternatives(items: list[Value], separators: list[str]) -> Value:
    """Solutions with an "or" between some of them. separators: what stands before each.

    Where the unknowns differ, each solution is a system: x = 1, y = 2 or x = 2, y = 1.
    """
    if not have_several_names(items):
        return Value(brackets="", items=items, unit="∨")
    systems = []
    for separator, item in zip(separators, items):
        if separator == ";" or not systems:
            systems.append([])
        systems[-1].append(item)
    items = [in_order_of_names(collection(system)) for system in systems]
    items = [item._replace(brackets="()") if item.items else item for item in items]
    return Value(brackets="", items=items, unit="∨")


def is_other_logic(gold: Value, answer: Value) -> bool:
    """x = 3 or y = 7 is neither x = 3 and y = 7 nor (3, 7), and "A or B" is not "A and B"; but the
    solutions of an equation may have any of both between them, and a set stands for any."""
    is_choice = gold.unit == "∨" and have_several_names(gold.items)
    is_choice_given = answer.unit == "∨" and have_several_names(answer.items)
    if is_choice != is_choice_given and "{}" not in (gold.brackets, answer.brackets):
        return True
    if {gold.unit, answer.unit} != {"∨", "∧"}:
        return False
    return all(map(is_thing, gold.items))


def is_thing(value: Value) -> bool:
    """A word or a capital, not a number."""
    if value.node is None or value.signs:
        return is_statement(value)
    text = value.node.parts[0]
    return value.node.operation in ("name", "whole") and text[:1].isupper()


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
    total = sum(len(members(one)) for one in sets)
    if total > MAX_MEMBERS:
        raise Unparsed("sets too big")
    originals = {}
    try:
        regions = [region(one, originals) for one in sets]
        return value_of_region(SYMPY_SETS[sign](*regions), originals)
    except Unparsed:
        return combine_members(sign, sets)


def region(value: Value, originals: dict) -> sympy.Set:
    """A set of real numbers for sympy. originals: gets our value of each of sympy's numbers."""
    if is_statement(value):
        raise Unparsed("a statement is no set")
    if value.brackets is not None and not is_tuple(value):
        if any(item.brackets == "{}" for item in value.items):
            raise Unparsed("a set of sets")
        parts = [region(item, originals) for item in value.items]
        return sympy.Union(*parts)
    if len(value.items) > 2:
        raise Unparsed("not an interval")

    ends = []
    for item in value.items or [value]:
        converted = real_number(item)
        originals.setdefault(converted, item)
        ends.append(converted)
    if not value.items:
        return sympy.FiniteSet(*ends)
    if ends[0] > ends[-1]:
        raise Unparsed("not an interval")
    opener, closer = value.brackets
    return sympy.Interval(*ends, opener == "(", closer == ")")


def real_number(value: Value):
    """A number for sympy."""
    if value.node is None:
        raise Unparsed("not a number")
    x = constant(with_factor(value))
    if x is None or mp.isnan(x):
        raise Unparsed("not a number")
    if bits(x) > expressions.MAX_BITS:
        raise Unparsed("not a number")
    if isinstance(x, Fraction):
        return sympy.Rational(x.numerator, x.denominator)
    if mp.im(x):
        raise Unparsed("not a real number")
    x = mp.re(x)
    if mp.isinf(x):
        return sympy.oo if x > 0 else -sympy.oo
    if abs(mp.mag(x)) > FIRST_BITS // 2:
        raise Unparsed("too big or small")
    return sympy.Rational(mp.nstr(x, 60))


def value_of_region(found: sympy.Set, originals: dict) -> Value:
    """sympy's set as a value of ours. Raises Unparsed if it is of another kind."""
    items = []
    for part in sympy.Union.make_args(found):
        if isinstance(part, sympy.Interval):
            opener = "(" if part.left_open else "["
            closer = ")" if part.right_open else "]"
            ends = [originals[part.start], originals[part.end]]
            items.append(interval(ends, opener + closer))
        elif isinstance(part, sympy.FiniteSet):
            items += [originals[x] for x in part]
        elif part is not sympy.S.EmptySet:
            raise Unparsed("a set that sympy does not work out")
    if not items:
        return EMPTY_SET
    return union(items)


def union(items: list[Value]) -> Value:
    """A list that has come from a union or an "or"."""
    if len(items) == 1:
        return items[0]
    return collection(items)._replace(unit="∪")


def combine_members(sign: str, sets: tuple[Value, ...]) -> Value:
    """A union, intersection or difference of sets that are not sets of real numbers."""
    first = members(sets[0])
    others = []
    for one in sets[1:]:
        others += members(one)
    if sign == "\\cup":
        return union(first + others)

    # Z without {0} is a statement: equal if its parts are.
    are_sets = all(one.brackets in ("", "{}") for one in sets)
    if not are_sets or any(is_tuple(one) for one in first + others):
        if sign == "\\cap":
            sets = sorted(sets, key=repr)
        signs = (sign,) * (len(sets) - 1)
        return Value(signs=signs, sides=tuple(sets))
    wanted = sign == "\\cap"
    kept = [x for x in first if is_answered(x, others, STRICT) == wanted]
    return collection(kept) if kept else EMPTY_SET


# --- equality ---


class Rules(NamedTuple):
    """parity: the lenient reading of published tables. tolerance: an absolute error of numbers."""

    parity: bool = False
    tolerance: float | None = None


STRICT = Rules()


def equal(gold: Value, answer: Value, rules: Rules = STRICT) -> bool:
    """Does the value `answer` answer `gold`?"""
    if is_statement(gold) != is_statement(answer):
        gold = conclusion(gold)
        answer = conclusion(answer)
    if is_statement(gold) or is_statement(answer):
        return statements_agree(gold, answer, rules)
    if are_all_relations(gold) and are_all_relations(answer):
        gold = as_assignments(gold)
        answer = as_assignments(answer)
    if "∨" in (gold.unit, answer.unit) and is_other_logic(gold, answer):
        return False
    if gold.signs and answer.signs:
        if relations_agree(gold, answer):
            return True
        if not equal(gold.name, answer.name):
            return False
    gold = gold._replace(signs=())
    answer = answer._replace(signs=())
    if gold.node is not None and answer.node is not None:
        return quantities_agree(gold, answer, rules)
    if is_tuple(gold) or is_tuple(answer):
        return tuples_agree(gold, answer, rules)
    return sets_agree(gold, answer, rules)


# Signs whose sides may be exchanged.
SYMMETRIC = {"\\parallel", "\\perp", "\\cong", "\\wedge", "\\vee", "\\Leftrightarrow"}


# Signs that say the same as another one whose sides are exchanged.
MIRRORED = {
    "\\Leftarrow": "\\Rightarrow",
    "\\leftarrow": "\\to",
    "\\ni": "\\in",
    "\\supset": "\\subset",
    "\\supseteq": "\\subseteq",
    "\\supsetneq": "\\subsetneq",
    "\\gg": "\\ll",
    "\\succ": "\\prec",
    "\\succeq": "\\preceq",
    "\\gtrsim": "\\lesssim",
}


def in_usual_direction(statement: Value) -> Value:
    """A is a subset of B for "B is a superset of A"; other statements as they are."""
    if not set(statement.signs) <= set(MIRRORED):
        return statement
    signs = [MIRRORED[sign] for sign in reversed(statement.signs)]
    return statement._replace(signs=tuple(signs), sides=statement.sides[::-1])


def statements_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """The same signs and words, with equal sides between them, in the same order."""
    if not (is_statement(gold) and is_statement(answer)):
        # A list may say one statement twice.
        return is_list(gold, answer) and sets_agree(gold, answer, rules)
    gold = in_usual_direction(gold)
    answer = in_usual_direction(answer)
    if list(gold.signs) != list(answer.signs):
        return False
    if len(gold.sides) != len(answer.sides):
        return False
    if len(gold.signs) == 1 and gold.signs[0] in SYMMETRIC:
        unsigned = gold._replace(signs=("",))
        swapped = answer._replace(signs=("",), sides=answer.sides[::-1])
        if statements_agree(unsigned, swapped, rules):
            return True
    for one, other in zip(gold.sides, answer.sides):
        if NOTHING in (one, other):
            if one != other:
                return False
        elif not equal(one, other, rules):
            return False
    return True


def is_list(*values: Value) -> bool:
    """Is one of them a list or a set?"""
    return any(value.brackets in ("", "{}") for value in values)


def conclusion(value: Value) -> Value:
    """x = 4 of "2x = 8, so x = 4"; any other value as it is."""
    is_chain = is_statement(value) and set(value.signs) <= {"\\Rightarrow", "\\to", "so"}
    if is_chain and value.sides[-1].signs:
        return value.sides[-1]
    return value


def are_all_relations(value: Value) -> bool:
    found = members(value)
    for member in found:
        if not member.signs or is_statement(member):
            return False
    return bool(found)


def as_assignments(value: Value) -> Value:
    """(x, y) = (1, 2) as x = 1, y = 2; any other value as it is."""
    if not value.name or not value.name.items:
        return value
    if len(value.name.items) != len(value.items):
        return value
    # signs is a tuple, unlike that of relations which were read: so relations_agree does not hold
    # between the two, and names and values are compared.
    assignments = []
    for name, item in zip(value.name.items, value.items):
        assignment = item._replace(signs=("=",), sides=(name, item), name=name)
        assignments.append(assignment)
    return collection(assignments)


def relations_agree(gold: Value, answer: Value) -> bool:
    """Equations up to a constant factor, inequalities up to a positive one, chains side by side."""
    if gold.signs != answer.signs:
        return False
    sides = [*gold.sides, *answer.sides]
    is_as_written = any(map(has_written, sides))
    if len(gold.signs) > 1 or is_as_written:
        return all(map(equal, gold.sides, answer.sides))
    for side in sides:
        if side.node is None or side.signs:
            return False

    # left - right of both must have a constant ratio, and not be constant itself: 3 = 5.
    gold_difference = compute("-", *gold.sides).node
    answer_difference = compute("-", *answer.sides).node
    if not has_names(gold_difference) or not has_names(answer_difference):
        return False
    is_inequality = gold.signs[0].startswith("<")
    return is_constant_ratio(gold_difference, answer_difference, is_inequality)


def quantities_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Numbers with their units. 50% is 0.5, and where one side only has a unit it is ignored."""
    has_remarks = gold.remark and answer.remark
    if has_remarks and not units.agree(gold.remark, answer.remark):
        return False
    is_same_unit = gold.unit == answer.unit
    if not is_same_unit and "°" not in (gold.unit, answer.unit):
        is_percent = "%" in (gold.unit, answer.unit)
        is_letter = len(gold.unit + answer.unit) == 1
        if is_percent or is_letter:
            gold_product = gold._replace(node=with_factor(gold), unit="")
            answer_product = answer._replace(node=with_factor(answer), unit="")
            if numbers_agree(gold_product, answer_product, rules):
                return True
    if not units_agree(gold.unit, answer.unit):
        return False
    return numbers_agree(gold, answer, rules)


def units_agree(gold_unit: str, answer_unit: str) -> bool:
    """The same units, or a unit on one side only, unless it has a meaning.

    >>> [units_agree("cm", "cm"), units_agree("cm", ""), units_agree("cm", "m")]
    [True, True, False]

    Bases and conditions, which start with _, and primes have a meaning: 52_8 is not 52.
    """
    if gold_unit == answer_unit:
        return True
    for unit in (gold_unit, answer_unit):
        if "_" in unit or "'" in unit:
            return False
    if "≡" in gold_unit + answer_unit:
        return not (gold_unit and answer_unit)
    if not gold_unit or not answer_unit:
        return True
    if "°" in (gold_unit, answer_unit):
        return {gold_unit, answer_unit} <= {"°", "celsius", "fahrenheit"}
    return units.agree(gold_unit, answer_unit)


def numbers_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Equal; but a decimal without variables may grant a margin."""
    if are_equal(gold.node, answer.node):
        return True
    has_decimal = gold.digits or answer.digits
    if not (has_decimal or rules.parity or rules.tolerance):
        return False
    x = constant(gold.node)
    y = constant(answer.node)
    if x is None or y is None:
        return False
    if mp.isnan(x) or mp.isnan(y):
        return False
    return is_within_margin(x, y, gold, answer, rules)


def is_within_margin(x, y, gold: Value, answer: Value, rules: Rules) -> bool:
    """Is a number as near to the gold as the gold's digits, the rules or its own digits grant?

    x, y: the numbers of gold and answer.
    """
    is_integer = expressions.is_integer(x)
    is_given_integer = expressions.is_integer(y) and not answer.digits
    error = abs(mp.convert(x) - mp.convert(y))
    x = mp.convert(x)
    y = mp.convert(y)

    # A decimal gold is rounded: half a unit of its last digit. 0.33 grants 1/3.
    half_digit = 0
    if x and gold.digits > 1 and mp.isfinite(x):
        first_digit = mp.floor(mp.log10(abs(x)))
        exponent = first_digit + 1 - gold.digits
        half_digit = mp.mpf(10) ** exponent / 2

    # Any decimal gold grants 1e-4, but not to an integer, which nobody has rounded: 2 is not
    # 2.0001. An exact gold only grants that an answer in 12 digits is rounded.
    relative = mp.zero
    if gold.digits and not is_given_integer or rules.parity:
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
    # A list of tuples, or a list beside a number or a relation.
    items = (*gold.items, *answer.items)
    has_tuples = any(map(is_tuple, items))
    is_beside_number = gold.brackets is None or answer.brackets is None
    may_be_set = is_list(gold, answer) and (has_tuples or is_beside_number)
    if may_be_set and sets_agree(gold, answer, rules):
        return True
    if is_beside_number:
        return False

    if {gold.brackets, answer.brackets} == {"[]", "{}"}:
        return is_single_point(gold, answer) or is_single_point(answer, gold)
    if not brackets_agree(gold, answer):
        return False
    if not gold.items or len(gold.items) != len(answer.items):
        return False
    gold = in_order_of_names(gold)
    answer = in_order_of_names(answer)
    pairs = zip(gold.items, answer.items)
    return all(equal(x, y, rules) for x, y in pairs)


def is_single_point(interval: Value, others: Value) -> bool:
    """[1, 1] is {1}."""
    if len(interval.items) != 2 or len(others.items) != 1:
        return False
    return all(equal(end, others.items[0]) for end in interval.items)


def brackets_agree(gold: Value, answer: Value) -> bool:
    """The same brackets; a matrix has any but those of an interval, a tuple may have none."""
    kinds = {gold.brackets, answer.brackets}
    if "⟦⟧" in kinds:
        return not kinds & {"(]", "[)", "(:"}
    if len(kinds) == 1:
        return True
    is_union = bool({"∪", "∨"} & {gold.unit, answer.unit})
    return kinds == {"", "()"} and not is_union


def in_order_of_names(value: Value) -> Value:
    """y = 2, x = 1 stands for (1, 2); a list whose names are no neighbours stays as it is."""
    names = []
    for item in value.items:
        node = item.name.node if item.name is not None else None
        is_letter = node is not None and len(node.parts) == 1
        names.append(node.parts[0] if is_letter else None)
    letters = [name for name in names if isinstance(name, str) and len(name) == 1]
    letters.sort()
    is_row = "".join(letters) in "abcdefghijklmnopqrstuvwxyz"
    is_complete = len(set(letters)) == len(names)
    if value.brackets != "" or not is_complete or not is_row:
        return value
    items = [value.items[names.index(letter)] for letter in letters]
    return value._replace(items=items)


def sets_agree(gold: Value, answer: Value, rules: Rules) -> bool:
    """Lists and sets in any order: each member of one is equal to one of the other."""
    wanted = members(gold)
    given = members(answer)
    if wanted == [gold] and given == [answer]:
        return False
    if len(wanted) * len(given) > MAX_MEMBERS**2:
        raise Unparsed("sets too big")
    if not wanted or not given:
        return not wanted and not given
    is_union = "∪" in gold.unit
    is_union_given = "∪" in answer.unit
    has_or = "∨" in gold.unit + answer.unit
    if is_union != is_union_given and not has_or:
        # (1, 2), (3, 4) are two points, and no union of intervals.
        listed = given if is_union else wanted
        if all(map(is_point, listed)):
            return False
    are_sets = gold.brackets == answer.brackets == "{}"
    if are_sets and count_sets(wanted) != count_sets(given):
        # The set {x} is no x.
        return False
    if not all(is_answered(x, given, rules) for x in wanted):
        return False
    return all(is_wanted(y, wanted, rules) for y in given)


def is_point(value: Value) -> bool:
    """May (1, 2) be a point? Not if it ends at infinity."""
    if value.brackets != "()" or value.unit:
        return False
    return all("infty" not in repr(item.node) for item in value.items)


def count_sets(values: list[Value]) -> int:
    return sum(value.brackets == "{}" for value in values)


def is_answered(gold: Value, answers: list[Value], rules: Rules) -> bool:
    return any(equal(gold, answer, rules) for answer in answers)


def is_wanted(answer: Value, golds: list[Value], rules: Rules) -> bool:
    return any(equal(gold, answer, rules) for gold in golds)


def joined_rows(rows: list[Value]) -> list[Value]:
    """A system of equations, or the cases of a function, is a list; a matrix keeps its rows."""
    if len(rows) < 2:
        return rows
    for row in rows:
        last = row
        if is_matrix(row) and row.items:
            last = row.items[-1]
        if not last.signs:
            return rows
    return [Value(brackets="", items=rows)]
