r"""
Where the answer of a response is, and the answer of a gold that is a worked solution.

    >>> extract_answer(r"so $x = -\boxed{3}$ or $x = \boxed{2}$.")
    '-3, 2'

Only boxes count for rewards. Phrases ("the answer is 7") are read in golds, and in responses when
a benchmark is evaluated by rules that say so (fallback=True).
"""

import re

# Boxes of one answer: more are no list but a model that repeats itself.
MAX_BOXES = 100
# Characters before a box in which its sign is looked for.
SIGN_WINDOW = 1000
# Characters that a sign may have, with the brackets and dollars between it and its box.
SIGN_LENGTH = 200
# Characters at the end of a response in which a phrase is looked for.
CLOSING_WINDOW = 5000

# Hyphens, the en dash and the minus, also the small and the full-width one.
HYPHENS = "-\u2010\u2011\u2012\u2013"
MINUSES = "\u2212\ufe63\uff0d"
BLANKS = r" \t~\u00a0\u2007\u2009\u202f\u200b\u2060\ufeff"


# ----------------------------------------------------------------------------------------------
# boxes


def balanced(depth: int) -> str:
    """A pattern for text in which braces are balanced, nested up to a depth."""
    pattern = ""
    for _ in range(depth):
        pattern = rf"(?:[^{{}}\\]++|\\.|{{{pattern}}})*+"
    return pattern


BOX = re.compile(
    r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)\s*" + rf"(?:{{({balanced(40)})}}|(\d))",
    re.S,
)
# An empty box is ignored, and so is one that is never closed.
NOTHING = re.compile(
    r"(?:\s|[$~{}\u200b]|\\[,;:! ]|\\(?:text|mathrm|mbox|boxed|fbox)\b|\\q?quad\b)*"
)
# What may stand between the boxes of one answer: commas, "and", "x =", bullets of a list.
GLUE = re.compile(
    r"(?:\n[ \t]*[-*\u2022]\s|[\s$,;&~\u200b]|\\[,;:()!\[\]\\ ]|\\q?quad\b|\*\*"
    r"|\\text\s*{\s*,?\s*(?:and|or)\s*}|\b(?:and|or)\b|\\lor\b|\\vee\b"
    r"|\b[a-zA-Z](?:_{?\d+}?)?\s*=)*+"
)
# Between an exact value and the same in decimals: the first is the answer.
ROUGHLY = re.compile(r"[\s$(,]*(?:\\\(\s*)?(?:\\approx|\\simeq|\\sim|\u2248)[\s$]*(?:\\\(\s*)?")


def extract_answer(response: str, fallback: bool = False) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}, with the sign that stands before it.

    Boxes with only commas or "and" between them are one list; all else between them, also a label
    such as (b), starts another answer, and the last answer counts. A box that is empty or never
    closed is no box. None if there is no box; with fallback=True (evaluation only, never a
    reward) then the answer of a closing phrase, or the last formula or number.

    >>> extract_answer(r"(a) \boxed{3} (b) \boxed{5}")
    '5'
    """
    boxes = last_boxes(response)
    if boxes:
        return ", ".join(boxes)
    return from_prose(response) if fallback else None


def last_boxes(response: str) -> list[str]:
    """The contents of the boxes of one answer, the last of a response, each of them once."""
    boxes = [box for box in BOX.finditer(response) if not NOTHING.fullmatch(content(box))]
    if not boxes:
        return []

    # From the last one back.
    box = boxes.pop()
    sign = find_sign(box)
    answers = [signed(sign, content(box))]
    while boxes and len(answers) < MAX_BOXES:
        start = sign.start() if sign else box.start()
        gap = response[boxes[-1].end() : start]
        roughly = ROUGHLY.fullmatch(gap)
        if "\n\n" in gap or not (roughly or GLUE.fullmatch(gap)):
            break
        if roughly:
            answers.pop()
        box = boxes.pop()
        sign = find_sign(box)
        answers.append(signed(sign, content(box)))

    return list(dict.fromkeys(reversed(answers)))


def content(box: re.Match) -> str:
    return box[box.lastindex]


# ----------------------------------------------------------------------------------------------
# the sign before a box

# What may stand between a sign and its box: blanks, dollars, brackets, changes of the font.
BETWEEN = (
    r"(?:[\s$({}*" + BLANKS + r"]|\\[,;:! >()\[]|\\\$|\\q?quad\b|\\left\b|\\[hv]space\*?{[^{}]*}"
    r"|\\(?:displaystyle|textstyle|bf|large|Large)\b"
    r"|\\(?:math|text)(?:bf|rm|it|normal)?(?={)|\\(?:boldsymbol|bm|underline|mbox)(?={))*"
)
SIGN = re.compile(
    rf"(?P<sign>[{HYPHENS}{MINUSES}\u00b1]|\\pm(?![a-zA-Z])|\b[Mm]inus\b|\b[Nn]egative\b)"
    rf"(?P<between>{BETWEEN})\Z"
)
# Behind these a sign belongs to what follows.
OPENING = re.compile(
    r"(?:[=<>\u2248\u2264\u2265\u2260\u2261\u221d\u2192\u21d2\u27f9\u2208,;:(\[{&/+\"\u201c]"
    r"|\\(?:n?eq|ne|l[et]|g[et]|[lg]eq(?:slant)?|approx|simeq|sim|cong|equiv|propto|in|to|mapsto"
    r"|(?:long)?[rR]ightarrow|Longrightarrow|implies|iff|Leftrightarrow|therefore|land|lor"
    r"|cdot|times|quad|qquad|displaystyle|left|big|Big)|\\\\|\\\(|\\\[)\Z"
)
# Words behind which a hyphen between blanks is a minus and not a dash.
VERB = re.compile(
    r"\b(?:is|are|be|was|equals?|gives?|gets?|yields?|obtain|have|becomes?|or|and|to|than|of|by)\Z",
    re.I,
)
MATHS_BLANKS = re.compile(rf"(?:[{BLANKS}]|\\[,;:! ])*\Z")
ENVIRONMENT = re.compile(r"\\(begin|end){(?:align|equation|gather|multline|eqnarray|displaymath)")


def find_sign(box: re.Match) -> re.Match | None:
    r"""The minus or plus-minus that belongs to a box, of whatever spelling; None if there is none.

    A match in the response's text. Not the minus of a difference, a bullet or a dash.

    >>> responses = [r"$x = -\boxed{3}$", r"answer -\boxed{3}", r"the answer is - \boxed{3}"]
    >>> responses += [r"It is negative \boxed{3}", r"**-\boxed{3}**"]
    >>> [extract_answer(response) for response in responses]
    ['-3', '-3', '-3', '-3', '-3']
    >>> differences = [r"5 - \boxed{3}", r"$x$ -\boxed{3}", r"2^-\boxed{3}"]
    >>> bullets_and_dashes = [r"- \boxed{3}", r"answer - \boxed{3}"]
    >>> [extract_answer(response) for response in differences + bullets_and_dashes]
    ['3', '3', '3', '3', '3']
    """
    response = box.string
    # A sign does not belong to a box of the next paragraph.
    first = max(0, box.start() - SIGN_WINDOW)
    first = max(first, response.rfind("\n\n", first, box.start()))
    sign = SIGN.search(response, max(first, box.start() - SIGN_LENGTH), box.start())
    if sign and belongs(sign, response[first : sign.start()]):
        return sign
    return None


def belongs(sign: re.Match, before: str) -> bool:
    """Does a sign belong to the box behind it? before: the text before the sign."""
    text = MATHS_BLANKS.sub("", before)
    is_apart = text != before or before.endswith(("\n", "$"))
    if sign["sign"].lower() == "negative":
        return True
    if text.endswith(("^", "_", "^{", "_{", *HYPHENS)):
        return False
    if in_maths(before):
        return not ends_with_operand(text.rstrip("\n"))

    # Outside formulas: a bullet or a dash has a blank behind it, a minus as a rule has none.
    is_hyphen = sign["sign"] in HYPHENS
    is_dash = is_hyphen and sign["between"].startswith((" ", "\t"))
    if not text or text.endswith("\n"):
        above = text.rstrip()
        goes_on = OPENING.search(above) and not above.endswith((",", ";", ":"))
        return not is_dash or bool(goes_on)
    if OPENING.search(text):
        return True

    # Asterisks and dollars: opening ones touch the sign and no word, closing ones touch a word.
    words = text.rstrip("*")
    if words != text and not is_apart:
        return True
    if re.search(r"\s\${1,2}\Z", before):
        return True
    # A formula in prose, of which the box is the right side, or from which it is subtracted.
    if words.endswith(("$", r"\)", r"\]")):
        inside = re.sub(r"(?:\$+|\\[)\]])\Z", "", words)
        return OPENING.search(MATHS_BLANKS.sub("", inside)) is not None
    if not is_apart or re.search(r"(?:[\d!'%|}]|(?<![a-zA-Z'\u2019])[a-zA-Z])\Z", words):
        return False
    return not is_dash or VERB.search(words) is not None


def in_maths(before: str) -> bool:
    r"""Is a formula open at the end of a text: $, \(, \[ or an environment?"""
    if before.rfind(r"\(") > before.rfind(r"\)") or before.rfind(r"\[") > before.rfind(r"\]"):
        return True
    environments = list(ENVIRONMENT.finditer(before))
    if environments and environments[-1][1] == "begin":
        return True

    # Between dollars. An amount of money leaves one open; two words in a row are prose.
    parts = re.split(r"(?<!\\)\${1,2}", before)
    is_open = len(parts) % 2 == 0
    formula = re.sub(r"\\(?:text|mbox)\w*\s*{[^{}]*}", "", parts[-1])
    return is_open and not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}\s+[a-zA-Z]{2,}", formula)


def ends_with_operand(text: str) -> bool:
    """Is what stands before a minus, in a formula, something to subtract from?"""
    if not text or OPENING.search(text):
        return False
    words = re.search(r"\\(?:text|mbox|mathrm)\w*\s*{([^{}]*)}\Z", text)
    if words:
        # "and " is no operand, but " cm" is.
        return not words[1].endswith((" ", ":"))
    return re.search(r"[\w)\]}!'%|.\u00b0]\Z", text) is not None


def signed(sign: re.Match | None, text: str) -> str:
    """A text with a sign before it, in brackets if the sign is for a sum or a signed number."""
    if sign is None:
        return text
    mark = "-"
    if sign["sign"] in (r"\pm", "\u00b1"):
        mark = r"\pm "
    text = text.strip()
    is_negative = text[0] in HYPHENS + MINUSES
    if is_negative and sign["sign"].lower() == "negative":
        return text

    # What is in braces or brackets of its own is one term.
    terms = text
    for _ in range(40):
        shorter = re.sub(r"{[^{}]*}|\([^()]*\)", "", terms)
        if shorter == terms:
            break
        terms = shorter
    if is_negative or re.search(rf"[+\u00b1{HYPHENS}{MINUSES}]|\\pm|\\mp", terms):
        return f"{mark}({text})"
    return mark + text


# ----------------------------------------------------------------------------------------------
# answers in prose

# "is", "should be approximately", "=", a colon.
SAYS = (
    r"\s*(?:(?:(?:(?:should|would|will|must) )?\b(?:is|are|be|was)\b|=)"
    r"(?:\s*(?:\b(?:equal to|therefore|thus|then|simply|just|approximately|about)\b|:))*|:)\s*"
)
PHRASE = re.compile(
    r"\b(?:answer|result|solution)s?\b(?:\s+(?:to|of|for)\s[^.:\n$]{1,60}?)?"
    + SAYS
    + r"|^A:\s|^####:?\s*(?=[-\d.$\\(\u2212\u20ac\u00a3])",
    re.I | re.M,
)
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# An inline formula, or a number with a currency or a percent sign, each with a minus.
FORMULA = re.compile(
    rf"(?P<sign>[{HYPHENS}{MINUSES}])?"
    r"(?:(?<!\$)\$(?P<inline>(?:\\.|[^$\\])+)\$(?!\d)"
    r"|\\\((?P<round>.+?)\\\)"
    rf"|(?:\\?\$|[\u20ac\u00a3\u00a5])?(?P<number>(?:{NUMBER})(?:/\d+)?(?:\s?\\?%)?))",
    re.S,
)
DISPLAY = re.compile(r"\s*(?:\$\$(.+?)\$\$|\\\[(.+?)\\\])", re.S)
# Between the formulas of a list.
COMMA_OR_AND = re.compile(r"\s*(?:,\s*(?:and|or)?|and|or)\s*")
# The marks of bold text, which a power (2**3) does not look like.
BOLD = re.compile(
    r"(?<![\w)}\]*])\*{1,3}(?=[^\s*])|(?<=[^\s*])\*{1,3}(?![\w(\\{*])"
    r"|(?<!\w)__(?=\w)|(?<=[^\W_])__(?!\w)|`|</?(?:b|i|em|strong)>"
)
# A letter in bold is meant as an answer, other than one in prose.
BOLD_LETTER = re.compile(r"\*{1,3}\(?([A-Z])\)?\.?\*{1,3}")


def from_prose(response: str) -> str | None:
    """The answer of a response without a box: what follows the last phrase, or the last formula."""
    closing = without_hope(response[-CLOSING_WINDOW:].partition("<|")[0])
    closing = BOLD.sub("", BOLD_LETTER.sub(r"\\text{\1}", closing))
    *before, text = PHRASE.split(closing)
    if before:
        answer = behind_phrase(text)
        if answer is not None:
            return answer
    formulas = list(FORMULA.finditer(text))
    if not formulas:
        return None
    return signed_formula(formulas[-1])


def without_hope(text: str) -> str:
    """A text without the "I hope it is correct." of Minerva's prompt, and what follows."""
    said, hope, _ = text.partition("I hope it is")
    return said.rstrip().removesuffix(".") if hope else text


def behind_phrase(text: str) -> str | None:
    """What a phrase says: a few words, or the formulas with which the text begins; else None."""
    text = re.sub(rf"\A([{HYPHENS}{MINUSES}])\s+(?=[\d$\\.])", "-", text)
    display = DISPLAY.match(text)
    if display:
        return display[display.lastindex].strip()

    line = first_line(text)
    words = line.split()
    # A lone letter would be too easy to hit.
    if len(words) <= 3 and re.search(r"\w\w|\d", line):
        return line
    return list_of_formulas(line)


def first_line(text: str) -> str:
    """The first sentence or line of a text."""
    line = re.split(r"\n|\.(?=\s|$)", text)[0]
    # "$5$, as claimed" says no more than $5$.
    line = re.split(r"(?<=[\d$%)]),\s+(?!and\b|or\b)(?=[a-z]{2})", line)[0]
    return line.strip().rstrip(",;:").rstrip()


def list_of_formulas(line: str) -> str | None:
    """The formulas with which a line begins, with commas or "and" between them."""
    found = FORMULA.match(line)
    if not found:
        return None
    answers = []
    while found:
        answers.append(signed_formula(found))
        glue = COMMA_OR_AND.match(line, found.end())
        found = FORMULA.match(line, glue.end()) if glue else None
    return ", ".join(answers)


def signed_formula(formula: re.Match) -> str:
    """A formula with its minus, unless it is that of a difference (3-5)."""
    text = formula[formula.lastgroup].strip()
    before = formula.string[max(0, formula.start() - 20) : formula.start()]
    is_difference = re.search(r"[\d)\]}.$%-]\Z", before) and not OPENING.search(before)
    if formula["sign"] and not is_difference:
        return "-" + text
    return text


# ----------------------------------------------------------------------------------------------
# golds

GOLD_PHRASE = re.compile(rf"\banswers?\b{SAYS}|^####:?[ \t]*(?=\S)", re.I | re.M)
# A number, a formula, an equation of a name, or words. In running text sqrt(2) may be anything.
SAYABLE = re.compile(r"[-\d.$\\(\[{\u2212\u2013\u20ac\u00a3\u00a5]|[a-zA-Z]\s*=|[^\W\d]+(?![\w(^])")


def golds(gold) -> list[str]:
    """The texts that count as right; none for a gold that is missing: None, NaN, "", [] or {}.

    gold: an answer; a worked solution, of which the last box or what the last phrase ("the answer
    is", ####) says counts; a number; or a list of these.
    """
    # Arrays and numbers of numpy.
    if hasattr(gold, "tolist"):
        gold = gold.tolist()
    if isinstance(gold, (list, tuple)):
        texts = []
        for one in gold:
            texts += golds(one)
        return texts
    if gold is None or gold == {} or gold != gold:
        return []

    try:
        text = str(gold)
    except ValueError:
        # Python writes no integer of more than 4,300 digits.
        return []
    boxed = extract_answer(text)
    if boxed:
        text = boxed
    elif GOLD_PHRASE.search(text):
        text = said(text) or text
    if NOTHING.fullmatch(text):
        return []
    return [text]


def said(gold: str) -> str:
    """What the last phrase of a worked solution says; "" if it is neither mathematics nor words."""
    text = GOLD_PHRASE.split(BOLD.sub("", without_hope(gold)))[-1]
    answer = behind_phrase(text) or first_line(text)
    return answer if SAYABLE.match(answer) else ""
