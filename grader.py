r"""
The one judge of answers: generate.py, prime.py and evaluate.py import it unchanged.

    >>> grade_math(r"... so its area is \boxed{\tfrac12\text{ cm}^2}.", "0.5")
    True

A false reject is a corrupted gradient, a false accept teaches cheating, a hang kills the run. So a small parser of our own computes the
value of an answer while it reads it (nothing that a model wrote reaches eval, sympify or parse_expr), at four random rational points if it
has variables: exactly while it stays rational, else to 70 digits with mpmath, the arithmetic under sympy. Equal expressions agree at all
points. This takes microseconds where simplify() takes milliseconds to forever. Length, nesting, powers, factorials and total work are
limited; the pool (Grader, below) adds a deadline and a memory limit. The rules where graders disagree:

- Integers and exact values are compared exactly, at any size: 102019 is not 102018, 0.333 is not 1/3. A decimal passes for an exact gold
  if it is equal (0.5 = 1/2) or right to 12 digits (a program's print-out).
- A gold written as a decimal grants its own precision: relative 1e-4, or equal after rounding to the gold's significant digits if it
  states two or more (1/3 for 0.33, but 0.44 is not 0.4). 3e8, 3*10**8 and 3 x 10^8 are one number.
- 50% = 0.5; if one side only has the sign, the bare number may be meant in percent (50% = 50); nothing else is scaled by 100. Other units,
  degrees and currencies are ignored if the gold or the answer has none; 30 degrees are 30, not pi/6.
- x = 5 answers 5 and 5 answers x = 5; x + y = 5 does not. Two names must agree. In a = b = c the last side counts, or the one before the
  first "approximately". Equations are equal up to a constant factor, inequalities up to a positive one, chains side by side.
- Several answers: any order, all and only those; +- stands for both. (1, 2) is ordered, a list without brackets may stand for it. Round
  and square brackets differ; x > 5 is (5, infinity). A vector may be a row or a column. 52_8 needs its base on both sides.
- 1,234 is a number; with a blank, or inside brackets, the comma separates. 2 3/4 is a mixed number, a/bc is a/(bc), but 1/2x is (1/2)x.
- log is natural, odd roots of negative numbers are real; sums, integrals and limits are names, never computed.
- Words are equal as words, without case, blanks and the brackets of a choice "(B)". No substring ever matches.
- Only boxes count. Phrases ("the answer is") and last numbers need fallback=True; <answer> and [answer] mean nothing.
- parity=True is the lenient reading of Qwen2.5-Math's evaluation/grader.py, on which published Minerva and OlympiadBench tables rest:
  relative 1e-4 for all numbers, x, x/100 and 100 x, any brackets, no bases. Never use it for rewards.
"""
import collections, concurrent.futures, ctypes, functools, json, math, operator, os, re, select, signal, subprocess, sys, threading, traceback, unicodedata, zlib
from fractions import Fraction

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_BITS, MAX_ITEMS = 20_000, 8_000, 60, 40_000, 100

class Unparsed(Exception): "not mathematics that we can read, or too costly to work out"

# ----------------------------------------------------------------------------
# from a response to the text of its answer

BRACES = re.compile(r"\\{1,4}[a-z]{0,9}boxed\s*([{\d])|\\{1,4}fbox\s*({)|\\.|[{}]", re.S)
GLUE = re.compile(r"(?:[\s$,;&]|\\[,;:()!]|\\q?quad\b|\\text\s*{\s*(?:and|or)\s*}|\b(?:and|or)\b)*")
PHRASE = re.compile(r"\b(?:answer|result|solution)s?\s*(?:\b(?:is|are)\b:?|:)[\s*]*|^(?:A|####):?\s", re.I | re.M)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")

def extract_answer(response, fallback=False):
    r"""The content of the last balanced \boxed{...} or \fbox{...}; None if there is none.

    A minus before the box belongs to the answer; boxes with nothing but commas or "and" between them are one list.
    fallback=True (for evaluation, never for a reward) goes on to a closing phrase, the last formula, the last number."""
    found, stack = [], []  # outermost boxes; one pass, so that 20,000 open boxes cost nothing
    for m in BRACES.finditer(response):
        if m[0] == "}" and stack:
            if opener := stack.pop():
                found = [box for box in found[-50:] if box[0] < opener.start()] + [(opener.start(), m.end(), response[opener.end():m.start()])]
        elif m[0][-1] == "{" and m[0] != "\\{":
            stack.append(m if m[0] != "{" else None)
        elif m[1]:
            found.append((m.start(), m.end(), m[1]))  # \boxed 5
    if not found:
        return from_prose(response) if fallback else None
    start, _, answer = found.pop()
    answers = ["-" + answer if re.search(r"(?<![\w})\].])\s*\$?\s*-\s*$", response[max(0, start - 20):start]) else answer]
    while found and "\n\n" not in (gap := response[found[-1][1]:start]) and GLUE.fullmatch(gap):
        start, _, answer = found.pop()
        answers.insert(0, answer)
    return ", ".join(dict.fromkeys(answers))

def from_prose(response):
    "the answer of a response without a box: what follows the last phrase, else the last number or inline formula"
    text = re.split(r"<\||\.?\s*I hope it is", response[-5000:])[0].strip()
    if phrase := max(PHRASE.finditer(text), key=lambda m: m.end(), default=None):
        text = text[phrase.end():].strip(" *")
        if m := FORMULA.match(text) or re.match(rf"\$?({NUMBER.pattern})(?=\s|[.,%]|$)", text):
            return next(filter(None, m.groups()))
        line = re.split(r"\n|\.(?=\s|$)", text)[0]
        if re.match(r"[-+(\\]", line) and re.search(r"\d|\\|[a-z]{2}", line) or len(line.split()) <= 3 and re.search(r"\w\w", line):
            return line  # but never a lone letter: a choice in prose is too easy to hit
    formulas = [m for m in FORMULA.finditer(text) if m[2] or m[3]]
    numbers = [m for m in NUMBER.finditer(text) if not any(f.start() < m.start() < f.end() for f in formulas)]
    last = max(formulas + numbers, key=lambda m: m.end(), default=None)
    return last and next(filter(None, [*last.groups(), last[0]]))

def golds(gold):
    "the texts that count as right: of a string, of a worked solution with a box or a closing phrase, of a list of these"
    if isinstance(gold, (list, tuple)):
        return [text for item in gold for text in golds(item)]
    # in prose only figures and formulas between dollars are safe to read: plain words are no product of letters
    phrase = re.search(r"answer is:?\s*(?:\$(.+?)\$|([-+*/^().\d\s]+?)\.?\s*$)", str(gold))
    return [extract_answer(str(gold)) or (phrase and (phrase[1] or phrase[2])) or str(gold)]

# ----------------------------------------------------------------------------
# from text to tokens: numbers, letters, \commands, _indices, @words@ and signs

SIGNS = dict(zip("−–—∗÷∕⁄º′’％", "---*///°''%")) | {c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {c: f"_{i}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}
SIGNS |= {s[0]: f"\\{s[1:]} " for s in "×times ·times ⋅times ≤le ≥ge ≠ne ≈approx ±pm ∓mp ∞infty ∪cup ∩cap ∈in ∅emptyset √sqrt πpi ∠angle ∖setminus".split()}
UNITS = """cm centimeter centimetre|mm millimeter|km kilometer|m meter metre|in inch inches|ft foot feet|yd yard|mi mile|kg kilogram|mg milligram|g gram|lb lbs pound
oz ounce|s sec second|min minute|h hr hour|day|week|month|yr year|mph|rpm|dollar|cent|euro|yuan|unit|N newton|J joule|W watt|V volt|Hz hertz|rad radian|ml mL|L liter litre
eV|K kelvin|mol mole|sq square|cubic|% percent pct percentage|° degree""".replace("\n", "|").split("|")
UNITS = {name + s: line.split()[0] for line in UNITS for name in line.split() for s in ("", "s")}
FUNCTIONS = "asinh acosh atanh asin acos atan sinh cosh tanh sin cos tan cot sec csc ln log lg exp sqrt abs floor ceil max min gcd lcm".split()
SAME = dict(pair.split(":") for pair in """arcsinh:asinh arccosh:acosh arctanh:atanh arcsin:asin arccos:acos arctan:atan infinity:infty inf:infty oo:infty le:<= leq:<=
leqslant:<= ge:>= geq:>= geqslant:>= lt:< gt:> ne:!= neq:!= approx:~ simeq:~ equiv:= cdot:* times:* ast:* div:/ mod:bmod pmod:bmod backslash:setminus lvert:| rvert:| vert:|
varnothing:emptyset langle:( rangle:) lbrace:{ rbrace:} exponentialE:e choose:binom and:; or:; percent:% pct:% percentage:% degrees:° degree:°""".split())
NAMES = sorted([*FUNCTIONS, *SAME, "pi", "infty", *"alpha beta gamma delta theta lambda mu omega sigma tau phi rho".split()], key=len, reverse=True)
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<!\\)\\\\(?=[a-zA-Z]{2})", r"\\"), (r"\\\\\\\\", r"\\\\"),  # doubled by somebody's escaping
    (r"\\{1,4}[a-z]{0,9}boxed(?![a-z])|\\fbox|\\(?:left|right|[bB]igg?[lrm]?|middle|displaystyle|textstyle|limits|bf|rm|it)(?![a-zA-Z])\.?", " "),
    (r"\\!\s*|(?<=\d)\\,(?=\d{3}(?!\d))", ""), (r"(?<=\d)\s*{\s*,\s*}\s*(?=\d)", ","), (r"(?<!\d)\d{1,3}(?: \d{3})+(?!\d)", lambda m: m[0].replace(" ", "")),
    (r"\\begin\s*{vmatrix}", r"\\vmatrix⟦"), (r"\\begin\s*{array}\s*(?:{[^{}]*})?|\\begin\s*{\w*(?:matrix|cases)\*?}", "⟦"),
    (r"(?:\\\\\s*)?\\end\s*{\w*(?:matrix|cases|array)\*?}", "⟧"), (r"\\(?:begin|end)\s*{\w+\*?}|\\[,;:>]|\\q?quad(?![a-z])|~|\\h?space\*?{[^{}]*}|\\?[$€£]|\\[()\[\]]", " "),
    (r"\\ (?![^⟦]*⟧)", " "), (r"(?<!\\)\\(?=[\s\d])", r"\\\\ "), (r"\\[dtc]frac(?![a-z])", r"\\frac"), (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"(\\frac|\\binom)\s*(\d)", r"\1{\2}"), (r"(\\(?:frac|binom)\s*{[^{}]*})\s*(\d+)", r"\1{\2}"), (r"\\%", "%"), (r"\\mathbb\s*{?\s*R\s*}?|ℝ", "ℝ"),
    (r"\^\s*{\s*\\circ\s*}|\^\s*\\circ(?![a-z])|\\degrees?(?![a-z])|\\textdegree", "°"), (r"°\s*[CF]\b", "°"), (r"\b(?:np|numpy|math)\.(?=[a-z])", ""), (r"\*\*", "^"),
    (r"\^\s*{?\s*((?:\\prime\s*)+)}?", lambda m: "'" * m[1].count("prime")), (r"\^\s*(-\s*\w+)", r"^{\1}"), (r"\^\s*({[^{}]*}|\w)\s*_\s*({[^{}]*}|\w)", r"_\2^\1"),
    (r"(?<=\d)\s*\^?\s*{?\s*(?:\\(?:text|mathrm|mbox)\s*{)?\s*(?:th|st|nd|rd)\b}*", ""), (r"(?<![\\a-zA-Z])([a-df-hj-zA-Z])\s*\(\s*(-?\d+)\s*\)", r"\1_{(\2)}"),  # f(2) is a name
    (r"{([^{}]*)\\choose([^{}]*)}", r"\\binom{\1}{\2}"), (r"\b([fgh])\s*\^\s*{\s*-\s*1\s*}\s*\(", r"\1_{-1}("),
    (r"[,;(]?\s*(?:\\text\s*{[^{}]*}|where|for)?\s*\b[a-z]\s*\\in\s*\\mathbb\s*{?\s*[ZN]\s*}?\s*\)?", ""),  # k pi, k in Z
    (r"\\{\s*[a-z]\s*(?:\\in\s*ℝ\s*)?(?:\\mid|\||:)([^|:{}]{1,80}[<>=\\][^|:{}]{1,80})\\}", r"\1"),  # {x | x > 2}
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*{(\d{1,20})}", lambda m: f"({m[1]}{m[2]}{m[3]}-{m[1]}{m[2]})/({'9' * len(m[3])}{'0' * len(m[2])})"),  # 0.1666...
    (r"(?<![\w.^}])(\d+)\s*\\frac\s*{(\d+)}\s*{(\d+)}|(?<![\w.^}/*])(\d+) +(\d+)/(\d+)", lambda m: "({}+\\frac{{{}}}{{{}}})".format(*filter(None, m.groups()))
        if int(m[2] or m[5]) < int(m[3] or m[6]) else m[0]), (r"(?<![\w.^}/])(\d+)/(\d+)(?=\s*[a-zA-Z\\(])", r"\\frac{\1}{\2}"),  # 2 3/4, 1/2x
    (r"(\d\.\d*)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:{\s*([-+]?\d+)\s*}|([-+]?\d+))", r"\1e\2\3"), (r"\\(overline|bar|tilde|widehat|overrightarrow)\s*{", r"\\\1_{")]]
WRAPPER = re.compile(r"\\(text(?:bf|it|rm|normal|sf)?|mbox|mathrm|mathbf|mathit|mathsf|mathcal|boldsymbol|bm|operatorname\*?|emph|underline|vec|hat)\s*{([^{}]*)}")
PLAIN_UNIT = re.compile(r"(?<=[\d})%%])\s*(?:(?:%s)\b(?![({])|(?<=[\d})]\s)(?!%s)[a-z]{4,}\b)(?:\s+[a-z]{2,}\b)*" % (
    "|".join(sorted((u for u in UNITS if len(u) > 1), key=len, reverse=True)), "|".join(NAMES)))
NAME = re.compile("(%s)$|%s" % ("|".join(NAMES), "|".join(f for f in FUNCTIONS if len(f) > 2)))
TOKEN = re.compile(r"\s*([1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d*)?|\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|@[^@]*@|\\[a-zA-Z]+|\\.|[<>!]=|"
                   r"_\s*(?:{(?:[^{}]|{[^{}]*})*}|\\?[a-zA-Z]+|.)|[a-zA-Z]+|'+|\S)", re.S)

def unwrap(m):
    r"\text{...} and its relatives: letters and formulas go back into the formula, words become one token"
    command, text = m[1], re.sub(r"[@\\]", " ", m[2]).strip()
    if text in FUNCTIONS or command[:8] == "operator":
        return f"\\{text} " if text.isalpha() else f" {text} "
    unit = re.search(r"[\d}]\s*$", m.string[:m.start()]) and command not in ("mathbf", "vec", "hat", "mathcal", "bm") and text not in ("e", "i", "I", "d")
    return f" {text} " if text.strip(" ,") in SAME or not re.search("[a-zA-Z]" if unit else "[a-zA-Z]{2}", text) else f"@{text}@"

def clean(text):
    "one spelling for what people write in many"
    text = " ".join(unicodedata.normalize("NFKC", text[:2 * MAX_CHARS].translate(str.maketrans(SIGNS))).translate(str.maketrans(SIGNS)).split())
    if len(text) > MAX_CHARS:
        raise Unparsed("too long")
    for pattern, new in REWRITES:
        text = " ".join(pattern.sub(new, text).split())  # no long runs of blanks, on which patterns take quadratic time
    while (new := " ".join(WRAPPER.sub(unwrap, text).split())) != text:
        text = new
    text = PLAIN_UNIT.sub(lambda m: f"@{m[0].strip()}@", text)
    if "@" in text:  # the power of a unit is part of it
        text = re.sub(r"@\s*(?:/|\*)?\s*@", " ", re.sub(r"(?<=@)\s*\^\s*{?-?\d+}?", "@@", text))
    return text.strip().rstrip(".,;: ")

def tokenize(text):
    tokens, depth, inside = [], 0, 0
    for token in TOKEN.findall(text):
        inside += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        depth += (token == "{") - (token == "}")
        if depth + inside > MAX_DEPTH or len(tokens) > MAX_TOKENS:
            raise Unparsed("too deep or too long")
        if token[0].isdigit() and "," in token and inside:
            tokens += re.split("(,)", token)  # (100,200) is a pair
        elif token[0].isalpha() or token[0] == "\\" and token[1:].isalpha():
            tokens += letters(token)
        else:
            tokens.append(token)
    return tokens

def letters(run):
    "a run of letters is a known name, a word, or a product of variables"
    if m := re.match(r"\\[a-zA-Z]+", run) or NAME.match(run):
        name = SAME.get(m[0].strip("\\"), m[0].strip("\\"))
        return ["\\" + name if name.isalpha() and len(name) > 1 else name] + (letters(run[m.end():]) if m[0] != run else [])
    return ["@" + run] if re.fullmatch(r"[A-Z]?[a-z]*[aeiou][a-z]*", run) and len(run) > 3 else list(run)

# ----------------------------------------------------------------------------
# arithmetic at one point; ZeroDivisionError means that there is no value

@functools.cache
def mp():
    "a private mpmath context, so that nobody else's precision changes"
    import mpmath
    context = mpmath.MPContext()
    context.dps = 70
    return context

def exact(*xs): return all(isinstance(x, Fraction) for x in xs)
def integers(*xs): return exact(*xs) and all(x.denominator == 1 for x in xs)
def size(x): return max(abs(x.numerator), x.denominator).bit_length() if exact(x) else abs(mp().mag(x)) if x and mp().isfinite(x) else 0  # bits

def power(a, b):
    if not a:
        return Fraction(not b) if exact(b) and b >= 0 else 1 / a
    if abs(mp().convert(b)) * (size(a) + (not integers(a))) > MAX_BITS:
        raise Unparsed("power too big")
    if exact(a) and integers(b):
        return a ** int(b)
    if exact(b) and b.denominator % 2 and b.denominator > 1 and not mp().im(a) and mp().re(a) < 0:
        return mp().power(-a, b) * (-1) ** b.numerator  # a real odd root
    return mp().power(a, b)

def floor(x):
    nearest = x if exact(x) else mp().nint(mp().re(x))
    return Fraction(math.floor(x) if exact(x) else int(nearest if abs(mp().re(x) - nearest) < 1e-50 else mp().floor(mp().re(x))))

def factorial(n, k=None):
    if not max(abs(mp().convert(n)), abs(mp().convert(k or n))) < 4096:
        raise Unparsed("factorial too big")
    if k is None:
        return Fraction(math.factorial(int(n))) if integers(n) and n >= 0 else mp().gamma(n + 1)
    return Fraction(math.comb(int(n), int(k))) if integers(n, k) and n >= 0 <= k else mp().binomial(n, k)

def lattice(function, *xs):
    "gcd and lcm, of fractions too"
    scale = math.lcm(*(x.denominator for x in xs)) if exact(*xs) else 1 // 0
    return Fraction(function(*(int(x * scale) for x in xs)), scale)

TABLE = {"+": operator.add, "*": operator.mul, "/": lambda a, b: a * (1 / b), "^": power, "\\sqrt": lambda x, n=Fraction(2): power(x, 1 / n),
         "!": factorial, "\\binom": factorial, "\\abs": abs, "\\floor": floor, "\\ceil": lambda x: -floor(-x),
         "\\bmod": lambda a, b: a - b * floor(a * (1 / b)), "\\exp": lambda x: power(mp().e, x), "\\lg": lambda x: mp().log(x, 10),
         "\\log": lambda x, base=None: mp().log(x) / (mp().log(base) if base else 1) if x else 1 / x,
         "\\gcd": functools.partial(lattice, math.gcd), "\\lcm": functools.partial(lattice, math.lcm),
         "\\max": lambda *xs: max(xs, key=mp().re), "\\min": lambda *xs: min(xs, key=mp().re)}
TABLE[":"], TABLE["\\ln"] = TABLE["/"], TABLE["\\log"]

# ----------------------------------------------------------------------------
# from tokens to values

# A number has xs: one value, or one for each point, None where it is undefined; and digits, the significant ones, if it is written as a decimal.
# A collection has items and brackets: "" (none), "{}", "[)", ..., "⟦⟧" for a matrix, "row", and "rel" for a relation, which also has signs, and
# the names that its sides are or None. Either may have a unit: "cm", "%", or "_8" for a number in base 8.
Value = collections.namedtuple("Value", "xs digits brackets items signs names unit", defaults=[None, 0, None, (), (), (), ""])

LEVELS = ["\\\\", "&", ", ;", "= < > <= >= != ~ \\in", "\\cup \\cap \\setminus", ":", "+ - \\pm \\mp", "* / \\bmod"]
LEVEL = {sign: level for level, signs in enumerate(LEVELS) for sign in signs.split()}
CLOSERS = {"(": ") ]", "[": ") ]", "{": "}", "\\{": "\\}", "⟦": "⟧", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
STOP = {*LEVEL, *") ] } \\} ⟧ | \\rfloor \\rceil ^ ! % ° '".split(), ""}

def number(x): return Value([x])
def sequence(brackets, items): return Value(brackets=brackets, items=items)
MINUS, HUNDREDTH = number(Fraction(-1)), number(Fraction(1, 100))

def compute(name, *args):
    "a function of numbers, point by point; a factor goes into a matrix and before a unit"
    last = args[-1]
    if name == "*" and last.brackets in ("⟦⟧", "row"):
        return sequence(last.brackets, [compute("*", args[0], x) for x in last.items])
    if name == "*" and last.unit:
        return compute("*", args[0], last._replace(unit=""))._replace(unit=last.unit)
    args = [compute("*", HUNDREDTH if a.unit == "%" else number(mp().pi / 180), a._replace(unit="")) if a.unit in ("%", "°") else a for a in args]
    function = TABLE.get(name) or getattr(mp(), name[1:], None)
    if not function or any(not a.xs or a.unit for a in args) or name not in TABLE and any(size(x) > 5000 for a in args for x in a.xs if x is not None):
        raise Unparsed(name)
    xs = []
    for k in range(max(len(a.xs) for a in args)):
        column = [a.xs[k % len(a.xs)] for a in args]
        try:
            x = function(*column) if None not in column else None
        except (ZeroDivisionError, TypeError):  # no value there, or not for so many arguments
            x = None
        if x is not None and not exact(x) and (mp().isnan(x) or k > 1 and mp().im(x) and not any(map(mp().im, column))):
            x = None  # where variables are negative, a complex value of real arguments depends on the branch
        if x is not None and size(x) > MAX_BITS:
            raise Unparsed("number too big")
        xs.append(mp().convert(x) if exact(x) and x.denominator.bit_length() > 4000 else x)
    return Value(xs, last.digits if args[0] == MINUS else 0)

def variable(name):
    "a random rational for each of four points, which depends on the name only; positive at the first two"
    if name in ("i", "e", "\\pi", "\\infty"):
        return number({"i": mp().mpc(0, 1), "e": mp().e, "\\pi": mp().pi, "\\infty": mp().inf}[name])
    draws = [zlib.crc32(f"{name} {k}".encode()) for k in range(4)]
    return Value([Fraction(d % 2200 + 300, 997) * (-1 if k > 1 and d >> 16 & 1 else 1) for k, d in enumerate(draws)])

class Parser:
    "precedence climbing: expr() reads operands and the operators of one level and the tighter ones; the token '' is the end"
    def __init__(self, text, sign=1):
        self.tokens, self.i, self.bars, self.sign = tokenize(text) + [""], 0, 0, number(Fraction(sign))
    def fail(self): raise Unparsed("syntax at " + " ".join(self.tokens[max(0, self.i - 5):self.i + 5]))
    def peek(self): return self.tokens[self.i]
    def take(self, tokens=None):
        "the next token, if it is one of these"
        if tokens is not None and self.peek() not in tokens.split():
            return ""
        self.i += 1
        return self.tokens[self.i - 1] or self.fail()
    def expr(self, lowest):
        start, value = self.i, number(None) if LEVEL.get(self.peek()) == 3 else self.factors()  # "= 5" has an empty name
        while (level := LEVEL.get(self.peek(), -1)) >= lowest:
            items, signs, starts = [value], [], [start]
            while LEVEL.get(self.peek()) == level:
                signs.append(self.take())
                while level == 2 and self.take(", ;"):
                    pass  # "2, and 3"
                starts.append(self.i)
                items.append(self.expr(level + 1))
            if level < 4:
                names = [name_of(self.tokens[a:b]) for a, b in zip(starts, [s - 1 for s in starts[1:]] + [self.i])] if level == 3 else []
                value = Value(None, 0, ["⟦⟧", "row", "", "rel"][level], items, signs, names)
            for sign, right in zip(signs, items[1:] if level > 3 else []):
                value = self.combine(level, sign, value, right)
        return value
    def combine(self, level, sign, left, right):
        if level != 4:
            return compute("+", left, self.signed(sign, right)) if level == 6 else compute(sign, left, right)
        if sign == "\\setminus" and left.brackets and left.brackets[0] in "([":
            return without(left, members(right))
        return sequence("", [left, right] if sign == "\\cup" else [x for x in members(left) if any(equal(x, y) for y in members(right)) == (sign == "\\cap")])
    def signed(self, sign, value):
        value = compute("*", MINUS, value) if sign in ("-", "\\mp") else value
        return compute("*", self.sign, value) if sign in ("\\pm", "\\mp") else value
    def factors(self):
        "juxtaposition: 2x, 3 sqrt 5, a(b+c); then a unit"
        if sign := self.take("+ - \\pm \\mp"):
            return self.signed(sign, self.expr(7))
        value = self.power()
        while self.starts_factor():
            value = compute("*", value, self.power())
        if self.peek()[:1] == "@":
            value = value._replace(unit="".join(UNITS.get(w, UNITS.get(w.lower(), "?" + w)) for w in self.take().strip("@ ").split()))
        return value
    def starts_factor(self):
        return self.peek() not in STOP and self.peek()[0] not in "@_'" or self.peek() == "|" and not self.bars
    def power(self):
        "an atom with its powers, indices, primes, factorials, percent and degree signs"
        start, value = self.i, self.atom()
        while self.peek() in ("^", "!", "%", "°") or self.peek()[:1] in ("_", "'"):
            sign = self.take()
            if sign in "^!":
                value = compute(sign, value, *([self.atom()] if sign == "^" else []))
            elif sign in "%°" or sign[0] == "_" and self.tokens[start][0].isdigit():
                value = value._replace(unit=re.sub(r"[@{}\s]", "", sign))
            elif not self.tokens[start][0].isdigit():
                value = variable(re.sub(r"[@{}\s]|\\mathrm|\\text", "", "".join(self.tokens[start:self.i])))
        return value
    def atom(self):
        token = self.take()
        if re.match(r"\.?\d", token):
            mantissa, _, exponent = token.replace(",", "").rstrip(".").lower().partition("e")
            digits = len(mantissa.replace(".", "").lstrip("0")) if exponent or "." in mantissa else 0
            return Value([Fraction(mantissa) * Fraction(10) ** int(exponent or 0)], digits) if len(mantissa) < 4000 and len(exponent) < 6 else self.fail()
        if token in CLOSERS:
            return self.bracket(token)
        if token == "|":
            self.bars += 1
            value = compute("\\abs", self.expr(6))
            self.bars -= 1
            return value if self.take("|") else self.fail()
        if token in ("\\frac", "\\binom"):
            return compute(token.replace("\\frac", "/"), self.atom(), self.atom())
        if token[1:] in FUNCTIONS:
            return self.function(token)
        if token in ("ℝ", "\\emptyset"):
            return sequence("()", [number(-mp().inf), number(mp().inf)]) if token == "ℝ" else sequence("{}", [])
        return variable(token.strip("@ ").lower() if token[0] == "@" else token) if token not in STOP and token.strip("\\@")[:1].isalpha() else self.fail()
    def bracket(self, opener):
        bars, self.bars = self.bars, 0
        value = sequence("", []) if self.peek() in CLOSERS[opener].split() else self.expr(0 if opener == "⟦" else 2)
        closer, self.bars = self.take(CLOSERS[opener]) or self.fail(), bars
        if opener == "⟦":
            return value if value.brackets == "⟦⟧" else sequence("⟦⟧", [value])
        if opener in ("\\lfloor", "\\lceil"):
            return compute("\\floor" if opener == "\\lfloor" else "\\ceil", value)
        return sequence(opener[-1] + closer[-1], value.items) if value.brackets == "" else value
    def function(self, name):
        "sin x, sin^2 x, sin(x), log_2 8, sqrt[3]{x}, max(a, b)"
        exponent, base = [], []
        while self.peek() and self.peek()[0] in "^_":
            sign = self.take()
            exponent, base = ([self.atom()], base) if sign == "^" else (exponent, [Parser(sign[1:]).expr(6)])
        if name == "\\sqrt" and self.take("["):
            base = [self.expr(6)]
            self.take("]") or self.fail()
        if name == "\\sqrt" or self.peek() in CLOSERS:
            value = self.atom()
            args = value.items or [value]
        else:
            args = [self.power()]
            while self.starts_factor() and self.peek() not in CLOSERS and self.peek()[1:] not in FUNCTIONS:
                args = [compute("*", args[0], self.power())]
        value = compute("\\a" + name[1:] if exponent == [MINUS] else name, *args, *base)
        return compute("^", value, *exponent) if exponent and exponent != [MINUS] else value

def name_of(tokens):
    "the name that a side of an equation is (x, f(2), AB, |AB|, dy/dx, angle APC), None if it is a real expression"
    text = "".join(t for t in tokens if t[:1] != "_")
    text = re.sub(r"(?<=[a-zA-Z'])\([^()]*\)|\\(?:lim|sum|vmatrix).*", "", text)
    named = re.fullmatch(r"[a-zA-Z\s\\|:/,(){}'@]*", text) and not {"\\pi", "\\infty", "\\sqrt", "\\emptyset"} & set(tokens)
    return re.sub(r"[{}\s]", "", "".join(tokens)) if named else None

@functools.lru_cache(256)
def parse(text):
    "the value of a cleaned text; +- gives a list of both"
    values = []
    for sign in (1, -1) if re.search(r"\\(?:pm|mp)(?![a-z])", text) else (1,):
        parser = Parser(text, sign)
        values.append(parser.expr(2))
        if parser.peek():
            parser.fail()
    return values[0] if len(values) == 1 else sequence("", values)

# ----------------------------------------------------------------------------
# equality of values: g is the gold, a the answer

def close(x, y, tolerance="1e-50"):
    if exact(x, y) and tolerance == "1e-50" or not mp().isfinite(x) or not mp().isfinite(y):
        return x == y
    x, y = mp().convert(x), mp().convert(y)
    return abs(x - y) <= max(abs(x), abs(y)) * mp().mpf(tolerance) + mp().mpf("1e-60")

def same_number(g, a, parity=False):
    n = max(len(g.xs), len(a.xs))
    both = [(x, y) for x, y in zip(g.xs * (n // len(g.xs)), a.xs * (n // len(a.xs))) if x is not None and y is not None]
    if n > 1 or not both or close(*both[0]):
        return len(both) >= min(n, 2) and all(close(x, y) for x, y in both)
    x, y = both[0]
    if parity and any(close(x * k, y, "1e-4") for k in (1, 100, Fraction(1, 100))):
        return True
    if g.digits and not mp().im(y):  # relative 1e-4, or half a unit of the last digit
        half = Fraction(10) ** (math.floor(mp().log10(abs(x))) + 1 - g.digits) / 2 if x and g.digits > 1 else 0
        return abs(mp().convert(x + -y)) <= mp().convert(max(abs(x) / 10000, half)) * (1 + mp().mpf("1e-50"))
    return a.digits >= 12 and close(x, y, "1e-12")

def named(value):
    "(name, value) of an equation like x = 5, 5 = x, f(2) = 1 + 1 = 2, x in [0, 1], |AB| = sqrt 3 ~ 1.7; (None, value) otherwise"
    signs, sides, names = value.signs, value.items, value.names
    if value.brackets != "rel" or set(signs) - {"=", "~", "\\in"}:
        return None, value
    name = next((n for n in names if n is not None), None)
    if name is None and "~" not in signs and not all(equal(sides[-1], s) for s in sides[:-1]):
        return None, value
    plain = [k for k, n in enumerate(names) if n is None] or [len(sides) - 1]
    return name, sides[[k for k in plain if "~" not in signs[plain[0]:k]][-1]]

FLIP = {">": "<", ">=": "<=", "<": ">", "<=": ">=", "!=": "!="}

def interval(value):
    "the interval of x > 5 or 1 <= x < 2, the two of x != 1; anything else as it is"
    if value.brackets != "rel" or set(value.signs) - set(FLIP) or len(value.items) > 3 or sum(n is not None for n in value.names) != 1:
        return value
    k, ends, brackets = [n is not None for n in value.names].index(True), [number(-mp().inf), number(mp().inf)], ["(", ")"]
    for j, sign in enumerate(value.signs):
        sign, end = (sign, value.items[j + 1]) if j == k else (FLIP[sign], value.items[j])
        if sign == "!=":
            return without(sequence("()", ends), [end])
        ends[sign[0] == "<"], brackets[sign[0] == "<"] = end, "()[]"[2 * ("=" in sign) + (sign[0] == "<")]
    return sequence("".join(brackets), ends)

def without(interval, points):
    "the pieces of an interval between the points that are taken out of it"
    if not all(p.xs and exact(p.xs[0]) for p in points):
        raise Unparsed("points")
    ends = [interval.items[0], *sorted(points, key=lambda p: p.xs[0]), interval.items[-1]]
    brackets = interval.brackets[0] + ")(" * len(points) + interval.brackets[1]
    return sequence("", [sequence(brackets[2 * k:2 * k + 2], ends[k:k + 2]) for k in range(len(ends) - 1)])

def same_relation(g, a):
    "equations up to a constant factor, inequalities up to a positive one, chains side by side"
    (s, x), (t, y) = (([FLIP.get(c, c) for c in r.signs[::-1]], r.items[::-1]) if r.signs[0][0] == ">" else (r.signs, r.items) for r in (g, a))
    if s != t or len(s) > 1 or s[0] == "\\in" or not all(side.xs and not side.unit for side in x + y):
        return s == t and all(equal(p, q) for p, q in zip(x, y))
    ratios = compute("/", *(compute("+", p, compute("*", MINUS, q)) for p, q in (x, y))).xs
    ratios = [r for r in ratios if r is not None]
    return len(ratios) > 1 and all(r and close(r, ratios[0]) for r in ratios) and (s[0][0] != "<" or mp().re(ratios[0]) > 0)

def same_unit(g, a, parity):
    x, y, u, v = g._replace(unit=""), a._replace(unit=""), g.unit, a.unit
    if "%" in (u, v) and "" in (u, v) and x.xs and y.xs:
        return same_number(x, y, parity) or same_number(*(compute("*", HUNDREDTH, z._replace(unit="")) if z.unit else z for z in (g, a)), parity)
    if "_" in u + v:
        return u == v and x == y or parity and "" in (u, v) and equal(x, y)
    return (u == v or not u or not v or "?" in u + v) and equal(x, y, parity)

def members(value):
    "the answers in a list or a set"
    return [x for item in value.items for x in members(item)] if value.brackets in ("", "{}") else [value]

def rows(value):
    "rows of a matrix or tuple; a tuple is a column, and so is a matrix of one row"
    lines = [x.items if x.brackets else [x] for x in value.items]
    return [[x] for x in lines[0]] if value.brackets == "⟦⟧" and len(lines) == 1 else lines

def equal(g, a, parity=False):
    "does the value a answer the gold g?"
    if g.brackets == a.brackets == "rel" and same_relation(g, a):
        return True
    (g_name, g), (a_name, a) = named(g), named(a)
    if (g.brackets == "rel") != (a.brackets == "rel"):
        g, a = interval(g), interval(a)
    if g_name is not None and a_name is not None and g_name != a_name or "rel" in (g.brackets, a.brackets):
        return False
    if g.unit or a.unit:
        return same_unit(g, a, parity)
    if g.xs and a.xs:
        return same_number(g, a, parity)
    if any(v.brackets and v.brackets[0] in "([⟦" for v in (g, a)):
        x, y, brackets = rows(g), rows(a), {g.brackets, a.brackets} - {"⟦⟧"}
        return (brackets in ({"", "()"}, set()) or len(brackets) == 1 or parity) and [len(r) for r in x] == [len(r) for r in y] and all(
            equal(s, t, parity) for r, q in zip(x, y) for s, t in zip(r, q))
    xs, ys = members(g), members(a)
    if 1 in (len(xs), len(ys)) or len(xs) * len(ys) > MAX_ITEMS ** 2:
        return len(xs) == len(ys) == 1 and (xs, ys) != ([g], [a]) and equal(xs[0], ys[0], parity)
    return all(any(equal(x, y, parity) for y in ys) for x in xs) and all(any(equal(x, y, parity) for x in xs) for y in ys)

# ----------------------------------------------------------------------------
# the judge

def compare(answer, gold, parity):
    "is_equiv for one gold; raises Unparsed"
    if re.fullmatch(r"-?\d{1,1000}", answer) and re.fullmatch(r"-?\d{1,1000}", gold) and not parity:
        return int(answer) == int(gold)
    answer, gold = clean(answer), clean(gold)
    if re.fullmatch(r"\(?[A-F]\)?", gold):
        answer = re.sub(r"^\(?([A-F])[).:]\W+\S.*", r"\1", answer, flags=re.S)  # "(B) 12" is choice B
    x, y = (re.sub(r"[\s\\]", "", t) for t in (answer, gold))
    if x == y or not x or not y:
        return bool(x) and x == y
    if all(re.fullmatch(r"@?\d{1,2}:\d\d(:\d\d)?\D*", t) for t in (answer, gold)) or not re.search(r"[\d\\^_=+{|]", answer + gold):  # times, words, choices
        x, y = (re.sub(r"[@\s().,'-]", "", t) for t in (answer, gold))
        if x == y if len(y) == 1 else x.lower() == y.lower():
            return bool(x)
        if "," not in gold + answer and re.search("@|[a-z]{4}|^[^-+*/]*$|:", gold):
            return False
    return equal(parse(gold), parse(answer), parity)

def verdict(answer, gold, parity=False):
    "(right, unparsed): is the answer equal to one of the golds, and if not, was there a text that could not be read?"
    answer, unparsed = extract_answer(answer) or answer if "boxed" in answer else answer, False
    for text in golds(gold):
        try:
            if compare(answer.strip(), text.strip(), parity):
                return True, False
        except (Unparsed, ArithmeticError, ValueError, RecursionError):
            unparsed = True
    return False, unparsed

def is_equiv(answer, gold, *, parity=False):
    """Is the answer mathematically equal to the gold, by the rules at the top of this file?

    Both are LaTeX or plain text; gold may be a worked solution that ends in a box, or a list of acceptable answers.
    Never raises on text, never evaluates it, always returns soon: what is too long, too deep or too big is not equal."""
    return isinstance(answer, str) and verdict(answer, gold, parity)[0]

def grade_math(response, gold, fallback=False, *, parity=False):
    "Does the response answer with the gold? False if it gives no answer; fallback as in extract_answer, parity as in is_equiv."
    return is_equiv(extract_answer(response, fallback), gold, parity=parity)

# ----------------------------------------------------------------------------
# grading at scale

class GraderError(RuntimeError): "the grader itself failed: a bug to mend, never a reward"

class Grader:
    """Grades in worker processes: an item that hangs or eats memory is killed at its deadline, scores 0.0 and costs no other.

        with Grader(timeout=5.0) as grader:
            rewards = grader.grade(responses, references)   # floats, in order
            future = grader.submit(response, reference)     # a concurrent.futures.Future, to grade while sampling goes on

    A reference is {"ability": "math" or "code", "ground_truth": ...}. The deadline runs from the start of an item's own work: timeout seconds,
    for code (where timeout is the limit of one test) code_timeout. Workers are new interpreters (neither a fork nor an import of the caller's
    script), so this is safe after CUDA and torch.distributed have started; they start on first use and die with their parent, even on SIGKILL.
    Items that scored 0.0 are counted: timeouts, crashes (memory, or a dead worker), unparsed (a text that we could not read). An exception in
    the grader's own code raises GraderError."""

    def __init__(self, workers=None, timeout=5.0, memory_mb=1024, code_timeout=60.0, fallback=False, parity=False):
        self.memory_mb, self.deadlines = memory_mb, {"math": timeout, "code": code_timeout}
        self.options = {"timeout": timeout, "fallback": fallback, "parity": parity}
        self.timeouts = self.crashes = self.unparsed = 0
        self.pool, self.local, self.lock = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()), threading.local(), threading.Lock()
        self.workers = set()

    def __enter__(self): return self
    def __exit__(self, *_): self.close()

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        for worker in list(self.workers):
            self.kill(worker)

    def submit(self, response, reference):
        if reference.get("ability") not in self.deadlines:
            raise ValueError(f"a reference needs the ability 'math' or 'code', not {reference.get('ability')!r}")
        return self.pool.submit(self.work, {"response": response, **reference, **self.options})

    def grade(self, responses, references):
        futures = [self.submit(*pair) for pair in zip(responses, references, strict=True)]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def work(self, item):
        "one item, in a thread that owns one worker process"
        worker = getattr(self.local, "worker", None) or self.start()
        reply = self.ask(worker, json.dumps(item), self.deadlines[item["ability"]])
        if not isinstance(reply, dict):
            self.local.worker = self.kill(worker)  # None: its successor starts with the next item
            reply = {"score": 0.0, "count": reply}
        if "error" in reply:
            raise GraderError(reply["error"])
        with self.lock:
            if reply["count"]:
                setattr(self, reply["count"], getattr(self, reply["count"]) + 1)
        return reply["score"]

    def start(self):
        command = [sys.executable, os.path.abspath(__file__), "--worker", str(os.getpid()), str(self.memory_mb)]
        self.local.worker = worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.workers.add(worker)
        if not isinstance(self.ask(worker, "null", 120), dict):
            self.local.worker = self.kill(worker)
            raise GraderError("a grading worker did not start")
        return worker

    def ask(self, worker, line, timeout):
        "the reply of a worker, or the counter of what went wrong"
        try:
            worker.stdin.write(line.encode() + b"\n")
            worker.stdin.flush()
        except BrokenPipeError:
            return "crashes"
        poll = select.poll()  # select.select() fails on descriptors above 1023
        poll.register(worker.stdout, select.POLLIN)
        if not poll.poll(timeout * 1000):
            return "timeouts"
        line = worker.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else "crashes"

    def kill(self, worker):
        try:
            os.killpg(worker.pid, signal.SIGKILL)  # with all that it has started
        except (ProcessLookupError, PermissionError):
            pass
        for stream in (worker.stdin, worker.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                pass
        worker.wait()
        self.workers.discard(worker)

def serve(parent, memory_mb):
    "the worker: a line of JSON in, a line out, until the parent goes away"
    import resource
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its parent even while it is busy
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nobody else writes between the replies
    mp()
    while os.getppid() == parent and (line := sys.stdin.readline()):
        try:
            item, reply = json.loads(line), {"score": 0.0, "count": None}
            signal.alarm(600)  # where there is no PR_SET_PDEATHSIG, a busy orphan ends here
            if item and item["ability"] == "code":
                reply["score"] = float(grade_code(item["response"], item["ground_truth"], item["timeout"]))
            elif item and (answer := extract_answer(item["response"], item["fallback"])) is not None:
                right, unparsed = verdict(answer, item["ground_truth"], item["parity"])
                reply = {"score": float(right), "count": "unparsed" if unparsed else None}
        except MemoryError:
            break
        except Exception:
            reply = {"error": traceback.format_exc()}
        signal.alarm(0)
        print(json.dumps(reply), file=replies, flush=True)
    os._exit(0)

if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    import grader  # by name, so that the whole file is loaded first
    grader.serve(int(sys.argv[2]), int(sys.argv[3]))
