r"""
The text of an answer -> tokens. People write one value in many ways: `clean` brings a text to one
spelling, by the ordered table REWRITES, and `tokenize` cuts it up.

    >>> tokenize(clean(r"$\tfrac12\text{ m}^2$"))
    ['\\frac', '{', '1', '}', '{', '2', '}', '@m^2@']

A token is a number, a letter, a \command, an _index, an @unit or @word, or a sign. A matrix and
each of its rows stand between ⟦ and ⟧. lib/mathexpr.py turns tokens into values.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from lib import units

MAX_CHARS = 8_000


class Unparsed(Exception):
    """Not mathematics that we can read, or too costly to work out."""


# --- the vocabulary ---

WITH_ARGUMENTS = (
    "asinh acosh atanh acoth asin acos atan sinh cosh tanh coth sech csch "
    "sin cos tan cot sec csc cis "
    "log lg exp sqrt abs floor ceil max min gcd lcm"
)
FUNCTIONS = WITH_ARGUMENTS.split()

CURRENCIES = {
    "$": "dollar",
    "€": "euro",
    "£": "gbp",
    "¥": "yen",
    "₹": "rupee",
    "₩": "won",
    "₽": "ruble",
    "₺": "lira",
    "₫": "dong",
    "₦": "naira",
    "₱": "peso",
    "฿": "baht",
    "₴": "hryvnia",
    "₪": "shekel",
    "¢": "cent",
    "元": "yuan",
    "円": "yen",
    "pounds": "gbp",
}
CODES = "USD|EUR|GBP|JPY|INR|RMB|CNY|CHF|AUD|CAD|HKD|SGD|NZD|KRW|THB|BRL|PLN|RUB|SEK|NOK"
MORE_CURRENCIES = "".join(CURRENCIES)[1:].removesuffix("pounds")

# Names that mean the same as another name or sign, with or without a backslash.
SYNONYMS = {
    "ln": "log",
    "le": "<=",
    "leq": "<=",
    "leqslant": "<=",
    "ge": ">=",
    "geq": ">=",
    "geqslant": ">=",
    "lt": "<",
    "gt": ">",
    "ne": "!=",
    "neq": "!=",
    "approx": "~",
    "simeq": "~",
    "equiv": "=",
    "cdot": "*",
    "times": "*",
    "div": "/",
    "bmod": "#",
    "mod": "#",
    "vert": "|",
    "mid": "|",
    "lbrace": "{",
    "rbrace": "}",
    "langle": "(",
    "rangle": ")",
    "varnothing": "emptyset",
    "infinity": "infty",
    "choose": "binom",
    "exponentialE": "e",
    "varphi": "phi",
    "varepsilon": "epsilon",
    "vartheta": "theta",
    "percent": "%",
    "pct": "%",
    "percentage": "%",
    "and": "&",
    "or": ";",
}

# Names that mean the same as another one only with a backslash.
COMMAND_SYNONYMS = {
    "ast": "*",
    "sim": "~",
    "approxeq": "~",
    "lbrack": "[",
    "rbrack": "]",
    "lparen": "(",
    "rparen": ")",
    "implies": "Rightarrow",
    "Longrightarrow": "Rightarrow",
    "longrightarrow": "to",
    "rightarrow": "to",
    "iff": "Leftrightarrow",
    "Longleftrightarrow": "Leftrightarrow",
    "Pr": "P",
    "land": "wedge",
    "lor": "vee",
    "lnot": "neg",
    "backslash": "setminus",
    "smallsetminus": "setminus",
    "dotsc": "dots",
    "infin": "infty",
    "degree": "°",
    "overrightarrow": "vec",
    "impliedby": "Leftarrow",
    "Longleftarrow": "Leftarrow",
    "longleftarrow": "leftarrow",
    "gets": "leftarrow",
    "owns": "ni",
    "Vert": "\\|",
    "lVert": "\\|",
    "rVert": "\\|",
}

# Names that are read without a backslash, as a pattern.
LETTERS = "pi infty alpha beta gamma delta theta lambda mu omega sigma tau phi rho"
NAMES = "|".join([*FUNCTIONS, *SYNONYMS, *LETTERS.split()])

# Characters that stand for another character or for a LaTeX command.
PLAIN_SIGNS = {
    "−": "-",
    "–": "-",
    "—": "-",
    "∗": "*",
    "﹡": "*",
    "÷": "/",
    "∕": "/",
    "⁄": "/",
    "º": "°",
    "′": "'",
    "’": "'",
    "％": "%",
    ";": ",",
    "&": ",",
}
COMMAND_SIGNS = {
    "×": "times",
    "·": "times",
    "⋅": "times",
    "⩾": "ge",
    "≧": "ge",
    "⩽": "le",
    "≦": "le",
    "≤": "le",
    "≥": "ge",
    "≠": "ne",
    "≈": "approx",
    "≡": "equiv",
    "±": "pm",
    "∓": "mp",
    "∞": "infty",
    "∪": "cup",
    "∩": "cap",
    "∈": "in",
    "∅": "emptyset",
    "∖": "setminus",
    "√": "sqrt",
    "∛": "sqrt[3]",
    "∜": "sqrt[4]",
    "⌊": "lfloor",
    "⌋": "rfloor",
    "⌈": "lceil",
    "⌉": "rceil",
    "→": "to",
    "⇒": "Rightarrow",
    "⇔": "Leftrightarrow",
    "∂": "partial",
    "∑": "sum",
    "∏": "prod",
    "∫": "int",
    "∧": "wedge",
    "∨": "vee",
    "∘": "circ",
    "⊂": "subset",
    "⊆": "subseteq",
    "∠": "angle",
    "π": "pi",
    "ℝ": "mathbb{R}",
    "ℤ": "mathbb{Z}",
    "ℕ": "mathbb{N}",
    "ℚ": "mathbb{Q}",
    "α": "alpha",
    "β": "beta",
    "γ": "gamma",
    "δ": "delta",
    "θ": "theta",
    "λ": "lambda",
    "μ": "mu",
    "ρ": "rho",
    "σ": "sigma",
    "φ": "phi",
    "ω": "omega",
    "Δ": "Delta",
    "Ω": "Omega",
}
SIGNS = str.maketrans(
    PLAIN_SIGNS
    # 2½ is 2 1/2, a mixed number. Unicode's normal form of ½ is 1⁄2.
    | {fraction: f" {fraction}" for fraction in "½⅓⅔¼¾⅛⅜⅝⅞"}
    | {sign: f"\\{command} " for sign, command in COMMAND_SIGNS.items()}
)


# --- replacements that need more than a pattern ---


def half_of_the_day(match: re.Match) -> str:
    """3:45 P.M. -> 3:45@pm@"""
    closer = "" if match[1] else match[3] or ""
    return f"@{match[2].lower()}m@{closer}"


def single_letter(match: re.Match) -> str:
    r"""\vec{v} -> v, and \hat{i} -> i; but \vec{AB} stays, as it is not the vector BA.

    A letter whose arrow counts is \arrow{v} before it comes here.
    """
    content = match[2] or match[3]
    if len(content) == 1 and (match[1] != "hat" or content in "ijk"):
        has_index = match.string[match.end() :].startswith("_")
        return content if has_index else f"{{{content}}}"
    return match[0]


def comma_or_colon(match: re.Match) -> str:
    return match[1] or ":"


def bracket_sign(match: re.Match) -> str:
    """The sign of a bracket that is written as a command."""
    signs = {"lbrack": "[", "rbrack": "]", "lbrace": "\\{", "rbrace": "\\}"}
    return signs[match[0].strip("\\")]


def outward_brackets(match: re.Match) -> str:
    """]1, 2[ -> (1, 2), and [1, 2[ -> [1, 2)"""
    before, opener, content, closer = match.groups()
    opener = "(" if opener == "]" else "["
    closer = ")" if closer == "[" else "]"
    return before + opener + content + closer


def without_blanks(match: re.Match) -> str:
    return match[0].replace(" ", "")


def currency(match: re.Match) -> str:
    """€36 -> 36@euro@"""
    sign = match[1].strip("\\")
    sign = CURRENCIES.get(sign, sign.lower().strip("."))
    return f"{match[2]}@{sign}@"


def ratio(match: re.Match) -> str:
    r"""2:4:6 -> a tuple of quotients, \ratio (1,(4)/(2),(6)/(2))"""
    first, others = match.groups()
    quotients = [f"({other})/({first})" for other in others.split(":")]
    return "\\ratio (1," + ",".join(quotients) + ")"


def repeating_decimal(match: re.Match) -> str:
    r"""0.1\overline{6} -> ((0+0.10)+6/90)"""
    whole, start, *periods = match.groups()
    period = next(filter(None, periods))
    whole = whole or "0"
    nines = "9" * len(period)
    zeros = "0" * len(start)
    return f"(({whole}+0.{start}0)+{period}/{nines}{zeros})"


def unit_of_commands(match: re.Match) -> str:
    r"""\mu\text{m} -> \text{μm}, and k\Omega -> \text{kΩ}"""
    if not is_behind_number_alone(match):
        return match[0]
    text = re.sub(r"\\(?:text|mathrm)(?![a-z])|[{}\s]", "", match[0])
    text = re.sub(r"\\mu", "μ", text)
    text = re.sub(r"\\(?:Omega|ohm)", "Ω", text)
    if "_" in text:
        text = {"M": "solar masses", "L": "solar luminosities", "R": "solar radii"}[text[0]]
    return f"\\text{{{text}}}"


WORDS = "two three four five six seven eight nine ten eleven twelve"
NUMBER_WORDS = WORDS.split()


def base_in_words(match: re.Match) -> str:
    base = next(filter(None, match.groups()))
    if base in NUMBER_WORDS:
        base = NUMBER_WORDS.index(base) + 2
    return f"_{{{base}}}"


def hexadecimal(match: re.Match) -> str:
    return match[1].upper() + "_"


def degrees(match: re.Match) -> str:
    return {"C": "@Celsius@", "F": "@Fahrenheit@"}.get(match[1] or match[2], "°")


def mixed_number(match: re.Match) -> str:
    r"""2 3/4 -> (2+\frac{3}{4})"""
    whole, *fraction = match.groups()
    if len(fraction) == 2:
        fraction = [f"\\frac{{{fraction[0]}}}{{{fraction[1]}}}"]
    return f"({whole.replace(',', '')}+{fraction[0]})"


# What a unit stands behind: a number, the end of a group, or another unit with its sign.
BEFORE_UNIT = re.compile(
    r"(?:[\d}]|\\(?:mathrm|text)\s*{[^{}]*}\s*(?:\^\s*{?-?\d+}?\s*)?(?:\\cdot|/))\s*$"
)


def unwrap_text(match: re.Match) -> str:
    r"""\text{...} and the like: letters and formulas go back into the formula, words and units
    become one token between @ signs; "3 and 4" is a list."""
    command = match[1]
    text = re.sub(r"\\(?:cdot|times)(?![a-z])", "·", match[2])
    text = re.sub(r"\\mu\s*(?![a-z])", "μ", text)
    text = re.sub(r"\\(?:Omega|ohm)(?![a-z])", "Ω", text)
    text = re.sub(r"[@\\]", " ", text).strip()

    # 5 min and 5 sec are times, but min(2, 3) is a function.
    is_behind_number = bool(BEFORE_UNIT.search(match.string[: match.start()]))
    has_argument = re.match(r"\s*[\\a-zA-Z\d({^_]", match.string[match.end() :])
    is_unit = is_behind_number and not has_argument and units.is_unit(text)
    is_name = re.match(r"\s*(?:=|\\approx)", match.string[match.end() :])
    if not (is_unit or is_name) and (text in FUNCTIONS or command.startswith("o")):
        return "\\" + re.sub(r"[^a-zA-Z]", "", text) + " "

    # Behind a number a single letter is a unit as well, unless it is a constant or a choice.
    pieces = []
    for piece in BETWEEN_ITEMS.split(text):
        pieces.append(unwrap_piece(piece, is_behind_number and not pieces))
    return "".join(pieces)


BETWEEN_ITEMS = re.compile(
    r"(\s*(?:,(?!\d{3}\b)|\b(?:and|or)\b"
    r"(?!\s*(?:more|less|fewer|greater|higher|lower|above|below|over|under|equal|at|not)\b))\s*)"
)


def unwrap_piece(piece: str, is_behind_number: bool) -> str:
    text = piece.strip()
    if text in ("and", "or", ","):
        return f" {text} "
    number = re.fullmatch(r"(-?\d[\d,./:]*) *([a-zA-Z][a-zA-Z ]*)", text)
    if number:
        return f" {number[1]} @{number[2]}@"
    if is_behind_number and not re.fullmatch(r"[eiId]|\([A-F]\)", text):
        is_word = re.search("[a-zA-Z]|[μΩÅ°%$]", text)
    else:
        is_word = re.search("[a-zA-Z]{2}", text)
    if is_word and text.strip(" ,") not in SYNONYMS:
        return f"@{text}@"
    return f" {text} "


def words_alone(match: re.Match) -> str:
    """dog bites man -> one token, Ann and Bob -> two"""
    text = match[0].replace("@", "")
    if set(re.findall("[a-zA-Z]{2,}", text)) <= set(NAMES.split("|")):
        return match[0]
    pieces = []
    for piece in BETWEEN_ITEMS.split(text):
        stripped = piece.strip()
        is_word = stripped not in ("and", "or", ",", "")
        pieces.append(f"@{stripped}@" if is_word and len(stripped) > 1 else f" {stripped} ")
    return "".join(pieces)


ATOMS = r"[\d.,^*/!\s]|\\(?:frac|sqrt|pi|times|cdot)(?![a-z])"
NUMBER_IN_BRACKETS = re.compile(rf"[({{](?:[-+]|{ATOMS})*[)}}]")
NUMBER_BEFORE_UNIT = re.compile(rf"\s*(?:-|\\pm)?(?:{ATOMS}|[(){{}}]|(?<=[{{(e])-|e(?=-?\d))*")
END_AFTER_UNIT = re.compile(r"\s*(?:\^\s*{?-?\d}?)?[\s)}\].]*")
BORDER = re.compile(r"[=,~@]|\b(?:or|and)\b|\\approx")


def mark_unit(match: re.Match) -> str:
    """5 m and 2.5e-3 m are lengths, but in 1+2m, (a+b)h and 2m^2-m a letter is a variable."""
    unit = match[0].strip()
    if len(unit) > 1 or is_behind_number_alone(match):
        return f"@{unit}@"
    return match[0]


def is_behind_number_alone(match: re.Match) -> bool:
    """Does nothing but a number stand before a letter, and nothing behind it?"""
    before = match.string[max(0, match.start() - 200) : match.start()]
    before = BORDER.split(before)[-1]
    for _ in range(4):
        before = NUMBER_IN_BRACKETS.sub("1", before)
    after = match.string[match.end() : match.end() + 50]
    after = BORDER.split(after)[0]
    return bool(NUMBER_BEFORE_UNIT.fullmatch(before) and END_AFTER_UNIT.fullmatch(after))


TEXT_COMMAND = (
    r"\\(text(?:bf|it|rm|normal|sf|tt|sc|up|md)?|mbox|mathrm|operatorname\*?|emph)"
    r"\s*{((?:[^{}]|\^\s*{-?\d+})*)}"
)
ABBREVIATED_UNIT = (
    r"(?:[ckmnd]?m|[mdc]?L|ml|mins?|in|ft|yd|mi|sq|[km]?g|lbs?|oz|hr?s?|mph|kph|kmh|[kMG]?Hz"
    r"|k[JWNV]"
    r"|kWh|k?Pa|[kMG]?eV|mol|k?cal|rpm|atm|th|st|nd|rd|secs?|seconds?|minutes?"
    rf"|{CODES}|[ap]m)\b(?![({{])"
    r"(?:\^{?\d}?)?(?:/(?:[ckm]?m|s|h|hr|min|sec|L|k?g|mol|day)\b(?:\^{?\d}?)?)*"
)
LOWER_CASE_WORD = rf"(?:(?<=[\d}})] )|(?<=\\pi ))(?!{NAMES}|abc|xyz)[a-z]{{3,}}\b"
UNIT = (
    r"(?:(?<=[\d})%])|(?<=\\pi))\s*"
    rf"(?:{ABBREVIATED_UNIT}|{LOWER_CASE_WORD})"
    r"(?: (?!or\b|and\b)[a-z]{2,}\b)*"
)


# Units with their powers and the signs between them.
ONE_UNIT = r"\\(?:text|mathrm|rm)\s*{[^{}]*}\s*(?:\^\s*{?-?\d}?\s*)?"
UNITS = rf"{ONE_UNIT}(?:(?:\\(?:cdot|times)(?![a-z])|\*|·)?\s*{ONE_UNIT}){{0,4}}"


def fraction_of_units(match: re.Match) -> str:
    r"""\frac{\mathrm{J}}{\mathrm{kg}\cdot\mathrm{K}} -> \text{J/kg K}"""
    sides = [re.sub(r"\\[a-z]+|[{}*·]", " ", side) for side in match.groups()]
    above, below = map(single_blanks, sides)
    return f"\\text{{{above}/{below}}}"


# What stands under a line without being a name.
NO_LETTERS = r"(?:[^a-zA-Z\\{}]|\\(?:text|mathrm)\s*{[^{}]*}|\\[a-zA-Z]+)*"


# --- the table ---


class Rewrite(NamedTuple):
    """What `pattern` finds becomes `replacement`. example: a text and what the rule makes of it."""

    pattern: str
    replacement: str | Callable[[re.Match], str]
    example: tuple[str, str]


def large_number(word: str, zeros: int) -> Rewrite:
    return Rewrite(
        rf"(?<=[\d}}])\s*(\\text\s*{{)?\s*\b{word}s?\b",
        rf"*10^{zeros} \1",
        example=(f"5 {word}", f"5*10^{zeros}"),
    )


# They are applied in this order. After each, runs of blanks become one blank.
REWRITES = [
    # Escaping: backslashes that were doubled on the way.
    Rewrite(
        r"(?<!\\)\\\\(?=[a-zA-Z]{2})",
        r"\\",
        example=(r"\\frac{1}{2}", r"\frac{1}{2}"),
    ),
    Rewrite(
        r"\\\\\\\\",
        r"\\\\",
        example=(r"1 \\\\ 2", r"1 \\ 2"),
    ),
    Rewrite(
        r"\\\\\s*$",
        "",
        example=("4\\\\", "4"),
    ),
    # A product of vectors does not commute.
    Rewrite(
        r"\\times(?=\s*{?\s*\\(?:vec|arrow|mathbf|boldsymbol|bm|overrightarrow)(?![a-z])"
        r"\s*{?\s*[a-zA-Z])",
        r"\\crossproduct ",
        example=(r"\vec{a}\times\vec{b}", r"\vec{a}\crossproduct \vec{b}"),
    ),
    # Differentials. An upright d is one whatever follows, and so is a d behind a thin space.
    Rewrite(
        r"\\(?:mathrm|text|operatorname|mathop)\s*(?:{\s*d\s*}|\s+d(?![a-z]{2}))\s*"
        r"(?=[a-zA-Z](?![a-zA-Z])|\\[a-z]+)",
        r" \\dd ",
        example=(r"x\,\mathrm{d}x", r"x\, \dd x"),
    ),
    Rewrite(
        r"(?<!\d)\\,\s*d ?(?=[a-zA-Z](?![a-zA-Z]))",
        r" \\dd ",
        example=(r"P\,dV", r"P \dd V"),
    ),
    Rewrite(
        r"(?<![\\a-z])d ?(\^ ?{?\d}?)? ?([a-zA-Z])? ?/"
        r" ?d ?([a-zA-Z](?: ?\^ ?{?\d}?)?)(?![a-zA-Z_])",
        r"\\frac{d\1 \2}{d \3}",
        example=("dP/dV", r"\frac{d P}{d V}"),
    ),
    Rewrite(
        r"(\\partial ?(?:\^ ?{?\d}?)?(?: ?(?:\\[a-z]+|[a-zA-Z])(?:_\w)?)?) ?/"
        r" ?((?:\\partial ?(?:\\[a-z]+|[a-zA-Z])(?: ?\^ ?{?\d}?)? ?){1,3})"
        r"(?![a-zA-Z_^/]|\\partial)",
        r"\\frac{\1}{\2}",
        example=(r"\partial f/\partial x", r"\frac{\partial f}{\partial x}"),
    ),
    # Layout without meaning.
    Rewrite(
        r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)(?![a-z])",
        " ",
        example=(r"\boxed{5}", r"{5}"),
    ),
    Rewrite(
        r"(?<=\d)\s*{\s*([,:])\s*}\s*(?=\d)|\\(colon)(?![a-z])\s*",
        comma_or_colon,
        example=("14{,}916", "14,916"),
    ),
    Rewrite(
        r"\\left\s*\\{(?=\s*\\begin)(.*?)\\right\s*\.",
        r"\1",
        example=(
            r"\left\{\begin{array}{l}x=1\end{array}\right.",
            r"\begin{array}{l}x=1\end{array}",
        ),
    ),
    Rewrite(
        r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?\s*",
        "",
        example=(r"\left(1, 2\right)", "(1, 2)"),
    ),
    Rewrite(
        r"\\(?:displaystyle|textstyle|scriptstyle|n?o?limits|ensuremath|tiny|small|normalsize"
        r"|large|Large|LARGE|huge|Huge|centering|bf|rm|it|boldsymbol|bm"
        r"|math(?:bf|it|sf|tt|cal|normal)|mathopen|mathclose)"
        r"(?![a-zA-Z])",
        " ",
        example=(r"\displaystyle 2", "2"),
    ),
    Rewrite(
        r"\\(vec|overrightarrow|hat)\s*(?:{\s*(\\?[a-zA-Z]+)\s*}|(\\[a-zA-Z]+|[a-zA-Z]))",
        single_letter,
        example=(r"\vec{v}", "{v}"),
    ),
    Rewrite(
        r"\\(?:text)?color(?:box)?\s*{\s*\w+\s*}|\\phantom\s*{[^{}]*}",
        " ",
        example=(r"\textcolor{blue}{13}", "{13}"),
    ),
    # A line under a number or a point stresses it; \underline{AB} is a name.
    Rewrite(
        rf"\\underline(?=\s*{{{NO_LETTERS}"
        rf"(?:{{{NO_LETTERS}(?:{{{NO_LETTERS}}}{NO_LETTERS})*}}{NO_LETTERS})*}})",
        " ",
        example=(r"\underline{(3, -2)}", "{(3, -2)}"),
    ),
    Rewrite(
        r"(?:\\text\s*)?{\s*([-+])\s*}",
        r"\1",
        example=("{-}4", "-4"),
    ),
    Rewrite(
        r"(?:\\(?:checkmark|blacksquare|square|Box|qed|qquad|quad)|[✓✔■□∎])\s*[.}$]*$",
        "",
        example=(r"4\checkmark", "4"),
    ),
    Rewrite(
        r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in|px|mu|pc|bp)\s*\]",
        r"\\\\",
        example=(r"1 \\[4pt] 2", r"1 \\ 2"),
    ),
    Rewrite(
        r"\\l(?:brack|brace)(?![a-z])|\\r(?:brack|brace)(?![a-z])",
        bracket_sign,
        example=(r"\lbrack 1, 2\rbrack", "[ 1, 2]"),
    ),
    Rewrite(
        r"(^|\\cup\s*|\\in\s*|=\s*)([\]\[])([^\[\]()]+,[^\[\]()]+)([\[\]])(?=\s*(?:$|\\cup|\$))",
        outward_brackets,
        example=("]1, 2[", "(1, 2)"),
    ),
    Rewrite(
        r"\\!\s*|{}(?=\s*\^)|(?<=\d)\\,(?=\d{3}(?!\d))|\b(?:np|numpy|math)\.(?=[a-z])",
        "",
        example=(r"14\,916 + np.sqrt(2)", "14916 + sqrt(2)"),
    ),
    # Ways to write numbers and times.
    Rewrite(
        r"(?<=\d)(?:\s|\\[ ,;:]|~)*(\\text\s*{)?\s*\bdozens?\b(?: of\b)?",
        r"*12 \1",
        example=("3 dozen", "3*12"),
    ),
    large_number("hundred", 2),
    large_number("thousand", 3),
    large_number("million", 6),
    large_number("billion", 9),
    large_number("trillion", 12),
    Rewrite(
        rf"\\text(?:bf|rm)?\s*{{\s*((?:\\\$|Rs\b\.?|[{MORE_CURRENCIES}])?"
        r"\s*[-+]?\s*[\d.,]*)\s*}(?=.)",
        r"\1",
        example=(r"\text{-}4", "-4"),
    ),
    Rewrite(
        rf"(?<![a-zA-Z])(Rs\b\.?|{CODES})\s*(\d(?:[\d,]*\d)?(?:\.\d+)?)",
        currency,
        example=("Rs. 36", "36@rs@"),
    ),
    Rewrite(
        r"(?<=\d)['’](?=\d{3}(?!\d))",
        "",
        example=("14'916", "14916"),
    ),
    Rewrite(
        r"\\?\blog(2|10)\s*\(",
        r"\\log_{\1}(",
        example=("log10(2)", r"\log_{10}(2)"),
    ),
    Rewrite(
        r"(?:\b(?:US|AU|CA|NZ|HK|A|C|S))?"
        rf"(\\\$|\\(?:pounds|euro|yen)(?![a-z])|[{MORE_CURRENCIES}])\s*"
        r"(\d(?:[\d,]*\d)?(?:\.\d+)?(?:\*10\^\d+)?)",
        currency,
        example=("€36", "36@euro@"),
    ),
    Rewrite(
        r"(?<=[\d}])(?:\s|\\[,;: ]|~)*"
        rf"(\\(?:pounds|euro|yen|cent)(?![a-z])|[{MORE_CURRENCIES}])()",
        currency,
        example=("36 €", "36@euro@"),
    ),
    Rewrite(
        r"\\(?:pounds|euro|yen)(?![a-z])",
        " ",
        example=(r"x = \pounds y", "x = y"),
    ),
    Rewrite(
        r"(?<=\d)\s*x\s*(?=10\s*\^)",
        "*",
        example=("3 x 10^8", "3*10^8"),
    ),
    Rewrite(
        r"(?i)(?<=\d)(?:\s|\\[ ,;:]|~)*(\\text\s*{)?\s*\b([ap])\.?m\b\.?(\s*})?",
        half_of_the_day,
        example=(r"3:45\text{ P.M.}", "3:45@pm@"),
    ),
    # Markdown, program notation, signs with several names.
    Rewrite(
        r"^(\*\*?|`)([^*`]*)\1$",
        r"\2",
        example=("**5**", "5"),
    ),
    Rewrite(
        r"\\%",
        "%",
        example=(r"50\%", "50%"),
    ),
    Rewrite(
        r"\*\*",
        "^",
        example=("10**5", "10^5"),
    ),
    Rewrite(
        r"\\prime",
        "'",
        example=(r"x^{\prime}", "x^{'}"),
    ),
    Rewrite(
        r"(?<=[\d)])!=",
        "! =",
        example=("3!=6", "3! =6"),
    ),
    Rewrite(
        r"\\not\s*=",
        r"\\ne ",
        example=(r"x \not= 1", r"x \ne 1"),
    ),
    Rewrite(
        r"\\[lc]dots|\\dots[bcim]|\.\.\.",
        r"\\dots ",
        example=(r"1, 2, \ldots, 9", r"1, 2, \dots , 9"),
    ),
    Rewrite(
        r"{([^{}]*)\\choose(?![a-z])([^{}]*)}",
        r"\\binom{\1}{\2}",
        example=(r"{n\choose k}", r"\binom{n}{ k}"),
    ),
    # A sum over all n from 0 on.
    Rewrite(
        r"(\\(?:sum|prod|bigcup|bigcap)\s*_\s*{\s*[a-z]\s*)(?:\\geq?(?:slant)?(?![a-z])|>=)"
        r"\s*(-?\d+)\s*}(?!\s*\^)",
        r"\1=\2}^{\\infty}",
        example=(r"\sum_{n\ge 0} x^n", r"\sum_{n=0}^{\infty} x^n"),
    ),
    # Any integer k.
    Rewrite(
        r"[,;.\s]*(?:\\q?quad|\\[ ,;])*\s*\(?\s*(?:\\text\s*{\s*)?"
        r"(?:\b(?:for|where|with|and|when)\b)?(?: (?:some|any|all|every|each))?\s*}?"
        r"\s*\(?\s*(?<![a-zA-Z\\{])([a-z](?:\s*,\s*[a-z]){0,5})\s*"
        r"(?:\\in\s*(?:\\math(?:bb|bf)\s*{?\s*Z\s*}?|\\?Z\b|\\text\s*{\s*Z\s*})"
        r"|\s*(?:\\text\s*{)?\s*(?:is|are) (?:an |any )?integers?\s*}?)\s*\)?$",
        r", \1\\in \\mathbb{Z}",
        example=(r"k\pi\ (k \in \mathbb{Z})", r"k\pi, k\in \mathbb{Z}"),
    ),
    Rewrite(
        r"[,;.\s]*(?:\\text\s*{\s*|\()?\b(?:for|where|with) "
        r"(?:some |any |all |every |each )?integers?"
        r"[\s}$]*([a-z])[\s)}]*$",
        r", \1\\in \\mathbb{Z}",
        example=(r"k\pi\text{ for any integer }k", r"k\pi, k\in \mathbb{Z}"),
    ),
    Rewrite(
        r"^(?:\\text\s*{\s*)?(?i:all reals?)(?: numbers?| values)?(?: of x| x)?\s*}?$",
        r"\\mathbb{R}",
        example=("all real numbers", r"\mathbb{R}"),
    ),
    # "For all real x" at the end, and the small words of systems and cases.
    Rewrite(
        r"(?:\\text\s*{\s*)?(?:"
        r"\bfor (?:all|any|every)(?: (?:real|rational|positive|integers?|natural|numbers?))*\b"
        r"|\\forall)"
        r"[\s}$]*[a-z](?:\s*\\in\s*\\mathbb\s*{?[RNZQ]}?(?:\^{?[+*]}?)?)?$",
        "",
        example=(r"2x \text{ for all real } x", "2x"),
    ),
    # A parameter that may be any real number.
    Rewrite(
        r"(?:[\s,;]|\\[ ,;]|\\q?quad(?![a-z])){0,6}"
        r"(?:[,;(]|\b(?:for|where|with)\b|\\text\s*{\s*(?:for|where|with)\s*})"
        r"(?:\s|\\[ ,;]|\\q?quad(?![a-z])){0,4}"
        r"[a-z](?:\s*,\s*[a-z]){0,5}\s*\\in\s*\\mathbb\s*(?:{\s*R\s*}|R)\s*\)?$",
        "",
        example=(r"(t, 2t), t\in\mathbb{R}", "(t, 2t)"),
    ),
    Rewrite(
        r",\s*(?=[=<>])|\\text\s*{\s*(?:if|for|when)\s*}",
        " ",
        example=(r"1, \text{if } x,>0", "1, x >0"),
    ),
    # A matrix becomes a tuple of its rows, which are tuples.
    # Double bars make a norm, of which nothing is known.
    Rewrite(
        r"\\begin\s*{Vmatrix}(.*?)\\end\s*{Vmatrix}",
        r"\\| \\begin{matrix}\1\\end{matrix} \\|",
        example=(
            r"\begin{Vmatrix}1\end{Vmatrix}",
            r"\| \begin{matrix}1\end{matrix} \|",
        ),
    ),
    Rewrite(
        r"\\begin\s*{vmatrix}",
        r"\\det ⟦⟦",
        example=(r"\begin{vmatrix}1", r"\det ⟦⟦1"),
    ),
    Rewrite(
        r"\\begin\s*{(?:array}\s*{[^{}]*|[bpBv]?(?:small)?matrix|cases|aligned|align\*)}",
        "⟦⟦",
        example=(r"\begin{array}{cc}1", "⟦⟦1"),
    ),
    Rewrite(
        r"[,;.]?\s*(?:\\\\\s*)?"
        r"\\end\s*{(?:array|[bpBv]?(?:small)?matrix|cases|aligned|align\*)}",
        "⟧⟧",
        example=(r"y=2.\\\end{cases}", "y=2⟧⟧"),
    ),
    Rewrite(
        r"[,;.]?\s*\\\\|\\(?=[-\d])",
        "⟧, ⟦",
        example=(r"⟦⟦1,2\\3,4⟧⟧", "⟦⟦1,2⟧, ⟦3,4⟧⟧"),
    ),
    # Sets: the set of all x with x > 2 is x > 2, and a minus before a set takes away.
    Rewrite(
        r"\\{ ?(\w) ?(?:\\in ?\\mathbb ?{?R}? ?)?(?:\\mid|[|:])((?:[^{}]|{[^{}]*})*)\\}",
        r"\2",
        example=(r"\{x \mid x > 2\}", "x > 2"),
    ),
    Rewrite(
        r"-\s*(?=\\{)",
        r"\\setminus ",
        example=(r"\mathbb{R} - \{0\}", r"\mathbb{R} \setminus \{0\}"),
    ),
    Rewrite(
        r"\\(?:begin|end)\s*{\w+\*?}|(?<!\\)\\[,;:> ]"
        r"|\\(?:q?quad|(?:thin|med|thick|en)space|hfill|null)(?![a-z])|\\hspace\s*{[^{}]*}"
        r"|~|\\?[$€£]|\\[()\[\]]",
        " ",
        example=(r"$5\,m\quad$", "5 m"),
    ),
    Rewrite(
        r"(?<![\d.,\w^_/{}] )(?<![\w.,^_{}/])\d{1,3}(?: \d{3})+(?![\w/]| \d)(?=[^ ]|$| [^\d])",
        without_blanks,
        example=("14 916", "14916"),
    ),
    # A modulus is a condition, kept like a unit: 3 (mod 7) may be answered by 3, not by 3 (mod 8).
    Rewrite(
        r"\\pmod\s*({(?:[^{}]|{\w*})*}|\w+)",
        r"(\\mod \1)",
        example=(r"3 \pmod{7}", r"3 (\mod {7})"),
    ),
    Rewrite(
        r"(\\equiv[^()]{0,99}?)\\?b?mod(?![a-z])\s*([^()\s]+)$",
        r"\1(\\mod \2)",
        example=(r"x \equiv 3 \mod 7", r"x \equiv 3 (\mod 7)"),
    ),
    Rewrite(
        r"\(\s*(?:\\(?:text|mathrm|operatorname)\s*{\s*mod\s*}|\\?b?mod)\s*([^()]*)\)",
        r"\\bmod{\1}@≡\1@",
        example=(r"3 (\mod 7)", r"3 \bmod{7}@≡7@"),
    ),
    # Fractions, roots, functions, indices.
    Rewrite(
        r"(?<=\d)(?:\s|\\[ ,;:]|~)*(?:\\text\s*{\s*\(?\s*(?:in )?base (\d+)\s*\)?\s*}"
        r"|(?:\\text\s*{\s*(?:in )?base\s*}|\b(?:in )?base) ?(\d+)|\((?:in )?base (\d+)\))",
        base_in_words,
        example=(r"52\text{ (base 8)}", "52_{8}"),
    ),
    Rewrite(
        rf"(?<=\d)_\s*{{?\s*\\text\s*{{\s*({'|'.join(NUMBER_WORDS)})\s*}}\s*}}?",
        base_in_words,
        example=(r"54_{\text{six}}", "54_{6}"),
    ),
    Rewrite(
        r"^(?=[\dA-F]*[a-f])(?=[a-fA-F]*\d)([\da-fA-F]+) ?_ ?(?={? ?16 ?}?$)",
        hexadecimal,
        example=("3a_{16}", "3A_{16}"),
    ),
    Rewrite(
        r"(?<=\d)_\s*{?\s*\(\s*(\d+)\s*\)\s*}?",
        r"_{\1}",
        example=(r"42_{(5)}", "42_{5}"),
    ),
    Rewrite(
        r"(?<![\w.}])(?:{}\s*)?[_^]\s*{?(\d+)}?\s*C\s*_?{?(\d+)}?(?!\w)",
        r"\\binom{\1}{\2}",
        example=("{}_5C_2", r"\binom{5}{2}"),
    ),
    Rewrite(
        r"(?<![\w.}^_{])(\d+)C(\d+)(?!\w)",
        r"\\binom{\1}{\2}",
        example=("5C2", r"\binom{5}{2}"),
    ),
    Rewrite(
        r"\\(?:[dtcs]|nice|flat)(frac|binom)(?![a-z])",
        r"\\\1",
        example=(r"\dfrac{1}{2}", r"\frac{1}{2}"),
    ),
    Rewrite(
        r"\\(frac|binom)\s*(\d)\s*(\d+)",
        r"\\\1{\2}{\3}",
        example=(r"\frac12", r"\frac{1}{2}"),
    ),
    Rewrite(
        r"arc(?=sin|cos|tan|coth)|(?<![a-zA-Z])ar(?=(?:sin|cos|tan|cot)h)",
        "a",
        example=(r"\arcsin x", r"\asin x"),
    ),
    # Behind a function ^ takes one digit, as in TeX: \sin^22x.
    Rewrite(
        r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)\s*\^)\s*([2-9])(?=\d)",
        r"\1{\2}",
        example=(r"\sin^22x", r"\sin^{2}2x"),
    ),
    Rewrite(
        r"\\?(sinh?|cosh?|tanh?|coth)\s*\^\s*{\s*-\s*1\s*}",
        r"\\a\1",
        example=(r"\tan^{-1} x", r"\atan x"),
    ),
    Rewrite(
        r"\\?sqrt\s*\[([^\[\]]*)\]",
        r"\\sqrt_{\1}",
        example=(r"\sqrt[3]{8}", r"\sqrt_{3}{8}"),
    ),
    Rewrite(
        r"\^\s*{?\s*('[\s']*)}?",
        r"\1",
        example=("x^{'}", "x'"),
    ),
    # Degrees and ordinals.
    Rewrite(
        r"(?:\^\s*{?\s*\\circ\s*}?|\\degrees?(?![a-z])|°)"
        r"(?:\s*\\(?:text|mathrm)\s*{\s*([CF])\s*}|\s*([CF])\b)?",
        degrees,
        example=(r"25^{\circ}\mathrm{C}", "25@Celsius@"),
    ),
    Rewrite(
        r"\^\s*{?\s*(?:\\(?:text|mathrm|mbox)\s*{(?:th|st|nd|rd)}|th\b)\s*}?",
        "",
        example=(r"5^{\text{th}}", "5"),
    ),
    Rewrite(
        r"(?<=\w[a-z])\.(?= )",
        "",
        example=("7 sq. ft.", "7 sq ft."),
    ),
    Rewrite(
        r"\\mathbb\s*{?\s*([EP])\s*}?\s*(?=[(\[])",
        r"\1",
        example=(r"\mathbb{E}[X]", "E[X]"),
    ),
    # Positive and negative numbers: intervals, and of integers one name.
    Rewrite(
        r"\\mathbb\s*{?\s*R(?:\s*})?\s*[\^_]\s*{?\s*(?:\+|>\s*0)\s*}?",
        r"(0,\\infty)",
        example=(r"\mathbb{R}^+", r"(0,\infty)"),
    ),
    Rewrite(
        r"\\mathbb\s*{?\s*R(?:\s*})?\s*[\^_]\s*{?\s*\\ge(?:q|qslant)?\s*0\s*}?",
        r"[0,\\infty)",
        example=(r"\mathbb{R}_{\ge 0}", r"[0,\infty)"),
    ),
    Rewrite(
        r"\\mathbb\s*{?\s*R(?:\s*})?\s*[\^_]\s*{?\s*(?:-|<\s*0)\s*}?",
        r"(-\\infty,0)",
        example=(r"\mathbb{R}^-", r"(-\infty,0)"),
    ),
    Rewrite(
        r"\\mathbb\s*{?\s*Z(?:\s*})?\s*[\^_]\s*{?\s*(?:\+|>\s*0|\\ge(?:q|qslant)?\s*1)\s*}?",
        r"\\mathbb{Z^+}",
        example=(r"\mathbb{Z}_{>0}", r"\mathbb{Z^+}"),
    ),
    Rewrite(
        r"\\mathbb\s*{?\s*Z(?:\s*})?\s*[\^_]\s*{?\s*(?:-|<\s*0)\s*}?",
        r"\\mathbb{Z^-}",
        example=(r"\mathbb{Z}^-", r"\mathbb{Z^-}"),
    ),
    Rewrite(
        r"\\mathbb\s*{?\s*R(?:\s*})?(?![\s}]*(?:\^ ?{? ?[\dmn]|\[))",
        r"(-\\infty,\\infty)",
        example=(r"\mathbb{R}", r"(-\infty,\infty)"),
    ),
    Rewrite(
        r"\^\s*({[^{}]*}|\w|\\[a-z]+)\s*_\s*({[^{}]*}|\w)",
        r"_\2^\1",
        example=("x^2_1", "x_1^2"),
    ),
    # Ratios of three and more, repeating decimals, mixed numbers.
    Rewrite(
        r"(?:^|(?<==))([^:,=]+):([^:,=]+(?::[^:,=]+)+)$",
        ratio,
        example=("2:4:6", r"\ratio (1,(4)/(2),(6)/(2))"),
    ),
    Rewrite(
        r"(?<!\d)(\d{0,20})\.(\d{0,12}?)(?:(\d)\3{2,20}|(\d{2,9}?)\4{1,5})\s*\\dots(?![a-z])",
        repeating_decimal,
        example=(r"0.1666\dots", "((0+0.10)+6/90)"),
    ),
    Rewrite(
        r"(\d\.\d+)\s*\\dots\s*$",
        r"\1",
        example=(r"3.14\dots", "3.14"),
    ),
    Rewrite(
        r"\^\s*{?(\d+)}?\s*/\s*_\s*{?(\d+)}?",
        r"\\frac{\1}{\2}",
        example=("^1/_2", r"\frac{1}{2}"),
    ),
    Rewrite(
        r"(?<=\.)(\d{0,20})\\dot\s*{?(\d)}?(\d{0,18})\\dot\s*{?(\d)}?",
        r"\1\\overline{\2\3\4}",
        example=(r"0.\dot{1}4285\dot7", r"0.\overline{142857}"),
    ),
    Rewrite(
        r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)(?:\s*{(\d{1,20})}|\s*(\d))|\((\d{1,20})\))"
        r"(?:\.\.\.|\\dots\b)?(?!\d)",
        repeating_decimal,
        example=(r"0.1\overline{6}", "((0+0.10)+6/90)"),
    ),
    Rewrite(
        r"(?<![\w.,^}/*])(\d+(?:,\d{3})*) +(\d+)/(\d+)",
        mixed_number,
        example=("2 3/4", r"(2+\frac{3}{4})"),
    ),
    Rewrite(
        r"(?<![\w.,^}])(\d+(?:,\d{3})*)\s*(\\frac\s*{\d+}\s*{\d+})",
        mixed_number,
        example=(r"2\frac{3}{4}", r"(2+\frac{3}{4})"),
    ),
    Rewrite(
        r"(?<![\w.^}/])(\d+)/(\d+)(?=\s*(?!and\b|or\b)[a-zA-Z\\(])",
        r"\\frac{\1}{\2}",
        example=("1/2x", r"\frac{1}{2}x"),
    ),
    # Feet, as in 5'.
    Rewrite(
        r"(?<![\w.^])([\d.]+)[\s']*'(?!\s*\d)",
        r"\1",
        example=("5'", "5"),
    ),
    Rewrite(
        r"(\d\.\d*)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*{?\s*([-+]?\d+)\s*}?(?![\d}])",
        r"\1e\2",
        example=(r"1.6 \times 10^{-19}", "1.6e-19"),
    ),
    # Units that are commands.
    Rewrite(
        r"(?<=[\d}])\s*(?:\\mu\s*"
        r"(?:\\(?:text|mathrm)\s*{\s*[A-Za-z]{1,3}\s*}|[mgsLFACHJNWTV](?![a-zA-Z\d_^(]))"
        r"|(?:\\(?:text|mathrm)\s*{\s*)?[kMGm]?(?:\s*})?\s*\\(?:Omega|ohm)(?![a-zA-Z_^(])"
        r"|Å"
        r"|(?:\\(?:text|mathrm)\s*{)?\s*[MLR]\s*(?:})?_\s*{?\s*\\(?:odot|sun)(?![a-z])\s*}?)"
        r"(?=[\s.)}\]]*(?:$|,|\\text|=|@|and\b|or\b))",
        unit_of_commands,
        example=(r"10\mu\text{F}", r"10\text{μF}"),
    ),
    # Words and units.
    Rewrite(
        rf"\\[dt]?frac\s*{{\s*({UNITS})}}\s*{{\s*({UNITS})}}",
        fraction_of_units,
        example=(r"5\frac{\mathrm{m}}{\mathrm{s}}", r"5\text{m/s}"),
    ),
    Rewrite(
        r"(?<=[\d}])\s*\(((?:\s|\\(?:text|mathrm)\s*{[^{}]*}|\^\s*{?-?\d}?|/|\\cdot)+)\)",
        r"\1",
        example=(r"10(\text{cm})", r"10\text{cm}"),
    ),
    Rewrite(
        r"(?<=\d)\s*\(([a-zA-Z]{2,}(?:\^?\d|[ /][a-zA-Z]+)*)\)$",
        r"\\text{\1}",
        example=("180 (days)", r"180\text{days}"),
    ),
    Rewrite(
        TEXT_COMMAND,
        unwrap_text,
        example=(r"5\text{ cm}", "5@cm@"),
    ),
    Rewrite(
        UNIT,
        mark_unit,
        example=("60 miles per hour", "60@miles per hour@"),
    ),
    # Behind a number and at the end "times" is no sign.
    Rewrite(
        r"(?<=[\d}]) ?\btimes((?: (?:as|more|less|the|larg|great|bigg|small|fast|long)[a-z ]*)?)$",
        r"@times\1@",
        example=("3 times as many", "3@times as many@"),
    ),
    Rewrite(
        r"^@([^@:]*?)(?:(?: is|:| is:)@|@ ?:) ?(?=[-\d\\$(])",
        r"@\1@ = ",
        example=("@The area is@ 48", "@The area@ = 48"),
    ),
    # A text of words alone.
    Rewrite(
        r"^(?=[^@]*[a-zA-Z]{3})(?=[^@]* )[a-zA-Z](?:[a-zA-Z ,.'-]|@[a-zA-Z ,.'-]*@)*$",
        words_alone,
        example=("dog bites man", "@dog bites man@"),
    ),
]
COMPILED = [(re.compile(rule.pattern), rule.replacement) for rule in REWRITES]


def apply(pattern, replacement, text: str) -> str:
    """Apply one rule to a text. On long runs of blanks some patterns would take quadratic time."""
    return single_blanks(re.sub(pattern, replacement, text))


def single_blanks(text: str) -> str:
    return " ".join(text.split())


# --- the two steps ---


@functools.lru_cache(256)
def clean(text: str) -> str:
    r"""One spelling for what people write in many.

    >>> clean(r"\dfrac12 \text{ cm}")
    '\\frac{1}{2} @cm@'

    Raises Unparsed if the text is too long.
    """
    text = INVISIBLE.sub("", text[: 2 * MAX_CHARS])
    # @ marks words and units further down.
    text = text.replace("\\&", ", ").replace("@", "\\at ")
    text = ANGSTROM.sub("Å", text)
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-ⁿ]+", r"^{\g<0>}", text)
        text = re.sub("[₀-ₙ]+", r"_{\g<0>}", text)
        text = unicodedata.normalize("NFKC", text.translate(SIGNS))
    text = single_blanks(text.translate(SIGNS))
    if len(text) > MAX_CHARS:
        raise Unparsed("too long")

    # Most rules find nothing, and a search takes a fraction of the time of a replacement.
    for pattern, replacement in COMPILED:
        if pattern.search(text):
            text = single_blanks(pattern.sub(replacement, text))

    # The exponents of units, and the signs between them: kg * m / s is one unit.
    if "@" in text:
        text = re.sub(r"@([^@]+)@\s*\^\s*{?\s*(-?\d+)\s*}?", r"@\1^\2@", text)
        text = re.sub(r"@\s*(?:\*|\\cdot|\\times)?\s*@", " ", text)
        text = re.sub(r"@\s*/\s*@", "/", text)

    # What stands at the ends without a meaning, and braces that nobody has opened.
    text = text.lstrip(" =:").rstrip(" =")
    text = NEAR_AT_START.sub("", text)
    while text.endswith("}") and text.count("}") > text.count("{"):
        text = text[:-1]
    return text.rstrip(".,: \\")


# Characters without a width, and the mark of a byte order.
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufeff]")
ANGSTROM = re.compile(r"\\(?:AA|angstrom)(?![a-zA-Z])")
NEAR_AT_START = re.compile(r"^\\(?:approx|simeq|approxeq|sim)(?![a-zA-Z])\s*")

NUMBER = (
    # 1,234 with commas, unless it stands in a bracket, where commas separate.
    r"[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d*)?(?![^(\[]{0,99}[)\]])"
    r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?!\d))?"
)
DIFFERENTIAL = (
    r"(?:d ?(?:[xyztuvwrs]|\\(?:theta|phi|varphi|tau|mu|rho|omega)(?![a-z]))"
    r"|\\dd (?:[a-zA-Z]|\\[a-z]+))(?![a-zA-Z])"
)
LONG_FUNCTIONS = "|".join(name for name in FUNCTIONS if len(name) > 2)
TOKEN = re.compile(
    r"\s*(?:"
    # a name
    rf"((?!\\dd )\\[a-zA-Z]+|{LONG_FUNCTIONS}|(?:{NAMES})(?![a-zA-Z]))"
    # a word: four letters or more that end like one and have a vowel
    r"|(?=[a-zA-Z]{4})([A-Z]?[a-z]{0,20}[aeiou][a-z]{0,20}(?![a-zA-Z]))"
    # all others: a number, a unit or word between @, a relation, an index, a sign
    rf"|({NUMBER}|@[^@]*@|{DIFFERENTIAL}|\\.|[<>!]=|!!"
    r"|_\s*(?:{(?:[^{}]|{[^{}]*})*}|\\?[a-zA-Z]+|.)|\S)"
    r")"
)


def tokenize(text: str) -> list[str]:
    """The tokens of a cleaned text."""
    tokens = []
    bars = itertools.cycle([r"\lvert", r"\rvert"])
    for name, word, other in TOKEN.findall(text):
        if name:
            is_command = name.startswith("\\")
            name = name.strip("\\")
            token = SYNONYMS.get(name, name)
            if is_command:
                token = COMMAND_SYNONYMS.get(name, token)
            if token.isalpha() and len(token) > 1:
                token = "\\" + token
        elif word:
            token = "@" + word
        else:
            token = other
            if token[0] in "d\\" and re.fullmatch(DIFFERENTIAL, token):
                token = "d " + token.removeprefix("\\d")[1:].strip()

        # "2, and 3" has one separator.
        if token in (",", "&", ";") and tokens and tokens[-1] == ",":
            tokens.pop()
        if token == "|":
            token = next(bars)
        tokens.append(token)
    return tokens
