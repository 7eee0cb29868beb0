r"""
Mathematical answers: tokens -> values, and `judge`, which compares two texts.

    >>> judge(r"\frac{1}{2}\text{ cm}", "0.5")
    True

A parser of our own reads an answer; nothing that a model wrote reaches eval or sympify. What it
does not know is never a factor: an unknown command, a word or an arrow makes a statement, whose
parts stay in their order, and anything else is Unparsed, which equals only what is written alike.

lib/latex.py has the step before, from text to tokens; lib/values.py and lib/expressions.py say what
is equal.
"""

import contextlib
import functools
import itertools
import re
from fractions import Fraction

from lib import units
from lib.expressions import (
    CONSTANTS,
    INTEGERS,
    TABLE,
    begin,
    has_names,
    letter,
    name,
    number,
    operation,
    whole,
    written,
)
from lib.latex import FUNCTIONS, Unparsed, clean, tokenize
from lib.values import (
    NOTHING,
    RELATIONS,
    Rules,
    Value,
    alternatives,
    collection,
    combine,
    compute,
    determinant,
    equal,
    is_matrix,
    is_statement,
    is_tuple,
    joined_rows,
    joint,
    make_relation,
    negative,
    node_of,
    parts_of_logic,
    transposed,
)

MAX_TOKENS = 7000

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

# How tightly a token binds what follows to the operand before it. 2x and 2 sin x are products
# without a sign; tokens that are not in the table are operands (IMPLIED).
END, SET, SUM, PRODUCT, FUNCTION, IMPLIED, POWER = range(7)
LEVELS = {
    "\\cap": SET,
    "\\setminus": SET,
    "+": SUM,
    "-": SUM,
    "*": PRODUCT,
    "/": PRODUCT,
    ":": PRODUCT,
    "#": PRODUCT,
}
LEVELS |= dict.fromkeys(["^", "!", "!!", "%", "°", "_", "'"], POWER)
LEVELS |= dict.fromkeys(CLOSERS, FUNCTION)
LEVELS["\\ratio"] = IMPLIED
LEVELS |= dict.fromkeys(["\\" + name for name in FUNCTIONS], FUNCTION)
LEVELS |= dict.fromkeys(itertools.chain(*CLOSERS.values()), END)
LEVELS |= dict.fromkeys((*SEPARATORS, *RELATIONS, "\\over"), END)

# Commands that are letters.
LETTER_NAMES = r"""
\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \pi \rho
\sigma \tau \upsilon \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Upsilon
\Phi \Psi \Omega \ell \hbar \infty \aleph \Re \Im
"""
LETTERS = set(LETTER_NAMES.split())
# Commands with one argument that make one name of the letters in it.
DECORATION_NAMES = r"""
\overline \bar \underline \overrightarrow \overleftarrow \overleftrightarrow \vec \hat \widehat
\arrow \tilde \widetilde \dot \ddot \mathbb \mathfrak \mathscr \mathcal \angle \triangle \overset
\underset \measuredangle \widearc \overarc \overparen \square
"""
DECORATIONS = set(DECORATION_NAMES.split())
# Letters of another kind are letters.
FONTS = {"\\mathfrak", "\\mathscr", "\\mathcal"}
# Signs of which all parts are read and kept in place: \sum_{k=1}^n k.
BINDERS = {"\\sum", "\\prod", "\\int", "\\oint", "\\lim", "\\bigcup", "\\bigcap"}
# f(2x) is never a product; of other letters, x(y + 1) is one.
FUNCTION_LETTERS = set("fghFHPE") | {"\\phi", "\\psi", "\\Phi", "\\Psi", "\\Gamma", "\\zeta"}
FACTOR_LETTERS = set("abcdeijklmnrtxyz") | {"\\pi", "\\lambda", "\\theta", "\\alpha", "\\beta"}
FACTOR_LETTERS |= {"\\gamma", "\\infty", "\\Delta"}
# The names of bound variables, letters that nobody writes: of integers, and of real numbers.
BOUND = "ᚠᚡᚢᚣᚤᚥ"
REAL_BOUND = "ᚦᚧᚨᚩᚪᚫ"

# Words that strike out a value; and all without which a value says something else: 3 or more.
STRIKING = (
    r"not|no|never|cannot|except(?:ing)?|unless|without|but|false|wrong|incorrect|fail(?:s|ed)?"
    r"|(?:reject|discard|exclud|omit|ignor|eliminat|dismiss|remov|contradict)[a-z]*|impossible"
    r"|extraneous|spurious|un(?:acceptable|known|defined|true)|perhaps|maybe"
    r"|in(?:valid|admissible|applicable|feasible)"
)
OPERATING = (
    r"squared|cubed|factorial|negated|inverted|plus|minus"
    r"|and (?:above|below|up|over|under|more|less)"
    r"|halves|thirds|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths"
)
CONDITION = re.compile(
    rf"(?i)\b(?:{STRIKING}|or|if|at|below zero|base"
    r"|(?:even|odd|prime|positive|negative|divisible|is)(?=@?$))\b"
    rf"|n't\b|^(?:{OPERATING})\b"
)


@functools.lru_cache(256)
def parse(text: str, bound: tuple[str, ...] = ()) -> Value:
    r"""The value of a cleaned text. \pm gives a list of both values.

    bound: letters that stand for any integer, so that others may stand for them.

    Raises Unparsed if it is not mathematics, or too costly; any other exception means the same.
    """
    if MALFORMED.search(text):
        raise Unparsed("two numbers side by side, or a date")
    readings = [text]
    if "\\pm" in text or "\\mp" in text:
        readings = [
            re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", text)),
            re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", text)),
        ]
    values = []
    for reading in dict.fromkeys(readings):
        tokens = tokenize(reading)
        if len(tokens) > MAX_TOKENS:
            raise Unparsed("too long")
        values.append(Parser(tokens, dict(zip(bound, BOUND))).bracket(""))
    return collection(joint(values))


MALFORMED = re.compile(
    # 3 4, 3 .14, 12 (3)
    r"(?<![\w.^}])[\d.]+ [\d.]|(?<![\w^_}])[\d.]+ [(\[]\s*-?[\d.]+\s*[)\]]"
    # 2023-01-05 and 03/04
    r"|\b\d+[-/]0\d|\b0\d+\s*[-/]\s*\d|^\d{4}-\d\d?-\d\d?$"
    # N 30 E
    r"|\b[NS] ?\d[\d.]*\s*(?:°|\^\S+)?\s*[EW]\b"
    # 0x10
    r"|\b0x[\da-fA-F]"
    # (1)(3)
    r"|^\(\d+\)(?:\s*\(\d+\))+$"
)


@functools.lru_cache(1024)
def binding(token: str) -> int:
    """How tightly a token binds: relations and whatever is unknown do not."""
    if token.startswith("_"):
        token = "_"
    if token in LEVELS:
        return LEVELS[token]
    return END if is_unknown(token) else IMPLIED


@functools.lru_cache(1024)
def is_unknown(token: str) -> bool:
    """A word, or a command or sign without a meaning here: it parts a statement."""
    if token.startswith("@"):
        return True
    if token.startswith("\\") and token[1:].isalpha():
        is_known = token in LETTERS or token in TABLE or token in DECORATIONS or token in BINDERS
        return not (is_known or token in LEVELS or token == "\\emptyset")
    return not (re.match(r"\.?\w|$", token) or token in LEVELS)


# Tokens with blanks between. Above: d, d^2, a partial sign or a delta, alone or before a letter.
# Below: dt, dx^2, dx dy.
ORDER = r"(?: \^ (?:{ )?\d(?: })?)?"
DIFFERENCE = r"(?:d|\\(?:partial|Delta|delta))"
DIFFERENCE_AT_START = re.compile(DIFFERENCE)
OPERATOR = re.compile(rf"(?:{{ )?{DIFFERENCE}{ORDER}(?: }})?")
ABOVE = re.compile(rf"(?:^|[ {{]){DIFFERENCE}{ORDER} (?:\\?[a-zA-Z]|[(\[{{])")
BELOW = re.compile(rf"(?:{{ )?(?:{DIFFERENCE} (?:\\[a-z]+|[a-zA-Z])(?: _[^ ]*)?{ORDER}(?: |$))+}}?")

NUMBER_AT_START = re.compile(r"\.?\d")

# A word that makes another statement of the equation behind it.
NO_NAME = re.compile(rf"(?i)\b(?:{STRIKING}|less|more|than|least|most|if|when|or|and|only|about)\b")


class Parser:
    """Reads tokens from left to right. Each method reads one kind of thing.

    bound: what stands for the letters that are bound by a sum or an integral.
    """

    def __init__(self, tokens: list[str], bound: dict[str, str]):
        self.tokens = [*tokens, ""]
        self.position = 0
        self.bound = bound
        self.has_differentials = any(map(DIFFERENCE_AT_START.match, tokens))

    def peek(self) -> str:
        return self.tokens[self.position]

    def take(self) -> str:
        token = self.tokens[self.position]
        self.position += 1
        return token

    def bracket(self, opener: str) -> Value:
        """A list up to the end of its bracket. The opener "" stands for the whole text."""
        items = []
        texts = []
        separators = []
        closer = ","
        if self.peek() in CLOSERS[opener]:
            closer = self.take()
        while closer in SEPARATORS:
            separators.append(closer)
            start = self.position
            items.append(self.relation())
            texts.append("".join(self.tokens[start : self.position]))
            closer = self.take()
        if closer not in CLOSERS[opener] or not items and opener != "\\{":
            raise Unparsed("brackets")

        # In a list, HTH and SAS are words.
        for k, text in enumerate(texts):
            if len(texts) > 1 and re.fullmatch("[A-Z]{2,}", text):
                items[k] = Value(signs=(text.lower(),), sides=(NOTHING, NOTHING))

        if "\\cup" in separators:
            return combine("\\cup", *items)
        if opener == "⟦":
            items = joined_rows(joint(items))
        if opener in TABLE:
            return self.between_bars(opener, joint(items))
        if opener == "\\{":
            return Value(brackets="{}", items=items if ";" in separators else joint(items))
        if opener == "" and len(items) == 1:
            items, separators = parts_of_logic(items[0])
        brackets = opener[-1:] + closer[-1:]
        if ";" in separators and brackets == "":
            return alternatives(items, separators)
        found = collection(joint(items), brackets)
        if "&" in separators and found.brackets == "":
            return found._replace(unit="∧")
        return found

    def between_bars(self, opener: str, items: list[Value]) -> Value:
        """|x|, and what else has its own brackets; |M| is the determinant of a matrix."""
        if opener == "\\lvert" and len(items) == 1 and is_matrix(items[0]):
            return determinant(items[0])
        return compute(opener, *items)

    def relation(self) -> Value:
        """An expression, an equation, or a statement: some of these with unknown signs between."""
        parts = []
        signs = []
        while True:
            start = self.position
            parts.append(self.chain())
            if not is_unknown(self.peek()):
                break
            sign = self.take()
            signs.append(sign.lower().strip("@ ") if sign.startswith("@") else sign)
            # The arguments of an unknown command stay in their order as well.
            while sign.startswith("\\") and self.peek() in ("{", "("):
                signs.append(self.take())
                parts.append(self.bracket(signs[-1]))
        if signs:
            return Value(signs=tuple(signs), sides=tuple(parts))
        if parts[0] == NOTHING or start == self.position:
            raise Unparsed("no operand")
        return parts[0]

    def chain(self) -> Value:
        """An expression, or several with signs of relation between them."""
        sides = []
        texts = []
        signs = []
        while True:
            start = self.position
            sides.append(self.side())
            texts.append("".join(self.tokens[start : self.position]))
            if self.peek() not in RELATIONS:
                break
            signs.append(self.take())
        if not signs:
            return sides[0]
        return make_relation(sides, texts, signs)

    def side(self) -> Value:
        """What stands between two signs; between two words it may be nothing."""
        is_end = self.peek() in CLOSERS[""] or binding(self.peek()) == END
        if is_end:
            before = self.tokens[self.position - 1] if self.position else ""
            if (
                before in ("}", ")")
                or is_unknown(before)
                or is_unknown(self.peek())
                and not self.is_alone(self.position)
            ):
                return NOTHING
        if is_end and self.peek().startswith(("\\", "@")):
            value = self.unknown_name()
        else:
            value = self.expression()
        if self.peek() == "\\over":
            self.take()
            value = compute("\\frac", value, self.expression())
        return value

    def is_alone(self, position: int) -> bool:
        """Is a command or word, with its index, all that stands on its side: Area = 48?"""
        token = self.tokens[position]
        following = self.tokens[min(position + 1, len(self.tokens) - 1)]
        if following.startswith("_"):
            following = self.tokens[position + 2]
        if token.startswith("@"):
            is_first = position == 0 or self.tokens[position - 1] in (*RELATIONS, *SEPARATORS)
            return following in ("=", "~") and is_first and not NO_NAME.search(token)
        is_end = following in RELATIONS or following in LEVELS and LEVELS[following] == END
        return token.startswith("\\") and (is_end or following == "")

    def unknown_name(self) -> Value:
        """A command or word that is not known, alone on its side: a name like any other."""
        text = self.take().lower() if self.peek().startswith("@") else self.take()
        if self.peek().startswith("_"):
            text += self.take()
        return Value(name(text))

    def expression(self, lowest: int = END) -> Value:
        """An operand, and all that binds to it more tightly than `lowest`."""
        value = self.operand(lowest)
        while True:
            token = self.peek()
            if token.startswith("@") and lowest <= SUM and self.is_unit(value, token):
                value = with_unit(value, self.take())
                continue
            level = binding(token)
            if level <= lowest:
                return value
            value = self.extend(value, token, level)

    def extend(self, value: Value, token: str, level: int) -> Value:
        """A value with the next sign, and the operand behind it."""
        if value.unit.startswith("≡"):
            raise Unparsed("more after a modulus")
        if level in (FUNCTION, IMPLIED):
            # 3..5 is no product, but 2^4 3^2 is one.
            before = self.tokens[self.position - 1]
            is_exponent = self.tokens[self.position - 2] == "^" and token[0] != "."
            is_number = NUMBER_AT_START.match(before) and re.match(r"[\d.]", token)
            if is_number and not is_exponent or before.endswith("."):
                raise Unparsed("a number behind an operand")
            factor = self.expression(level)
            if token == "(" and set(factor.signs) == {"="} and not is_statement(factor):
                # 5 (x = 3): a remark.
                return value
            return compute("*", value, factor)

        sign = self.take()
        if sign[0] in "_'" and value.node is None:
            raise Unparsed("an index of a set")
        if sign[0] in "%°_'":
            return with_unit(value, sign)
        if sign in ("!", "!!"):
            return compute(sign, value)
        if sign == "^" and is_tuple(value):
            return transposed(value, self.group().strip("{}"))
        if level == SET:
            return combine(sign, value, self.expression(level))
        return compute(sign, value, self.expression(level))

    def is_unit(self, value: Value, token: str) -> bool:
        """Is a word behind a value its unit, or a part of a statement?"""
        if value.signs or is_statement(value):
            return False
        if value.node is None or not has_names(value.node):
            return True
        return units.is_unit(token.strip("@"))

    def operand(self, lowest: int) -> Value:
        """A number, a bracket, a fraction, a function, a variable.

        A sign before it belongs to the product that follows: -2x is -(2x).
        """
        token = self.take()
        if token in ("+", "-"):
            value = self.expression(max(lowest, PRODUCT))
            return negative(value) if token == "-" else value
        if token and token in CLOSERS:
            return self.bracket(token)
        if NUMBER_AT_START.match(token):
            return number_of(token)
        if token in ("\\frac", "\\binom"):
            return self.fraction(token)
        if token == "\\det" and self.peek() == "⟦":
            return determinant(self.operand(POWER))
        is_extreme = token in ("\\max", "\\min") and self.peek().startswith("_")
        if token in BINDERS or is_extreme:
            return self.binder(token)
        if token[1:] in FUNCTIONS and token.startswith("\\"):
            return self.function(token)
        if token in DECORATIONS:
            return self.decoration(token)
        if token == "\\ratio":
            return self.operand(POWER)._replace(brackets="(:")
        if token == "\\emptyset":
            return Value(brackets="{}")
        return self.variable(token)

    def fraction(self, sign: str) -> Value:
        r"""\frac{a}{b}; with differentials it is a derivative, which is no fraction."""
        if sign == "\\frac" and self.is_derivative():
            return self.derivative()
        return compute(sign, self.operand(POWER), self.operand(POWER))

    def is_derivative(self) -> bool:
        """Are there differentials above and below? dP/dV is not P/V."""
        if not self.has_differentials:
            return False
        start = self.position
        try:
            self.group()
            middle = self.position
            self.group()
            above = " ".join(self.tokens[start:middle])
            below = " ".join(self.tokens[middle : self.position])
        except Unparsed:
            return False
        finally:
            self.position = start
        if not BELOW.fullmatch(below):
            return False
        return bool(ABOVE.search(above) or OPERATOR.fullmatch(above))

    def derivative(self) -> Value:
        r"""\frac{d^2y}{dx^2}, \frac{\partial f}{\partial x}: a name of which every token counts."""
        above = re.sub(r"(?<!\\)d ", "d", self.group())
        below = re.sub(r"(?<!\\)d ", "d", self.group())
        if re.fullmatch(rf"{{?{DIFFERENCE}(?:\^{{?\d}}?)?}}?", above):
            return Value(whole(f"\\frac{above}{below}", node_of(self.expression(SUM))))
        first = re.fullmatch(r"{d([a-z])}{dx}", above + below)
        if first:
            return Value(whole(first[1] + "'"))
        above = re.sub(r"\^{(\d)}", r"^\1", above)
        below = re.sub(r"\^{(\d)}", r"^\1", below)
        return Value(whole(f"\\frac{above}{below}"))

    def group(self) -> str:
        """The tokens of an operand in braces, or the next token, as text."""
        start = self.position
        depth = 0
        while True:
            token = self.take()
            if token == "":
                raise Unparsed("braces")
            depth += token in ("{", "(")
            depth -= token in ("}", ")")
            if depth <= 0:
                return "".join(map(self.renamed, self.tokens[start : self.position]))

    def renamed(self, token: str) -> str:
        """A token in which bound letters have their other names."""
        if token in self.bound:
            return self.bound[token]
        if token.startswith("_") and self.bound:
            return re.sub(r"\\?[a-zA-Z]+", self.renamed_letters, token)
        return token

    def renamed_letters(self, match: re.Match) -> str:
        if match[0].startswith("\\"):
            return self.bound.get(match[0], match[0])
        return "".join(self.bound.get(letter, letter) for letter in match[0])

    def decoration(self, sign: str) -> Value:
        r"""\overline{AB}, \angle ABC: one name. A bar over digits has been read before."""
        text = re.sub(r"[{}\s]", "", self.group())
        if sign in ("\\angle", "\\triangle", "\\measuredangle", "\\square"):
            while re.fullmatch(r"[A-Z]", self.peek()):
                text += self.take()
        if sign in ("\\overset", "\\underset"):
            text += self.group()
        if sign in ("\\angle", "\\measuredangle") and re.fullmatch("[A-Z]{3}", text):
            # An angle has two legs in any order.
            text = min(text, text[::-1])
        if sign == "\\overline" and len(text) == 1:
            sign = "\\bar"
        while self.peek().startswith(("_", "'")):
            text += self.renamed(self.take())
        text = sign + re.sub(r"[{}\s]", "", text)
        if sign in FONTS:
            return Value(name(text))
        if sign != "\\mathbb":
            return Value(whole(text))

        # Sets of numbers are no factors: 2Z is not Z 2, and Z[i] is a ring.
        nodes = []
        if self.peek() in ("(", "["):
            text += self.peek()
            arguments = self.bracket(self.take())
            nodes = [node_of(item) for item in arguments.items or [arguments]]
        return Value(written(text, *nodes))

    def function(self, sign: str) -> Value:
        """sin x, sin^2 x, sin(x), log_2 8, sqrt_3 x, max(a, b)"""
        base = []
        if self.peek().startswith("_"):
            base = [parse(self.take()[1:])]
        exponent = None
        if self.peek() == "^":
            self.take()
            exponent = self.operand(POWER)

        # Without a bracket the argument of sin is a product, which ends before another function.
        if sign == "\\sqrt" or self.peek() in CLOSERS:
            argument = self.expression(POWER)
        else:
            argument = self.expression(FUNCTION)
        value = compute(sign, *(argument.items or [argument]), *base)
        if exponent is None:
            return value
        return compute("^", value, exponent)

    def binder(self, sign: str) -> Value:
        r"""A sum, product, integral or limit, with its bounds and its body as parts.

        Nobody computes it. Its own letter has no meaning outside, so that \sum_k k is \sum_j j.
        """
        lower, upper = self.bounds()
        parts = []
        bound = None
        start = re.fullmatch(r"\s*(\\?[a-zA-Z])\s*(?:=|\\(?:to|rightarrow)(?![a-z]))(.*)", lower)
        key = sign
        if start:
            bound = start[1]
            lower = start[2]
        # The letters of outer sums, as in \sum_i \sum_{j = i}.
        lower = re.sub(r"\\?[a-zA-Z]+", self.renamed_letters, lower)
        with contextlib.suppress(Unparsed):
            if lower:
                parts.append(node_of(parse(lower)))
                lower = ""
        if lower:
            key += "_" + lower
        if upper is not None:
            parts.append(node_of(upper))
            key += "^"

        if sign in ("\\int", "\\oint"):
            return Value(written(key, *parts, self.integrand(upper is not None)))
        is_real = sign == "\\lim" and bound is not None and bound not in INTEGERS
        names = REAL_BOUND if is_real else BOUND
        return Value(written(key, *parts, node_of(self.body(bound, names, SUM))))

    def bounds(self) -> tuple[str, Value | None]:
        """What stands below a sign, as text, and above it."""
        lower = ""
        upper = None
        while self.peek() == "^" or self.peek().startswith("_"):
            token = self.take()
            if token == "^" and upper is not None:
                raise Unparsed("two upper bounds")
            if token == "^":
                upper = self.operand(POWER)
            else:
                lower = token[1:].strip()
                if lower.startswith("{"):
                    lower = lower[1:-1].strip()
        return lower, upper

    def body(self, bound: str | None, names: str, lowest: int) -> Value:
        """The expression behind a sign that binds a letter, which gets one of these names."""
        outer = self.bound
        if bound is not None:
            self.bound = outer | {bound: self.free_name(names)}
        try:
            return self.expression(lowest)
        finally:
            self.bound = outer

    def free_name(self, names: str) -> str:
        """One of these names that no bound letter has."""
        for name_of in names:
            if name_of not in self.bound.values():
                return name_of
        raise Unparsed("too many bound letters")

    def integrand(self, is_definite: bool):
        """The expression up to dx, and x: a node. dx may be a factor as well, as in dx/x."""
        end = self.differential()
        letter_of = self.tokens[end][2:] if end else None
        bound = letter_of if is_definite else None
        if not end or self.depth_at(end) > 0:
            return node_of(self.body(bound, REAL_BOUND, SUM))
        last = letter(letter_of)
        if is_definite:
            last = letter(self.free_name(REAL_BOUND))
        following = self.tokens[end]
        self.tokens[end] = ""
        value = Value(number(Fraction(1)))
        if self.position < end:
            value = self.body(bound, REAL_BOUND, END)
        self.tokens[end] = following
        if self.position != end:
            raise Unparsed("an integral")
        self.position = end + 1
        return operation("*", node_of(value), whole("d", last))

    def differential(self) -> int | None:
        """The position of the differential that belongs to an integral which starts here."""
        depth = 0
        inner = 0
        for position in range(self.position, len(self.tokens)):
            token = self.tokens[position]
            depth += token in CLOSERS and token != ""
            depth -= token in ("}", ")", "]", "\\}", "⟧")
            if depth < 0 or token == "":
                return None
            if token in ("\\int", "\\oint"):
                inner += 1
            if token.startswith("d "):
                if not inner:
                    return position
                inner -= 1
        return None

    def depth_at(self, end: int) -> int:
        between = self.tokens[self.position : end]
        opened = sum(token in CLOSERS and token != "" for token in between)
        return opened - sum(token in ("}", ")", "]", "\\}", "⟧") for token in between)

    def variable(self, text: str) -> Value:
        """A letter with its indices and primes, or an unknown function of what is in brackets."""
        if text.startswith("d "):
            return Value(whole("d", letter(self.bound.get(text[2:], text[2:]))))
        if text not in LETTERS and not (len(text) == 1 and text.isalpha()):
            raise Unparsed("no operand")
        head = text
        text = self.bound.get(text, text)
        while self.peek().startswith(("_", "'")):
            text += re.sub(r"[{}\s]", "", self.renamed(self.take()))
        if self.is_function(head, text):
            return self.unknown_function(text)
        if text in ("\\Gamma", "\\zeta"):
            text += " "
        return Value(letter(text))

    def is_function(self, head: str, text: str) -> bool:
        """Is a letter before a bracket a function: f(x + 1), P(A), but not x(y + 1)?"""
        position = self.position
        if self.tokens[position] == "^" and head in FUNCTION_LETTERS:
            # f^{-1}(x)
            position += 1
            if self.tokens[position] == "{":
                position = self.tokens.index("}", position)
            position += 1
        opener = self.tokens[min(position, len(self.tokens) - 1)]
        if opener == "[" and head.isupper():
            # E[X] and Z[x], but A[1 - x] is a product.
            is_sum = {"+", "-"} & set(self.content_of_bracket(position))
            return head in ("E", "P") or not is_sum
        if opener != "(" or head in CONSTANTS:
            return False
        if head in FUNCTION_LETTERS or text.endswith("'"):
            return True
        content = self.content_of_bracket(position)
        if head in FACTOR_LETTERS:
            return len(content) == 1 and content[0] != head or "," in content
        return not {"+", "-"} & set(content)

    def content_of_bracket(self, position: int) -> list[str]:
        """The tokens of the bracket that opens at a position, of inner brackets too."""
        depth = 0
        for end in range(position, len(self.tokens)):
            depth += self.tokens[end] in ("(", "[")
            depth -= self.tokens[end] in (")", "]")
            if depth == 0:
                return self.tokens[position + 1 : end]
        raise Unparsed("brackets")

    def unknown_function(self, text: str) -> Value:
        if self.peek() == "^":
            self.take()
            text += "^" + re.sub(r"[{}]", "", self.group())
        arguments = self.bracket(self.take())
        nodes = [node_of(item) for item in arguments.items or [arguments]]
        if text in TABLE and len(nodes) == 1:
            return Value(operation(text, *nodes))
        return Value(whole(text, *nodes))


def number_of(token: str) -> Value:
    digits = 0
    if re.search(r"\.\d|[eE]", token):
        significant = re.sub(r"^[0.]*|[,.]|[eE].*", "", token)
        digits = len(significant)
    return Value(number(Fraction(token.replace(",", "").rstrip("."))), digits)


def with_unit(value: Value, token: str) -> Value:
    """A value with its first unit, base, condition or prime."""
    if value.node is None and not token.startswith("@"):
        raise Unparsed("a unit of a set")
    text = token.strip("@ ")
    direction = re.fullmatch(r"(?i)degrees? ((?!celsius|fahrenheit|[CF]\b)\w.*)", text)
    if direction and not value.unit and value.node is not None:
        return with_unit(value._replace(unit="°"), f"@{direction[1]}@")
    if token.startswith("_"):
        text = "_" + re.sub(r"[{}()\s]", "", token[1:])
    elif token.startswith("@"):
        # 4 prime numbers are 4, but "3 or more" is not 3.
        is_condition = CONDITION.search(text)
        if text.startswith("≡"):
            text = re.sub(r"[{}\s.]", "", text)
        elif is_condition:
            text = "_" + text
        else:
            text = units.canonical(text).replace("degree", "°")
    if value.node is None:
        if text.startswith("_") and not any(item.node for item in value.items):
            raise Unparsed("a condition on a set")
        items = [with_unit(item, token) if item.node else item for item in value.items]
        return value._replace(items=items, unit="")
    if value.unit and text:
        # 30° south of west, and 50% more.
        if value.unit in ("°", "%") and token.startswith("@") and text[0] != "_":
            return value._replace(remark=f"{value.remark} {text}".strip())
        raise Unparsed("two units")
    return value._replace(unit=text)


# --- two texts ---


def judge(answer: str, gold: str, parity: bool = False, tolerance: float | None = None) -> bool:
    """Does the text `answer` state what `gold` does? Not for several threads at once.

    Raises Unparsed if one of them cannot be read, or is too costly to work out.
    """
    try:
        return texts_agree(answer, gold, Rules(parity, tolerance))
    except Unparsed:
        raise
    except Exception as error:
        # Whatever a text has made fail, it is no answer.
        raise Unparsed(repr(error)[:200]) from error


def texts_agree(answer: str, gold: str, rules: Rules) -> bool:
    begin(answer, gold)
    if arrows_count(answer, gold):
        answer = ARROW.sub(r"\\arrow{\1\2}", answer)
        gold = ARROW.sub(r"\\arrow{\1\2}", gold)
    answer = clean(answer)
    gold = clean(gold)
    if rules.parity:
        answer = without_bases(answer)
        gold = without_bases(gold)
    if re.fullmatch(r"\(?[A-F]\)?", gold):
        answer = chosen_letter(answer)
    for pattern, replacement in IF_BOTH_HAVE_IT:
        if pattern.search(answer) and pattern.search(gold):
            answer = pattern.sub(replacement, answer)
            gold = pattern.sub(replacement, gold)
    if "\\binom" in answer + gold:
        answer = CHOOSE.sub(r"\\binom{\1}{\2}", answer)
        gold = CHOOSE.sub(r"\\binom{\1}{\2}", gold)

    gold_choice = CHOICE.fullmatch(gold)
    answer_choice = CHOICE.fullmatch(answer)
    if gold_choice and answer_choice:
        return choices_agree(answer_choice, gold_choice, rules)
    if gold_choice:
        letter_of, value = gold_choice.groups()
        return chosen_letter(answer).strip("()") == letter_of or cleaned_agree(answer, value, rules)
    if answer_choice and answer_choice[1] not in gold:
        answer = answer_choice[2]

    # P(1, 2) is the point (1, 2) if the other side has no name for it.
    if gold.startswith("(") and NAMED_POINTS.fullmatch(answer):
        answer = re.sub(r"[A-Z] ?\(", "(", answer)
    if answer.startswith("(") and NAMED_POINTS.fullmatch(gold):
        gold = re.sub(r"[A-Z] ?\(", "(", gold)
    return cleaned_agree(answer, gold, rules)


NAMED_POINTS = re.compile(r"[A-Z] ?\([^()]*,[^()]*\)(?:, ?[A-Z] ?\([^()]*,[^()]*\))*")
# What is a product if only one side has it, but is none if both do: T dS is not S dT, nor A × B
# B × A.
IF_BOTH_HAVE_IT = [
    (re.compile(r"(?<![a-z]{2})(?<!\\)(?<!\\d)d ?([A-Z])(?![a-zA-Z])"), r" \\dd \1"),
    (
        re.compile(r"(?<![a-zA-Z])([A-Z](?: ?_ ?\w)?) ?\\times ?(?=[A-Z](?![a-zA-Z]))"),
        r"\1\\crossproduct ",
    ),
]
# C(5, 2) may be a point, unless the other side has a binomial.
CHOOSE = re.compile(r"(?<![\w\\}])C ?\( ?(\w+), ?(\w+) ?\)")
# Letters that are marked as vectors; the bold ones from A to F may be choices, and i, j and k are
# vectors in any case.
ARROW = re.compile(
    r"\\(?:vec|overrightarrow|(?:mathbf|boldsymbol|bm)(?![\s{]*[A-F]))"
    r"(?:\s*{\s*(\\(?!pi|infty)[a-z]+|[a-dfghl-zA-Z])\s*}|\s+([a-dfghl-zA-Z]))"
)


def arrows_count(answer: str, gold: str) -> bool:
    r"""Is \vec{a} b another thing than a \vec{b}? Not if one side has just left some arrows out."""
    if "\\" not in answer or "\\" not in gold:
        return False
    marked = set(map("".join, ARROW.findall(answer)))
    marked_in_gold = set(map("".join, ARROW.findall(gold)))
    return not (marked < marked_in_gold or marked_in_gold < marked)


# (D) 42: the letter of a choice and its value, which is not another choice.
CHOICE = re.compile(
    r"@?\(?([A-F])[).][.:]? @? ?(?![-+*/^=<>,;&] |[+*/^=<>,;&]|and\b|or\b)((?:(?!\b[A-F]\b).)+)",
    re.S,
)


def choices_agree(answer: re.Match, gold: re.Match, rules: Rules) -> bool:
    """(D) 42 and (D) 42, but not (D) 43; of words the letter decides."""
    if answer[1] != gold[1]:
        return False
    if not re.search(r"\d", answer[2]) or not re.search(r"\d", gold[2]):
        return True
    return cleaned_agree(answer[2], gold[2], rules)


def cleaned_agree(answer: str, gold: str, rules: Rules) -> bool:
    # Texts that are written alike are equal, and need not be mathematics.
    is_words = are_words(answer, gold)
    answer_text = without_layout(answer, is_words)
    gold_text = without_layout(gold, is_words)
    if answer_text == gold_text:
        return answer_text != ""
    if is_words and len(gold_text) > 1 and answer_text.lower() == gold_text.lower():
        return True

    # HHT is an order and IV a numeral: neither is a product.
    for text in (answer.strip("@ "), gold.strip("@ ")):
        if re.fullmatch("[A-Z]{2,}|[A-Z][A-Z\\d]{2,}|[IVX]+", text) or is_short_word(text):
            return False
    if CLOCK.fullmatch(gold) and CLOCK.fullmatch(answer) and re.search("[:@]", gold + answer):
        return times_agree(gold, answer)
    if "\\emptyset" in (gold, answer) and any(map(NO_SOLUTION.fullmatch, (gold, answer))):
        return True
    return families_agree(gold, answer, rules)


NO_SOLUTION = re.compile(r"@?no (?:real )?solutions?@?", re.I)
CLOCK = re.compile(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?(?: ?@([ap]m)@)?")


def times_agree(gold: str, answer: str) -> bool:
    """7:30 is 07:30 and 7:30 a.m., but not 7:30 p.m. against a.m.; and 10 a.m. is 10:00."""
    *gold_digits, gold_half = CLOCK.fullmatch(gold).groups()
    *answer_digits, answer_half = CLOCK.fullmatch(answer).groups()
    if gold_half and answer_half and gold_half != answer_half:
        return False
    return [int(x or 0) for x in gold_digits] == [int(x or 0) for x in answer_digits]


WORDS = "no on up go do if is it in an as at of or so to"
SHORT_WORDS = set(WORDS.split())


def is_short_word(text: str) -> bool:
    """no and cat are words, ab and xyz products of letters, which stand in their order."""
    if not re.fullmatch("[a-z]{3}", text):
        return text in SHORT_WORDS
    return bool(re.search("[aeiou]", text)) and sorted(text) != list(text)


FAMILY = re.compile(
    r"(.*?)[,\s]+((?:\w(?:\s*,\s*)?)+)\\in\s*(\\mathbb\s*{?[ZN]}?(?:[\^_]\S+)?)$", re.S
)


def families_agree(gold: str, answer: str, rules: Rules) -> bool:
    """x = k pi with k in Z is x = n pi with n in Z."""
    gold_family = FAMILY.fullmatch(gold)
    answer_family = FAMILY.fullmatch(answer)
    if not (gold_family and answer_family):
        return equal(parse(gold), parse(answer), rules)
    gold_set = re.sub(r"[{}\s]", "", gold_family[3])
    if gold_set != re.sub(r"[{}\s]", "", answer_family[3]):
        return False
    gold_letters = tuple(re.findall(r"\w", gold_family[2]))
    answer_letters = tuple(re.findall(r"\w", answer_family[2]))
    if len(gold_letters) != len(answer_letters):
        return False
    if set(gold_letters) == set(answer_letters):
        answer_letters = gold_letters
    gold_value = parse(gold_family[1], gold_letters)
    return equal(gold_value, parse(answer_family[1], answer_letters), rules)


def without_bases(text: str) -> str:
    """Without the base of 52_8, and with round brackets only."""
    text = re.sub(r"(?<=\d)_({\d+}|\d+)", "", text)
    return text.replace("[", "(").replace("]", ")")


def chosen_letter(answer: str) -> str:
    """The letter of a choice: "(B) 12" and "B." are B; "(B), (C)" stays as it is."""
    another_letter = r"\b[A-F]\b(?! [a-z])"
    text_of_choice = rf"(?:\W{{1,9}}(?=\S)(?:(?!{another_letter}).)*)?"
    pattern = rf"^@?\(?([A-F])[).:]{text_of_choice}$"
    answer = re.sub(r"(?i)^@?(?:option|choice|answer) *@? *\(?([a-f])\)?@?$", r"\1", answer)
    return re.sub(pattern, r"\1", answer, flags=re.S)


def are_words(answer: str, gold: str) -> bool:
    has_word = re.search("[a-z]{3}|^@?no@?$", gold, re.I)
    has_formula = re.search(r"[\d\\^_=+{|]", answer + gold)
    return bool(has_word) and not has_formula


def without_layout(text: str, is_words: bool) -> str:
    """Without what makes no difference: blanks, the brackets of a choice, hyphens in words."""
    if is_words:
        # "No solutions" is "no solution".
        text = re.sub(r"(?i)^(@?no [a-z ]*[a-rt-z])s(?=[.@]*$)", r"\1", text)
        pattern = r"[@\s']|^\(|\)$|(?<=[a-z]{3})-(?=[a-z]{3})"
    else:
        # A blank beside a digit and another digit, a comma or a point stays.
        pattern = r"@|\\(?=[a-zA-Z])|(?<![\d,.])\s|\s(?![\d.])"
    return re.sub(pattern, "", text, flags=re.I).rstrip(".")
