r"""
The text of an answer -> tokens. People write one value in many ways: `clean` brings a text to one
spelling, by the ordered table REWRITES, and `tokenize` cuts it up.

    >>> tokenize(clean(r"$\tfrac12\text{ m}^2$"))
    ['\\frac', '{', '1', '}', '{', '2', '}', '@m^2@']

A token is a number, a letter, a \command, an _index, an @unit or @word, or a sign. A matrix and
each of its rows stand between ⟦ and ⟧. lib/mathexpr.py turns tokens into values.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

MAX_CHARS = 20_000


class Unparsed(Exception):
    """Not mathematics that we can read, or too costly to work out."""


# --- the vocabulary ---

WITH_ARGUMENTS = (
    "asinh acosh atanh asin acos atan sinh cosh tanh sin cos tan cot sec csc "
    "log lg exp sqrt abs floor ceil max min gcd lcm"
)
FUNCTIONS = WITH_ARGUMENTS.split()

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
    "backslash": "setminus",
    "smallsetminus": "setminus",
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

# Names that are read without a backslash, as a pattern.
LETTERS = "pi infty alpha beta gamma delta theta lambda mu omega sigma tau phi rho"
NAMES = "|".join([*FUNCTIONS, *SYNONYMS, *LETTERS.split()])

# Characters that stand for another character or for a LaTeX command.
PLAIN_SIGNS = {
    "−": "-",
    "–": "-",
    "—": "-",
    "∗": "*",
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
    """3:45 P.M. -> 3:45 pm"""
    opening_text = match[1] or ""
    return f" {opening_text}{match[2].lower()}m"


def ratio(match: re.Match) -> str:
    """2:4:6 -> a tuple of quotients, (1,(4)/(2),(6)/(2))"""
    first, others = match.groups()
    quotients = [f"({other})/({first})" for other in others.split(":")]
    return "(1," + ",".join(quotients) + ")"


def repeating_decimal(match: re.Match) -> str:
    r"""0.1\overline{6} -> (016-01)/(90)"""
    whole, start, period = match.groups()
    nines = "9" * len(period)
    zeros = "0" * len(start)
    return f"({whole}{start}{period}-{whole}{start})/({nines}{zeros})"


# What a unit stands behind: a number, the end of a group, or another unit with its sign.
BEFORE_UNIT = re.compile(
    r"(?:[\d}]|\\(?:mathrm|text)\s*{[^{}]*}\s*(?:\^\s*{?-?\d+}?\s*)?(?:\\cdot|/))\s*$"
)


def unwrap_text(match: re.Match) -> str:
    r"""\text{...} and the like: letters and formulas go back into the formula, words and units
    become one token between @ signs."""
    command = match[1]
    text = re.sub(r"[@\\]", " ", match[2]).strip()
    if text in FUNCTIONS or command.startswith("o"):
        return f"\\{text} "
    number = re.fullmatch(r"(-?\d[\d,./]*) ?([a-zA-Z][a-zA-Z ]*)", text)
    if number:
        return f" {number[1]} @{number[2]}@"

    # Behind a number a single letter is a unit as well, unless it is a constant or a choice.
    is_unit = BEFORE_UNIT.search(match.string[: match.start()])
    if is_unit and not re.fullmatch(r"[eiId]|\([A-F]\)", text):
        is_word = re.search("[a-zA-Z]", text)
    else:
        is_word = re.search("[a-zA-Z]{2}", text)
    if is_word and text.strip(" ,") not in SYNONYMS:
        return f"@{text}@"
    return f" {text} "


ATOMS = r"[\d.,^*/!\s]|\\(?:frac|sqrt|pi|times|cdot)(?![a-z])"
NUMBER_IN_BRACKETS = re.compile(rf"[({{](?:[-+]|{ATOMS})*[)}}]")
NUMBER_BEFORE_UNIT = re.compile(rf"\s*(?:-|\\pm)?(?:{ATOMS}|[(){{}}]|(?<=[{{(e])-|e(?=-?\d))*")
END_AFTER_UNIT = re.compile(r"\s*(?:\^\s*{?-?\d}?)?[\s)}\].]*")
BORDER = re.compile(r"[=,~@]|\b(?:or|and)\b|\\approx")


def mark_unit(match: re.Match) -> str:
    """5 m and 2.5e-3 m are lengths, but in 1+2m, (a+b)h and 2m^2-m a letter is a variable."""
    unit = match[0].strip()
    if len(unit) > 1:
        return f"@{unit}@"

    # A letter is a unit only where nothing but a number stands before it, and nothing behind it.
    before = match.string[max(0, match.start() - 200) : match.start()]
    before = BORDER.split(before)[-1]
    for _ in range(4):
        before = NUMBER_IN_BRACKETS.sub("1", before)
    after = match.string[match.end() : match.end() + 50]
    after = BORDER.split(after)[0]
    if NUMBER_BEFORE_UNIT.fullmatch(before) and END_AFTER_UNIT.fullmatch(after):
        return f"@{unit}@"
    return match[0]


TEXT_COMMAND = (
    r"\\(text(?:bf|it|rm|normal|sf)?|mbox|mathrm|operatorname\*?|emph)"
    r"\s*{((?:[^{}]|\^\s*{-?\d+})*)}"
)
ABBREVIATED_UNIT = (
    r"(?:[ckm]?m|m[lL]|min|in|ft|yd|sq|k?g|lbs?|oz|hr?s?|mph|k?Hz|k[JWN]|th|st|nd|rd"
    r"|seconds?|minutes?)\b(?![({])(?:/[hs]\b)?"
)
LOWER_CASE_WORD = rf"(?:(?<=[\d}})] )|(?<=\\pi ))(?!{NAMES}|abc|xyz)[a-z]{{3,}}\b"
UNIT = (
    r"(?:(?<=[\d})%])|(?<=\\pi))\s*"
    rf"(?:{ABBREVIATED_UNIT}|{LOWER_CASE_WORD})"
    r"(?: (?!or\b|and\b)[a-z]{2,}\b)*"
)


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
    # Layout without meaning.
    Rewrite(
        r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)(?![a-z])",
        " ",
        example=(r"\boxed{5}", r"{5}"),
    ),
    Rewrite(
        r"(?<=\d)\s*{\s*,\s*}\s*(?=\d)",
        ",",
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
        r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?",
        " ",
        example=(r"\left(1, 2\right)", "(1, 2 )"),
    ),
    Rewrite(
        r"\\(?:displaystyle|limits|boldsymbol|vec|hat|math(?:bf|it|sf|cal)|bf|rm)(?![a-zA-Z])",
        " ",
        example=(r"\displaystyle 2", "2"),
    ),
    Rewrite(
        r"\\!\s*|{}(?=\s*\^)|(?<=\d)\\,(?=\d{3}(?!\d))|\b(?:np|numpy|math)\.(?=[a-z])",
        "",
        example=(r"14\,916 + np.sqrt(2)", "14916 + sqrt(2)"),
    ),
    # Ways to write numbers and times.
    large_number("hundred", 2),
    large_number("thousand", 3),
    large_number("million", 6),
    large_number("billion", 9),
    Rewrite(
        r"(?<=\d)\s*x\s*(?=10\s*\^)",
        "*",
        example=("3 x 10^8", "3*10^8"),
    ),
    Rewrite(
        r"(?<=\d):00(?!\d)",
        "",
        example=("10:00 a.m.", "10 a.m."),
    ),
    Rewrite(
        r"(?i)(?<=\d)\s*(\\text\s*{)?\s*\b([ap])\.?m\b\.?",
        half_of_the_day,
        example=(r"3:45\text{ P.M.}", r"3:45 \text{pm}"),
    ),
    # Markdown, program notation, signs with several names.
    Rewrite(
        r"^\*\*(.*)\*\*$",
        r"\1",
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
    # "For all real x" at the end, and the small words of systems and cases.
    Rewrite(
        r"(?:\\text\s*{\s*)?(?:"
        r"\bfor (?:all|any|every)(?: (?:real|rational|positive|integers?|natural|numbers?))*\b"
        r"|\\forall)"
        r"[\s}$]*[a-z](?:\s*\\in\s*\\mathbb\s*{?[RNZQ]}?(?:\^{?[+*]}?)?)?$",
        "",
        example=(r"2x \text{ for all real } x", "2x"),
    ),
    Rewrite(
        r",\s*(?=[=<>])|\\text\s*{\s*(?:if|for|when)\s*}",
        " ",
        example=(r"1, \text{if } x,>0", "1, x >0"),
    ),
    # A matrix becomes a tuple of its rows, which are tuples.
    Rewrite(
        r"\\begin\s*{vmatrix}",
        r"\\det ⟦⟦",
        example=(r"\begin{vmatrix}1", r"\det ⟦⟦1"),
    ),
    Rewrite(
        r"\\begin\s*{(?:array}\s*{[^{}]*|\w*matrix|cases|aligned|align\*)}",
        "⟦⟦",
        example=(r"\begin{array}{cc}1", "⟦⟦1"),
    ),
    Rewrite(
        r"[,;.]?\s*(?:\\\\\s*)?\\end\s*{(?:array|\w*matrix|cases|aligned|align\*)}",
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
        r"\\(?:begin|end)\s*{\w+\*?}|(?<!\\)\\[,;:> ]|\\q?quad(?![a-z])|~|\\?[$€£]|\\[()\[\]]",
        " ",
        example=(r"$5\,m\quad$", "5 m"),
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
        r"\\[dtc](frac|binom)(?![a-z])",
        r"\\\1",
        example=(r"\dfrac{1}{2}", r"\frac{1}{2}"),
    ),
    Rewrite(
        r"\\frac\s*(\d)\s*(\d+)",
        r"\\frac{\1}{\2}",
        example=(r"\frac12", r"\frac{1}{2}"),
    ),
    Rewrite(
        r"arc(?=sin|cos|tan)",
        "a",
        example=(r"\arcsin x", r"\asin x"),
    ),
    Rewrite(
        r"\\?(sin|cos|tan)\s*\^\s*{\s*-\s*1\s*}",
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
        r"(?:\s*(?:\\(?:text|mathrm)\s*{\s*)?[CF]\b}?)?",
        "°",
        example=(r"25^{\circ}\mathrm{C}", "25°"),
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
        r"\\mathbb\s*{?\s*R(?:\s*})?",
        r"(-\\infty,\\infty)",
        example=(r"\mathbb{R}", r"(-\infty,\infty)"),
    ),
    Rewrite(
        r"\^\s*({[^{}]*}|\w)\s*_\s*({[^{}]*}|\w)",
        r"_\2^\1",
        example=("x^2_1", "x_1^2"),
    ),
    # Ratios of three and more, repeating decimals, mixed numbers.
    Rewrite(
        r"(?:^|(?<==))([^:,=]+):([^:,=]+(?::[^:,=]+)+)$",
        ratio,
        example=("2:4:6", "(1,(4)/(2),(6)/(2))"),
    ),
    Rewrite(
        r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*{(\d{1,20})}",
        repeating_decimal,
        example=(r"0.1\overline{6}", "(016-01)/(90)"),
    ),
    Rewrite(
        r"(?<![\w.^}/*])(\d+) +(\d+)/(\d+)",
        r"\1\\frac{\2}{\3}",
        example=("2 3/4", r"2\frac{3}{4}"),
    ),
    Rewrite(
        r"(?<![\w.^}])(\d+)\s*(\\frac\s*{\d+}\s*{\d+})",
        r"(\1+\2)",
        example=(r"2\frac{3}{4}", r"(2+\frac{3}{4})"),
    ),
    Rewrite(
        r"(?<![\w.^}/])(\d+)/(\d+)(?=\s*[a-zA-Z\\(])",
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
        r"(\d\.\d*)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*{?\s*([-+]?\d+)\s*}?",
        r"\1e\2",
        example=(r"1.6 \times 10^{-19}", "1.6e-19"),
    ),
    # Words and units.
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
]
COMPILED = [(re.compile(rule.pattern), rule.replacement) for rule in REWRITES]


def apply(pattern, replacement, text: str) -> str:
    """Apply one rule to a text. On long runs of blanks some patterns would take quadratic time."""
    return single_blanks(re.sub(pattern, replacement, text))


def single_blanks(text: str) -> str:
    return " ".join(text.split())


# --- the two steps ---


def clean(text: str) -> str:
    r"""One spelling for what people write in many.

    >>> clean(r"\dfrac12 \text{ cm}")
    '\\frac{1}{2} @cm@'

    Raises Unparsed if the text is too long.
    """
    # Characters beyond ASCII.
    text = text[: 2 * MAX_CHARS]
    text = re.sub("[⁰¹²³⁴-ⁿ]+", r"^{\g<0>}", text)
    text = re.sub("[₀-ₙ]+", r"_{\g<0>}", text)
    text = unicodedata.normalize("NFKC", text.translate(SIGNS))
    text = single_blanks(text.translate(SIGNS))
    if len(text) > MAX_CHARS:
        raise Unparsed("too long")

    for pattern, replacement in COMPILED:
        text = apply(pattern, replacement, text)

    # The exponents of units, and the signs between them: kg * m / s is one unit.
    text = re.sub(r"(@[a-z])?@\s*\^\s*{?(-?\d+)}?", unit_with_exponent, text)
    text = re.sub(r"@\s*(?:[/*]|\\cdot)?\s*@", " ", text)

    # What stands at the ends without a meaning.
    text = text.strip(" =")
    text = re.sub(r"^\\(?:approx|simeq)\b", "", text)
    return text.rstrip(".,: ")


def unit_with_exponent(match: re.Match) -> str:
    """4 m^2 is not 4 m. Exponents of longer units, as in cm^2, are dropped."""
    letter, exponent = match.groups()
    if letter:
        return f"{letter}^{exponent}@"
    return "@@@"


NUMBER = (
    # 1,234 with commas, unless it stands in a bracket, where commas separate.
    r"[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d*)?(?![^(\[]{0,99}[)\]])"
    r"|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?!\d))?"
)
LONG_FUNCTIONS = "|".join(name for name in FUNCTIONS if len(name) > 2)
TOKEN = re.compile(
    r"\s*(?:"
    # a name
    rf"(\\[a-zA-Z]+|{LONG_FUNCTIONS}|(?:{NAMES})(?![a-zA-Z]))"
    # a word: four letters or more that end like one and have a vowel
    r"|(?=[a-zA-Z]{4})([A-Z]?[a-z]{0,20}[aeiou][a-z]{0,20}(?![a-zA-Z]))"
    # all others: a number, a unit or word between @, a relation, an index, a sign
    rf"|({NUMBER}|@[^@]*@|\\.|[<>!]=|_\s*(?:{{(?:[^{{}}]|{{[^{{}}]*}})*}}|\\?[a-zA-Z]+|.)|\S)"
    r")"
)


def tokenize(text: str) -> list[str]:
    """The tokens of a cleaned text."""
    tokens = []
    bars = itertools.cycle([r"\lvert", r"\rvert"])
    for name, word, other in TOKEN.findall(text):
        if name:
            name = name.strip("\\")
            token = SYNONYMS.get(name, name)
            if token.isalpha() and len(token) > 1:
                token = "\\" + token
        elif word:
            token = "@" + word
        else:
            token = other

        # "2, and 3" has one separator.
        if token in (",", "&", ";") and tokens and tokens[-1] == ",":
            tokens.pop()
        if token == "|":
            token = next(bars)
        tokens.append(token)
    return tokens
