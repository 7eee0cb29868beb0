r"""
The one judge of answers: generate.py, prime.py and evaluate.py import it unchanged. Maths first, then the pool of workers, the
sandbox for programs (run_python), and code rewards (grade_code).

    >>> grade_math(r"... so its area is \boxed{\tfrac12\text{ cm}^2}.", "0.5")
    True

A small parser of our own computes the value of an answer as it reads it (nothing that a model wrote reaches eval or sympify),
at four random rational points if it has variables: exactly while it stays rational, else to 220 digits with mpmath. Length,
powers, factorials and nesting are limited; the pool (Grader) adds a deadline and a memory limit for each item. The rules:

- Exact values of any size are compared exactly: 0.5 is 1/2, 0.333 is not 1/3 (12 right digits are). A decimal gold grants
  relative 1e-4, and rounding to its significant digits if it has two or more (1/3 for 0.33). 3e8 = 3*10**8 = 3 x 10^8.
- 50% = 0.5; if one side only has the sign, the bare number may be meant in percent (50% = 50). Nothing else is scaled by 100.
  Units, degrees and currencies are ignored, but two abbreviations (cm, m) must agree. 52_8 needs its base.
- x = 5 answers 5 and 5 answers x = 5; x + y = 5 does not. Two names must agree. In a = b = c the last side counts, or the one
  before the first "approximately". Equations are equal up to a constant factor, inequalities up to a positive one.
- Several answers: any order, all and only those; +- stands for both. (1, 2) is ordered, a list without brackets may stand for
  it. Round and square brackets differ; x > 5 is (5, infinity). A vector may be a row or a column.
- 1,234 is a number; with a blank, or inside brackets, the comma separates. 2 3/4 is a mixed number, a/bc is a/(bc), but 1/2x is
  (1/2)x. log is natural, odd roots of negative numbers are real; sums, integrals and limits are names, never computed.
- Words are equal as words, without case, blanks and the brackets of a choice "(B)". No substring ever matches.
- Only boxes count; phrases ("the answer is") and last numbers need fallback=True. parity=True, never for rewards, is the
  lenient reading of Qwen2.5-Math, on which published tables rest: 1e-4, x, x/100 and 100 x, any brackets, any base.
"""
import ast, atexit, builtins, concurrent.futures, contextlib, ctypes, functools, gc, itertools, json, math, operator, os, re
import resource, secrets, select, shutil, signal, subprocess, sys, tempfile, textwrap, threading, time, traceback
import unicodedata, zlib
from collections import namedtuple
from fractions import Fraction
from multiprocessing import connection
from pathlib import Path

import mpmath  # sympy's arithmetic

MAX_CHARS, MAX_DEPTH, MAX_BITS, MAX_ITEMS = 20_000, 60, 40_000, 100
class Unparsed(Exception): "not mathematics that we can read, or too costly to work out"

# --- from a response to the text of its answer
BRACED = functools.reduce(lambda inner, _: r"(?:[^{}\\]++|\\.|{%s})*+" % inner, range(40), "")  # balanced braces
BOX = re.compile(r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)\s*(?:{(%s)}|(\d))" % BRACED, re.S)
GLUE = re.compile(r"(?:[\s$,;&]|\\[,;:()!]|\\q?quad\b|\\text\s*{\s*(?:and|or)\s*}|\b(?:and|or)\b)*")
PHRASE = re.compile(r"\b(?:answer|result|solution)s?\s*(?:\b(?:is|are)\b:?|:)[\s*]*|^(?:A|####):?\s", re.I | re.M)
FORMULA = re.compile(r"(?<!\$)\$((?:\\.|[^$\\])+)\$|\\\((.+?)\\\)|(-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?)", re.S)

def extract_answer(response, fallback=False):
    r"""The content of the last balanced \boxed{...} or \fbox{...}, with the minus before it; boxes with commas or "and" between
    are one list. Else None, or with fallback=True (never for a reward) that of a closing phrase, the last formula or number."""
    boxes, answers, start = list(BOX.finditer(response)), [], None
    if not boxes:
        return from_prose(response) if fallback else None
    while boxes and (not answers or "\n\n" not in (gap := response[boxes[-1].end():start]) and GLUE.fullmatch(gap)):
        start = (box := boxes.pop()).start()
        minus = re.search(r"(?<![\w})\].])\s*\$?\s*-\s*$", response[max(0, start - 20):start])
        answers.insert(0, "-" * bool(minus) + box[box.lastindex])
    return ", ".join(dict.fromkeys(answers))

def from_prose(response):
    "the answer of a response without a box: what follows the last phrase, else the last number or inline formula"
    *before, text = PHRASE.split(re.split(r"<\||\.?\s*I hope it is", response[-5000:])[0])
    line = re.split(r"\n|\.(?=\s|$)", text)[0]
    if before and len(line.split()) <= 3 and re.search(r"\w\w", line):
        return line  # but never a lone letter: a choice in prose is too easy to hit
    found = list(FORMULA.finditer(text))
    return next(filter(None, found[0 if before and found[0].start() == 0 else -1].groups())) if found else None

def golds(gold):
    "the texts that count as right: a string, the box or last phrase of a solution (if it is no word there), of a list each"
    if isinstance(gold, (list, tuple)):
        return [text for item in gold for text in golds(item)]
    phrase = re.search(r"answer is:?\s*(?:\$(.+?)\$|([-+*/^().\d\s]+?)\.?\s*$)", str(gold))
    return [extract_answer(str(gold)) or (phrase and (phrase[1] or phrase[2])) or str(gold)]

# --- from text to tokens: numbers, letters, \commands, _indices, @words@ and signs
SIGNS = dict(zip("−–—∗÷∕⁄º′’％;", "---*///°''%,")) | {"&": ", "} | {c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
SIGNS = str.maketrans(SIGNS | {c: f"_{i}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")} | {s[0]: f"\\{s[1:]} " for s in """×times ·times
    ⋅times ≤le ≥ge ≠ne ≈approx ±pm ∓mp ∞infty ∪cup ∩cap ∈in ∅emptyset √sqrt πpi ∠angle ∖setminus""".split()})
FUNCTIONS = """asinh acosh atanh asin acos atan sinh cosh tanh sin cos tan cot sec csc ln log lg exp sqrt abs floor ceil max min
    gcd lcm""".split()
SAME = dict(pair.split(":") for pair in """arcsinh:asinh arccosh:acosh arctanh:atanh arcsin:asin arccos:acos arctan:atan ln:log
    infinity:infty inf:infty oo:infty le:<= leq:<= leqslant:<= ge:>= geq:>= geqslant:>= lt:< gt:> ne:!= neq:!= approx:~ simeq:~
    equiv:= cdot:* times:* ast:* div:/ mod:bmod pmod:bmod backslash:setminus lvert:| rvert:| vert:| mid:| varnothing:emptyset
    langle:( rangle:) lbrace:{ rbrace:} exponentialE:e choose:binom and:, or:, percent:% pct:% percentage:%""".split())
NAMES = "|".join([*FUNCTIONS, *SAME, *"pi infty alpha beta gamma delta theta lambda mu omega sigma tau phi rho".split()])
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<!\\)\\\\(?=[a-zA-Z]{2})", r"\\"), (r"\\\\\\\\", r"\\\\"),  # doubled by somebody's escaping
    (r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)(?![a-z])", " "), (r"(?<=\d)\s*{\s*,\s*}\s*(?=\d)", ","),  # 14{,}916
    (r"\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|limits|boldsymbol|vec|hat|bm|math(?:bf|it|sf|cal)|bf|rm|it)"
     r"(?![a-zA-Z])\.?", " "),
    (r"\\!\s*|(?<=\d)\\,(?=\d{3}(?!\d))|\b(?:np|numpy|math)\.(?=[a-z])", ""),
    (r"\\begin\s*{vmatrix}", r"\\det ⟦⟦"), (r"\\begin\s*{(?:array}\s*{[^{}]*|\w*matrix|cases)}", "⟦⟦"),  # a tuple of its rows
    (r"(?:\\\\\s*)?\\end\s*{(?:array|\w*matrix|cases)}", "⟧⟧"), (r"\\\\|\\(?=[-\d])", "⟧, ⟦"),
    (r"\\(?:begin|end)\s*{\w+\*?}|(?<!\\)\\[,;:> ]|\\q?quad(?![a-z])|~|\\?[$€£]|\\[()\[\]]", " "),
    (r"\\[dtc](frac|binom)(?![a-z])", r"\\\1"), (r"\\frac\s*(\d)\s*(\d+)", r"\\frac{\1}{\2}"),
    (r"\\%", "%"), (r"\*\*", "^"), (r"\\prime", "'"), (r"\^\s*{?\s*('[\s']*)}?", r"\1"),
    (r"(?:\^\s*{?\s*\\circ\s*}?|\\degrees?(?![a-z]))(?:\s*[CF]\b)?", "°"),
    (r"\^\s*{?\s*(?:\\(?:text|mathrm|mbox)\s*{(?:th|st|nd|rd)}|th\b)\s*}?", ""), (r"(?<=\w[a-z])\.(?= )", ""),  # sq. ft.
    (r"\^\s*({[^{}]*}|\w)\s*_\s*({[^{}]*}|\w)", r"_\2^\1"),  # x^2_i
    (r"\\mathbb\s*{?\s*R(?:\s*})?", r"(-\\infty,\\infty)"),
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*{(\d{1,20})}",  # 0.1666...
     lambda m: f"({m[1]}{m[2]}{m[3]}-{m[1]}{m[2]})/({'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"(?<![\w.^}/*])(\d+) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 2 3/4
    (r"(?<![\w.^}])(\d+)\s*(\\frac\s*{\d+}\s*{\d+})", r"(\1+\2)"),
    (r"(?<![\w.^}/])(\d+)/(\d+)(?=\s*[a-zA-Z\\(])", r"\\frac{\1}{\2}"),  # 1/2x
    (r"(\d\.\d*)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*{?\s*([-+]?\d+)\s*}?", r"\1e\2")]]
WORDS = re.compile(r"\\(text(?:bf|it|rm|normal|sf)?|mbox|mathrm|operatorname\*?|emph)\s*{([^{}]*)}")
UNIT = re.compile(r"(?:(?<=[\d})%])|(?<=\\pi))\s*(?:(?:[ckm]?m|in|ft|yd|sq|k?g|lbs?|oz|hr?s?|mph|th|st|nd|rd|seconds?|minutes?)"
                  rf"\b(?![({{])(?:/[hs]\b)?|(?:(?<=[\d}})] )|(?<=\\pi ))(?!{NAMES}|abc|xyz)[a-z]{{3,}}\b)(?: [a-z]{{2,}}\b)*")
NAME = re.compile("(%s)$|%s" % (NAMES, "|".join(f for f in FUNCTIONS if len(f) > 2)))
TOKEN = re.compile(r"\s*([1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d*)?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|@[^@]*@|\\[a-zA-Z]+|"
                   r"\\.|[<>!]=|_\s*(?:{(?:[^{}]|{[^{}]*})*}|\\?[a-zA-Z]+|.)|[a-zA-Z]+|'+|\S)", re.S)

def unwrap(m):
    r"\text{...} and its relatives: letters and formulas go back into the formula, words and units become one token"
    text = re.sub(r"[@\\]", " ", m[2]).strip()
    if text in FUNCTIONS or m[1][0] == "o":
        return f"\\{text} "
    unit = re.search(r"(?:[\d}]|\\(?:mathrm|text)\s*{[^{}]*}\s*(?:\\cdot|/))\s*$", m.string[:m.start()]) and text not in "eiId"
    word = text.strip(" ,") not in SAME and re.search("[a-zA-Z]" if unit else "[a-zA-Z]{2}", text)
    return f"@{text}@" if word else f" {text} "

def clean(text):
    "one spelling for what people write in many"
    text = " ".join(unicodedata.normalize("NFKC", text[:2 * MAX_CHARS].translate(SIGNS)).translate(SIGNS).split())
    if len(text) > MAX_CHARS:
        raise Unparsed("too long")
    for pattern, new in [*REWRITES, (WORDS, unwrap), (WORDS, unwrap), (UNIT, lambda m: f"@{m[0].strip()}@")]:
        text = " ".join(pattern.sub(new, text).split())  # on long runs of blanks patterns take quadratic time
    text = re.sub(r"@\s*(?:[/*]|\\cdot)?\s*@", " ", re.sub(r"(?<=@)\s*\^\s*{?-?\d+}?", "@@", text))
    return text.strip(" =").rstrip(".,: ")

def tokenize(text):
    tokens, inside = [], 0
    for token in TOKEN.findall(text):
        inside += (token in ("(", "[", "\\{")) - (token in (")", "]", "\\}"))
        if inside > MAX_DEPTH:
            raise Unparsed("too deep")
        if token[0].isdigit() and "," in token and inside:
            tokens += re.split("(,)", token)  # (100,200) is a pair
        elif token.lstrip("\\").isalpha():
            tokens += [t for t in letters(token) if t != "," or tokens[-1:] != [","]]  # "2, and 3"
        else:
            tokens.append(token)
    return tokens

def letters(run):
    "a run of letters is a known name, a word, or a product of variables"
    if m := re.match(r"\\[a-zA-Z]+", run) or NAME.match(run):
        name = SAME.get(m[0].strip("\\"), m[0].strip("\\"))
        return ["\\" + name if name.isalpha() and len(name) > 1 else name] + (letters(run[m.end():]) if m[0] != run else [])
    return ["@" + run] if re.fullmatch(r"[A-Z]?[a-z]*[aeiou][a-z]*", run) and len(run) > 3 else list(run)

# --- arithmetic at one point: with fractions, else in mpmath
mp = mpmath.MPContext()  # a private one, so that nobody else's precision changes
mp.dps = 220

def exact(*xs): return all(isinstance(x, Fraction) for x in xs)
def bits(x): return sum(map(int.bit_length, x.as_integer_ratio())) if exact(x) else abs(mp.mag(x)) if mp.isnormal(x) else 0
def floor(x): return Fraction(int(mp.floor(mp.re(x) + mp.mpf("1e-50"))))

def power(a, b):
    if abs(mp.convert(b)) * (bits(a) + 1) > MAX_BITS:
        raise Unparsed("power too big")
    if exact(a, b) and b.denominator == 1:
        return a ** int(b)
    if exact(b) and b.denominator % 2 and not mp.im(a) and mp.re(a) < 0:
        return mp.power(-a, b) * (-1) ** b.numerator  # a real odd root
    return mp.power(a, b)

def factorial(n):
    if not abs(mp.convert(n)) < 4096:
        raise Unparsed("factorial too big")
    return Fraction(math.factorial(int(n))) if exact(n) and n.denominator == 1 and n >= 0 else mp.gamma(n + 1)

TABLE = {
    "+": operator.add, "-": lambda a, b: a + -b, "*": operator.mul, "/": (divide := lambda a, b: a * (1 / b)), "^": power,
    ":": divide, "\\frac": divide, "!": factorial, "\\abs": abs, "\\floor": floor, "\\ceil": lambda x: -floor(-x),
    "\\binom": lambda n, k: factorial(n) / (factorial(k) * factorial(n - k)), "\\exp": lambda x: power(mp.e, x),
    "\\bmod": lambda a, b: a - b * floor(a * (1 / b)), "\\sqrt": lambda x, n=Fraction(2): power(x, 1 / n),
    "\\log": lambda x, base=None: mp.log(x) / (mp.log(base) if base else 1) if x else 1 / x,
    "\\lg": lambda x: mp.log(x, 10), "\\max": lambda *xs: max(xs, key=mp.re), "\\min": lambda *xs: min(xs, key=mp.re),
    "\\gcd": (gcd := lambda *xs: Fraction(math.gcd(*(x.numerator for x in xs)), math.lcm(*(x.denominator for x in xs)))),
    "\\lcm": lambda *xs: 1 / gcd(*(1 / x for x in xs)),
    "\\det": lambda *xs: mp.det([xs[k:k + math.isqrt(len(xs))] for k in range(0, len(xs), math.isqrt(len(xs)))])}

# --- from tokens to values
# A number has xs: one value, or one for each point, NaN where it is undefined; digits, the significant ones, if it is written
# as a decimal; and a unit: "cm", "%", "°", or "_8" in base 8. A collection has items and brackets: "" (none), "{}", "[)", ...,
# "⟦⟧" for a matrix or its row. A relation has items, the signs between them, and names: what each side is called, or None.
Value = namedtuple("Value", "xs digits unit brackets items signs names", defaults=[None, 0, "", None, (), (), ()])
SIGN = {"+": Value([Fraction(1)]), "-": Value([Fraction(-1)])}
RELATIONS = "= < > <= >= != ~ \\in".split()
LEVEL = {"\\cup": 0, "\\cap": 0, "\\setminus": 0, "+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "\\bmod": 2}
CLOSERS = {"(": ")]", "[": ")]", "{": "}", "\\{": "\\}", "⟦": "⟧", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil", "|": "|"}
DEPTH = dict.fromkeys(CLOSERS, 1) | dict.fromkeys(") ] } \\} ⟧ \\rfloor \\rceil".split(), -1) | {"|": 0, "": -MAX_CHARS}
STOP = {*RELATIONS, *LEVEL, *DEPTH, *",^!%°"} - set(CLOSERS)  # no factor starts with these; "" is below the last token

def collection(items, brackets=""): return Value(brackets=brackets, items=items) if brackets or len(items) != 1 else items[0]

def plain(value):
    "50% as 0.5, 180 degrees as pi"
    unit = {"%": Fraction(1, 100), "°": mp.pi / 180}.get(value.unit, 1)
    return value._replace(xs=[x * unit for x in value.xs], unit="")

def scale(factor, value):
    "a product: -50% keeps its unit, and a factor goes into a tuple"
    if value.brackets and value.brackets[0] in "([⟦":
        return value._replace(items=[scale(factor, x) for x in value.items])
    if factor in SIGN.values() and value.xs:
        return value._replace(xs=[x * factor.xs[0] for x in value.xs])
    return compute("*", factor, value)

def compute(name, *args):
    "a function of numbers, point by point"
    function = TABLE.get(name) or getattr(mp, name[1:], None)
    if not function or any(not a.xs or bits(x) > MAX_BITS for a in args for x in a.xs or [0]):
        raise Unparsed(name)
    args, xs = [plain(a).xs if a.unit else a.xs for a in args], []
    for k in range(max(map(len, args))):
        column = [a[k % len(a)] for a in args]
        try:
            x = function(*column)
            if k > 1 and not exact(x) and mp.im(x) and not any(map(mp.im, column)):
                x = mp.nan  # where variables are negative, a complex value of real arguments depends on the branch
        except (ArithmeticError, TypeError, ValueError, AttributeError):  # no value there, or not for such arguments
            x = mp.nan
        xs.append(x)
    return Value(xs)

def variable(name):
    "a random rational for each of four points, which depends on the name only; positive at the first two"
    if name in ("i", "e", "\\pi", "\\infty"):
        return Value([{"i": mp.mpc(0, 1), "e": mp.e, "\\pi": mp.pi, "\\infty": mp.inf}[name]])
    draws = [zlib.crc32(f"{name} {k}".encode()) for k in range(4)]
    return Value([Fraction(d % 2200 + 300, 997) * (-1 if k > 1 and d >> 16 & 1 else 1) for k, d in enumerate(draws)])

def split(tokens, signs):
    "the parts of tokens between those signs that are outside brackets, and the signs"
    depths = itertools.accumulate(DEPTH.get(token, 0) for token in tokens)
    cuts = [k for k, (token, depth) in enumerate(zip(tokens, depths)) if depth == 0 and token in signs]
    return [tokens[a + 1:b] for a, b in zip([-1, *cuts], [*cuts, len(tokens)])], [tokens[k] for k in cuts]

def read(tokens):
    "the value of a list, a relation or an expression"
    parts, commas = split(tokens, [","])
    if commas:
        return collection([read(part) for part in parts])
    sides, signs = split(tokens, RELATIONS)
    if signs:
        if signs[0][0] == ">":  # 3 > x is x < 3
            sides, signs = sides[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
        return Value(items=[read(side) for side in sides], signs=signs, names=[name_of(side) for side in sides])
    value = expression(stack := ["", *reversed(tokens)])
    if stack[-1]:
        raise Unparsed("syntax")
    return value

def name_of(tokens):
    "the name that a side of an equation is (x, f(2), AB, |AB|, dy/dx, angle APC), None if it is a real expression"
    text = re.sub(r"(?<=[a-zA-Z'])\([^()]*\)|\\(?:lim|sum).*", "", "".join(t for t in tokens if t[:1] != "_"))
    named = re.fullmatch(r"[a-zA-Z\s\\|:/,(){}'@]*", text) and not {"\\pi", "\\infty", "\\sqrt", "\\emptyset"} & set(tokens)
    return re.sub(r"[{}\s]", "", "".join(tokens)) if named else None

def expression(tokens, lowest=0):
    "operands, and the operators of this level and the tighter ones; all these read from the end of a reversed list of tokens"
    value = scale(SIGN[tokens.pop()], expression(tokens, 2)) if tokens[-1] in SIGN else product(tokens)
    while (level := LEVEL.get(tokens[-1], -1)) >= lowest:
        sign, left, right = tokens.pop(), value, expression(tokens, level + 1)
        if level == 0 and len(members(left)) + len(members(right)) > 2 * MAX_ITEMS:
            raise Unparsed("too many")
        if sign == "\\cup":
            value = collection([left, right])
        elif sign == "\\cap":
            value = collection([x for x in members(left) if any(equal(x, y) for y in members(right))])
        elif sign == "\\setminus":
            for point in members(right):
                value = collection([rest for x in members(value) for rest in without(x, point)])
        else:
            value = scale(left, right) if sign == "*" else compute(sign, left, right)
    return value

def without(x, point):
    "what is left of a member of a set, an interval or not, without this point"
    ends = [mp.re(y.xs[0]) for y in (*x.items[:1], point, *x.items[1:]) if y.xs]
    if x.brackets and len(ends) == 3 and ends[0] < ends[1] < ends[2]:
        return [collection([x.items[0], point], x.brackets[0] + ")"), collection([point, x.items[1]], "(" + x.brackets[1])]
    return [] if equal(x, point) else [x]

def product(tokens, inner=False):
    "juxtaposition: 2x, 3 sqrt 5, a(b+c), in a function's argument up to a bracket; words after it are a unit, short ones count"
    value = factor(tokens)
    while (top := tokens[-1]) not in STOP and top[0] not in "@_'" and not (inner and (top in CLOSERS or top[1:] in FUNCTIONS)):
        value = scale(value, factor(tokens))
    unit = tokens.pop().strip("@ ") if tokens[-1][:1] == "@" else ""
    return value._replace(unit=unit) if 0 < len(unit) < 4 else value

def factor(tokens):
    "an atom with its powers, indices, primes, factorials, percent and degree signs"
    name, value = tokens[-1], atom(tokens)
    while (sign := tokens[-1]) and (sign in "^!%°" or sign[0] in "_'"):
        tokens.pop()
        if sign == "^":
            value = compute("^", value, scale(SIGN[tokens.pop()], atom(tokens)) if tokens[-1] in SIGN else atom(tokens))
        elif sign == "!":
            value = compute("!", value)
        elif sign in "%°" or name[0].isdigit() and sign[0] == "_":
            value = value._replace(unit=re.sub(r"[@{}\s]", "", sign))
        elif not name[0].isdigit():
            value = variable(name := name + re.sub(r"[@{}\s]|\\mathrm|\\text", "", sign))
    return value

def atom(tokens):
    token = tokens.pop()
    if re.match(r"\.?\d", token):
        mantissa, _, exponent = token.replace(",", "").rstrip(".").lower().partition("e")
        digits = len(mantissa.replace(".", "").lstrip("0")) if exponent or "." in mantissa else 0
        return Value([Fraction(mantissa) * power(Fraction(10), Fraction(exponent or 0))], digits)
    if token in CLOSERS:
        return bracket(token, tokens)
    if token in ("\\frac", "\\binom"):
        return compute(token, atom(tokens), atom(tokens))
    if token == "\\det" and tokens[-1] == "⟦":
        return compute("\\det", *[x for row in atom(tokens).items for x in row.items])
    if token[1:] in FUNCTIONS:
        return function(token, tokens)
    if token in STOP or not token.strip("\\@")[:1].isalpha():
        raise Unparsed("no operand")
    return variable(token.strip("@ ").lower() if token[0] == "@" else token)

def bracket(opener, tokens):
    content, depth = [], 0
    while not content or depth > 0 or depth == 0 and not content[-1] == opener == "|":
        content.append(tokens.pop())
        depth += DEPTH.get(content[-1], 0)
    closer = content.pop()
    if not closer or closer not in CLOSERS[opener]:
        raise Unparsed("brackets")
    if opener in ("\\lfloor", "\\lceil", "|"):
        return compute({"|": "\\abs"}.get(opener, opener.replace("\\l", "\\")), read(content))
    parts, _ = split(content, "|:")
    if closer[-1] == "}" and len(parts) == 2 and split(parts[1], RELATIONS)[1]:
        return read(parts[1])  # the set of all x with x > 2
    value = read(content) if content else collection([])
    return value._replace(brackets=opener[-1] + closer[-1]) if value.brackets == "" else value

def function(name, tokens):
    "sin x, sin^2 x, sin(x), log_2 8, sqrt[3]{x}, max(a, b)"
    exponent, base = None, [atom(tokens)] if name == "\\sqrt" and tokens[-1] == "[" else []
    while tokens[-1][:1] in ("^", "_"):
        if (sign := tokens.pop()) == "^":
            exponent = atom(tokens)
        else:
            base = [read(tokenize(sign[1:]))]
    value = atom(tokens) if name == "\\sqrt" or tokens[-1] in CLOSERS else product(tokens, inner=True)
    if exponent == SIGN["-"]:
        return compute("\\a" + name[1:], value)
    value = compute(name, *(value.items or [value]), *base)
    return compute("^", value, exponent) if exponent else value

@functools.lru_cache(256)
def parse(text):
    "the value of a cleaned text; +- gives a list of both"
    tokens = tokenize(text)
    both = [{"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}] if {"\\pm", "\\mp"} & set(tokens) else [{}]
    return collection([read([signs.get(token, token) for token in tokens]) for signs in both])

# --- equality of values: g is the gold, a the answer; rules are (parity, tolerance)
def close(x, y, tolerance="1e-200"):
    if exact(x, y) and tolerance == "1e-200" or not mp.isfinite(x) or not mp.isfinite(y):
        return x == y
    x, y = mp.convert(x), mp.convert(y)
    return abs(x - y) <= max(abs(x), abs(y)) * mp.mpf(tolerance) + mp.mpf("1e-210")

def same_number(g, a, parity=False, tolerance=None):
    n = max(len(g.xs), len(a.xs))
    both = [xy for xy in zip(g.xs * (n // len(g.xs)), a.xs * (n // len(a.xs))) if not any(map(mp.isnan, xy))]
    if n > 1 or not both or close(*both[0]):
        return len(both) >= min(n, 2) and all(close(x, y) for x, y in both)
    x, y = both[0]
    if parity and any(close(x * k, y, "1e-4") for k in (1, 100, Fraction(1, 100))):
        return True
    digit = Fraction(10) ** (math.floor(mp.log10(abs(x))) + 1 - g.digits) if x and g.digits > 1 else 0  # its last one
    granted = max(tolerance or 0, digit / 2, abs(x) / 10000 if g.digits else 0)
    return abs(mp.convert(x + -y)) <= granted * (1 + mp.mpf("1e-50")) or a.digits >= 12 and close(x, y, "1e-12")

def same_relation(g, a):
    "equations up to a constant factor, inequalities up to a positive one, chains side by side"
    if g.signs != a.signs or len(g.signs) > 1 or not all(side.xs for side in g.items + a.items):
        return g.signs == a.signs and all(map(equal, g.items, a.items))
    ratio = [r for r in compute("/", compute("-", *g.items), compute("-", *a.items)).xs if not mp.isnan(r)]
    return len(ratio) > 1 and (g.signs[0][0] != "<" or mp.re(ratio[0]) > 0) and all(r and close(r, ratio[0]) for r in ratio)

def named(value):
    "(name, value) of an equation like x = 5, f(2) = 1 + 1 = 2, |AB| = sqrt 3 ~ 1.7, and (x, the interval) of 1 <= x < 2"
    names, signs = [n for n in value.names if n is not None] or [None], set(value.signs)
    if signs and signs <= {"<", "<="} and len(names) == 1 and names[0]:
        k = value.names.index(names[0]) + 1
        ends, signs = [Value([-mp.inf]), *value.items, Value([mp.inf])], ["<", *value.signs, "<"]
        return names[0], collection([ends[k - 1], ends[k + 1]], "[("[signs[k - 1] == "<"] + "])"[signs[k] == "<"])
    trivial = all(equal(value.items[-1], side) for side in value.items[:-1]) if signs == {"="} and names == [None] else True
    if not signs or signs - {"=", "~", "\\in"} or not trivial:
        return None, value
    sides = value.items[:[*value.signs, "~"].index("~") + 1]
    return names[0], ([side for side, n in zip(sides, value.names) if n is None] or value.items)[-1]

def members(value):
    "the answers in a list or a set"
    return [x for item in value.items for x in members(item)] if value.brackets in ("", "{}") else [value]

def equal(g, a, *rules):
    "does the value a answer the gold g?"
    if g.signs and a.signs and same_relation(g, a):
        return True
    (g_name, g), (a_name, a) = named(g), named(a)
    if g.signs or a.signs or g_name is not None and a_name is not None and g_name != a_name:
        return False
    if g.xs and a.xs:
        units = {g.unit, a.unit}
        percent = units == {"", "%"} and same_number(plain(g), plain(a), *rules)
        return percent or (len(units) == 1 or "" in units and "_" not in g.unit + a.unit) and same_number(g, a, *rules)
    if any(v.brackets and v.brackets[0] in "([⟦" for v in (g, a)):
        brackets = {g.brackets, a.brackets} - {"⟦⟧"}
        return (brackets <= {"", "()"} or len(brackets) == 1) and len(g.items) == len(a.items) and all(
            equal(x, y, *rules) for x, y in zip(g.items, a.items))
    xs, ys = members(g), members(a)
    if 1 in (len(xs), len(ys)) or len(xs) * len(ys) > MAX_ITEMS ** 2:
        return len(xs) == len(ys) == 1 and (xs, ys) != ([g], [a]) and equal(xs[0], ys[0], *rules)
    return all(any(equal(x, y, *rules) for y in ys) for x in xs) and all(any(equal(x, y, *rules) for x in xs) for y in ys)

# --- the judge
def judge(answer, gold, parity, tolerance):
    "is_equiv for one gold; raises Unparsed"
    answer, gold = clean(answer), clean(gold)
    if parity:  # without bases and kinds of brackets
        answer, gold = (re.sub(r"(?<=\d)_({\d+}|\d+)", "", t).replace("[", "(").replace("]", ")") for t in (answer, gold))
    if re.fullmatch(r"\(?[A-F]\)?", gold):
        answer = re.sub(r"^\(?([A-F])[).:]\W+\S.*", r"\1", answer, flags=re.S)  # "(B) 12" is choice B
    words = not re.search(r"[\d\\^_=+{|]", answer + gold)
    x, y = (re.sub(r"[@\s().,'-]" if words else r"[@\s\\]", "", t).strip(".") for t in (answer, gold))
    if x == y or words and len(y) > 1 and x.lower() == y.lower():
        return x != ""
    return equal(parse(gold), parse(answer), parity, tolerance)

def verdict(answer, gold, parity=False, tolerance=None):
    "(right, unparsed): is the answer equal to one of the golds, and if not, was there a text that could not be read?"
    unparsed = False
    for text in golds(gold):
        try:
            if judge(extract_answer(answer) or answer, text, parity, tolerance):
                return True, False
        except (Unparsed, ArithmeticError, ValueError, RecursionError):
            unparsed = True
    return False, unparsed

def is_equiv(answer, gold, *, parity=False, tolerance=None):
    "Does a text answer a gold (a text, a solution with a box, or a list of these)? tolerance: an absolute error. Never raises."
    return isinstance(answer, str) and verdict(answer, gold, parity, tolerance)[0]

def grade_math(response, gold, fallback=False, *, parity=False, tolerance=None):
    "Does a response answer with the gold? False if it gives no answer; fallback as in extract_answer, the rest as in is_equiv."
    return is_equiv(extract_answer(response, fallback), gold, parity=parity, tolerance=tolerance)

# --- grading at scale
class GraderError(RuntimeError): "the grader itself failed: a bug to mend, never a reward"

class Score(float):
    'a grade in [0, 1]; failure: None, or why it is 0.0: "timeouts", "crashes" (memory, a dead worker) or "unparsed"'
    failure = None

class Grader:
    """Grades in worker processes: grade(responses, references) returns Scores in order, submit(response, reference) a Future.
    A reference is {"ability": "math" or "code", "ground_truth": ...}, "tolerance" if it has one. An item has timeout seconds
    from the start of its own work (code code_timeout; there timeout is for one test); if it hangs or eats memory, it scores 0.0
    and costs no other. Workers are new interpreters (safe after CUDA has started) and die with their parent, even on SIGKILL.
    Failures are counted: timeouts, crashes, unparsed. A bug in the grader itself raises GraderError."""

    def __init__(self, workers=None, timeout=5.0, memory_mb=1024, code_timeout=60.0, fallback=False, parity=False):
        self.options = {"timeout": timeout, "fallback": fallback, "parity": parity}
        self.deadlines = {"math": timeout, "code": code_timeout}
        self.timeouts = self.crashes = self.unparsed = 0
        self.idle, self.kind, self.lock = [], ("grader", str(memory_mb)), threading.Lock()
        self.threads = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count())  # each waits for one worker

    def __enter__(self): return self
    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)
        for worker in self.idle:
            worker.kill()
            worker.wait()

    def grade(self, responses, references):
        return [future.result() for future in [self.submit(*pair) for pair in zip(responses, references, strict=True)]]

    def submit(self, response, reference):
        if reference.get("ability") not in self.deadlines:
            raise ValueError(f"a reference needs the ability 'math' or 'code', not {reference.get('ability')!r}")
        return self.threads.submit(self.work, {**reference, **self.options, "response": response})

    def work(self, item):
        try:
            value, failure = ask(self.idle, self.kind, item, self.deadlines[item["ability"]])
        except (OSError, EOFError) as end:
            value, failure = 0.0, "timeouts" if isinstance(end, TimeoutError) else "crashes"
        score = Score(value)
        score.failure = failure
        if failure:
            with self.lock:
                vars(self)[failure] += 1
        return score

def grade_items(memory_mb):
    "the life of a worker"
    PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its parent even while it is busy
    with contextlib.suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for item, reply in requests():
        value, unparsed = 0.0, False
        try:
            if item["ability"] == "code":
                value = grade_code(item["response"], item["ground_truth"], item["timeout"])
            elif (answer := extract_answer(item["response"], item["fallback"])) is not None:
                value, unparsed = verdict(answer, item["ground_truth"], item["parity"], item.get("tolerance"))
            reply([float(value), "unparsed" if unparsed else None])
        except MemoryError:
            os._exit(1)
        except Exception:
            reply(traceback.format_exc())

# --- child processes: this file as a command, which answers JSON with JSON
def start(kind, *words):
    "a child that is ready: a worker (kind grader), or a template of programs at a level of isolation. GraderError if it fails."
    command = [*box(kind), sys.executable, os.path.abspath(__file__), kind, *words]
    with contextlib.suppress(OSError, EOFError):
        ours, theirs = connection.Pipe()
        child = subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, cwd=tempfile.gettempdir(),
                                 start_new_session=True, env=os.environ if kind == "grader" else ENVIRONMENT)
        theirs.close()
        child.pipe = ours
        if ours.poll(60):
            ours.recv_bytes()  # it is ready
            return child
        child.kill()
    raise GraderError(f"a child process ({kind}) does not start")

def ask(idle, kind, request, seconds):
    """The reply of an idle child, or of a new one of this kind (what start takes). TimeoutError, or another OSError or EOFError
    if it dies; it is killed then. GraderError with its traceback if it has a bug."""
    try:
        while (child := idle.pop()).poll() is not None:  # it has died meanwhile
            pass
    except IndexError:
        child = start(*kind)
    try:
        child.pipe.send_bytes(json.dumps(request).encode())
        if not child.pipe.poll(seconds):
            raise TimeoutError
        reply = json.loads(child.pipe.recv_bytes())
    except (OSError, EOFError):
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    idle.append(child)
    if isinstance(reply, str):
        raise GraderError(reply)
    return reply

def requests():
    "in the child: each request, and what replies to it"
    pipe = connection.Connection(os.dup(0))
    pipe.send_bytes(b"ready")
    with contextlib.suppress(OSError, EOFError):  # until the caller has gone
        while True:
            yield json.loads(pipe.recv_bytes()), lambda value: pipe.send_bytes(json.dumps(value).encode())
    os._exit(0)

# --- programs that a model wrote
OUTPUT_LIMIT = 8 << 20  # bytes that a program may write to one file, stdout and stderr included
MAX_TASKS = 16          # processes and threads of one program; each process has the memory limit to itself
SCRATCH = "/dev/shm"    # where programs in namespaces may write: 64 MB in memory
ENVIRONMENT = dict(PATH="/usr/local/bin:/usr/bin:/bin", LANG="C.UTF-8", HOME=".", TMPDIR=".", CUDA_VISIBLE_DEVICES="",
                   OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1",
                   PYTHONUTF8="1", PYTHONHASHSEED="0", PYTHONNOUSERSITE="1")
# Imported before tested programs, as by PRIME's scorer, so that `List[int]` and `gcd` just work.
PRELUDE = "import sys, math, re, string, random, heapq, bisect, itertools, functools, collections, datetime\n" + "".join(
    f"from {name} import *\n" for name in "typing collections heapq bisect itertools functools math builtins".split())
RunResult = namedtuple("RunResult", "stdout stderr returncode timed_out")  # returncode: 128 + signal if one has ended it
PRCTL = getattr(ctypes.CDLL(None), "prctl", lambda *_: None)  # macOS has none
IDLE = {}               # templates without work, by level and interpreter
os.register_at_fork(after_in_child=IDLE.clear)

@functools.cache
def isolation(sandbox=None):
    """What separates programs from this machine, the first that works. RuntimeError if none does, or not the first although
    sandbox="required"; None: what was said before. Root's programs run as a user that nobody is; only in bubblewrap can he
    read any interpreter.
    "bubblewrap" (0.7 or newer): a program reads the interpreter and /usr only, writes to its scratch directory only, has no
        network, sees no other process, and what it has started ends with it. The kernel is the machine's.
    "namespaces" (unshare, mount and setpriv): it can read and write the user's files; the rest holds.
    "limits": on time, memory, tasks and output; an empty environment. It can use the network, disturb and leave processes."""
    sandbox = sandbox or os.environ.get("PRIME_SANDBOX", "auto")
    for level in ("bubblewrap", "namespaces", "limits")[:1 if sandbox == "required" else 3]:
        with contextlib.suppress(GraderError):
            if run_python("print(6 * 7)", timeout=60, level=level).stdout == "42\n":
                os.environ["PRIME_SANDBOX"] = sandbox  # for the grading workers
                return level
    raise RuntimeError(f"sandbox={sandbox!r} cannot be had on this machine")

def run_python(code, stdin="", timeout=10.0, memory_mb=1024, level=None, **more):
    """Run a program in the sandbox -> RunResult. `timeout`: seconds of wall clock; `memory_mb`: address space of each of its
    processes; `level`: see isolation; `more`: see run. One thread, no GPU. stderr is shortened to the program's own lines of
    the traceback, as NuminaMath shows it to the model. Thread-safe: each concurrent call has a template, an interpreter with
    numpy and sympy that waits in the sandbox and forks for each program."""
    level = level or isolation()
    request = dict(more, code=code, stdin=stdin, timeout=timeout, memory_mb=memory_mb)
    for idle in IDLE.setdefault((level, sys.executable), []), []:  # an idle template may have ended; a new one has not
        with contextlib.suppress(OSError, EOFError):
            stdout, stderr, *end = ask(idle, [level], request, timeout + 10)
            return RunResult(stdout, shorten(stderr), *end)
    return RunResult("", "", 128 + signal.SIGKILL, False)  # it has killed its template

def box(kind):
    "the command that isolates another: it is process 1 of namespaces, and bubblewrap shows it the interpreter only, read-only"
    root = os.getuid() == 0
    if kind == "namespaces":
        rights = "" if root else "--map-current-user --keep-caps"  # for the mount; setpriv gives them back
        script = f'mount -t tmpfs -o size=64m,mode=1777 - {SCRATCH} && exec setpriv --inh-caps=-all --ambient-caps=-all "$@"'
        return [*f"unshare --net --ipc --pid --fork --mount-proc {rights} sh -c".split(), script, "sh"]
    if kind != "bubblewrap":
        return []
    words = "bwrap --unshare-net --unshare-ipc --unshare-pid --unshare-uts --as-pid-1 --proc /proc --dev /dev".split()
    if root:
        words += "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"
    paths = [*"/usr /bin /lib /lib64 /etc/ld.so.cache /etc/alternatives".split(), sys.prefix, sys.base_prefix, __file__]
    paths = sorted({q for p in paths if os.path.exists(p) for q in (os.path.abspath(p), os.path.realpath(p))})
    for folder in sorted({str(folder) for path in paths for folder in Path(path).parents} - {"/"}):
        words += "--perms", "0755", "--dir", folder  # else it copies the 0700 of /root
    for path in paths:
        words += "--ro-bind", path, path
    return [*words, *f"--perms 1777 --size {64 << 20} --tmpfs {SCRATCH} --remount-ro /dev --remount-ro /".split()]

def shorten(stderr):
    "of a traceback its first line, the program's own lines and the last; directories and addresses removed"
    _, head, trace = stderr.rpartition("Traceback (most recent call last):\n")
    *lines, last = trace.rstrip().split("\n") if head else [stderr]
    own = [line for before, line in zip(["", *lines], lines) if '  File "program.py"' in (before[:19], line[:19])]
    last = re.sub(r"0x[0-9a-f]{6,}", "0x...", re.sub(r"(?<![\w/:])(/[\w.+-]+)+/", "", last))
    return "\n".join([head.strip(), *own, last, ""]) if head else last

# --- in the sandbox
def run_programs():
    "the life of a template. In the process of a program it returns what run() takes."
    with contextlib.suppress(ImportError):
        import numpy, sympy  # noqa: F401
        x = sympy.Symbol("x")
        sympy.solve(sympy.integrate(x * sympy.exp(x), x) - 1), sympy.simplify(sympy.sqrt(8) * x / 2)  # loads what it loads late
    gc.freeze()  # collections in the children shall not touch, and so copy, these pages
    alone, root = os.getpid() == 1, os.getuid() == 0
    if root:
        user = 61184 + secrets.randbelow(4336)  # one of those that systemd makes on the fly
        os.setgroups([]), os.setgid(user), os.setuid(user)
    PRCTL(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    PRCTL(4, 0, 0, 0, 0)   # PR_SET_DUMPABLE: programs, of the same user, may not look into this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 ignores signals of its namespace that it has no handler for
    os.chdir(SCRATCH if alone else ".")
    clean = alone and traces()
    for request, reply in requests():
        folder, files = tempfile.mkdtemp(dir=os.getcwd()), [tempfile.TemporaryFile(dir=".") for _ in range(3)]
        files[0].write(request.pop("stdin").encode("utf-8", "replace"))
        files[0].seek(0)
        if (program := os.fork()) == 0:
            return dict(request, folder=folder, files=files, own_user=alone or root)
        end = await_end(program, request["timeout"])
        with contextlib.suppress(RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
        reply([*(os.pread(file.fileno(), OUTPUT_LIMIT, 0).decode("utf-8", "replace") for file in files[1:]), *end])
        if alone and traces() != clean:
            os._exit(0)  # the next call starts another template

def traces():
    "what programs can leave in their namespaces, besides processes, for those that come after them"
    memory = [path.read_text() for path in Path("/proc/sysvipc").iterdir()]
    limits = [resource.getrlimit(number) for number in range(16)]
    return os.listdir(), memory, limits, os.nice(0), os.sched_getaffinity(0), os.sched_getscheduler(0)

def await_end(program, timeout):
    "(return code, timed out?) of a program, when it and all that it has started is dead"
    ended, deadline = {}, time.monotonic() + timeout
    while program not in ended and time.monotonic() < deadline and not select.select([0], [], [], 0.002)[0]:  # caller gone?
        pid, status = os.waitpid(-1, os.WNOHANG)
        ended[pid] = status
    timed_out = program not in ended
    for target in (-1 if os.getpid() == 1 else -program, program):
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            ended[pid] = status
    status = os.waitstatus_to_exitcode(ended[program])
    return status if status >= 0 else 128 - status, timed_out

def run(code, folder, files, timeout, memory_mb, own_user, prelude="", test=""):
    "in the process of a program: limits, the program, a test of it that it cannot patch, and the interpreter's normal end"
    os.setsid()
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    os.closerange(3, 1024)
    limits = {"CPU": math.ceil(timeout) + 1, "AS": memory_mb << 20, "FSIZE": OUTPUT_LIMIT, "NOFILE": 64, "NPROC": MAX_TASKS,
              "CORE": 0, "MSGQUEUE": 0}
    if not own_user and os.path.exists("/proc/loadavg"):  # all tasks of the user count: allow for all of the machine
        limits["NPROC"] += int(Path("/proc/loadavg").read_text().split("/")[1].split()[0])
    for name, value in limits.items():
        with contextlib.suppress(ValueError, AttributeError):  # macOS has not all of them
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    PRCTL(4, 1, 0, 0, 0)  # it may look into itself
    Path("program.py").write_text(code, "utf-8", "replace")
    main = type(sys)("program" if test else "__main__")
    main.__file__ = os.path.abspath("program.py")
    sys.modules[main.__name__], sys.argv, sys.path[0] = main, ["program.py"], folder
    own = vars(builtins) | {"write": os.write, "dumps": json.dumps, "defined": vars(main)}
    own["exactly"], status, stdout = type(exactly)(exactly.__code__, own), 0, sys.stdout
    try:
        test = compile(test, "test", "exec")
        exec(prelude, vars(main))
        exec(compile(code, "program.py", "exec", dont_inherit=True), vars(main))
        own["exec"](test, vars(main) | own | {"__builtins__": own})
    except Exception as error:
        traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in stdout, sys.stdout:
        with contextlib.suppress(Exception):  # closed, say
            stream.flush()
    os._exit(status)  # saves the 50 ms of freeing memory

def exactly(x):
    "a copy of plain data as exactly that; of anything else, which could claim to equal everything, what equals nothing"
    for kind in (bool, int, float, complex, str, bytes):
        if isinstance(x, kind) and type(value := kind(x)) is kind:
            return value
    for kind in (list, tuple, set, frozenset, dict):
        if isinstance(x, kind):
            return kind(map(exactly, x.items() if kind is dict else x))
    if x is None or type(x) in (type, range):
        return x
    return exactly(x.tolist()) if hasattr(x, "tolist") else object()  # numpy's have it

# --- code rewards
def grade_code(response, tests, timeout=10.0):
    """Share of `tests` that the last ```python block of `response` passes, in [0, 1]; 0.0 without a block.
    tests, or its JSON: {"inputs": [...], "outputs": [...]}, stdin and stdout; with "fn_name": arguments and value of that
    function, or method of class Solution; or a list of assert statements or whole check programs (MBPP, HumanEval); else
    ValueError. `timeout`: seconds for each test, which is run in a process of its own.
    Outputs never enter the sandbox. Asserts do: a program that searches its callers' frames can find one and fake a pass. So
    evaluate with asserts, but do not optimize them. PRIME's scorer gives the suite 6 s; if that fails, the first ten tests
    count alone, with full marks if they pass. Here all count, but the rest is not run if the first five all fail."""
    blocks = re.findall(r"```python[^\n]*\n(.*?)(?:```|\Z)", response, re.S)
    tests = json.loads(tests) if isinstance(tests, str) else tests
    if isinstance(tests, dict):
        tests = [(*pair, tests.get("fn_name")) for pair in zip(tests["inputs"], tests["outputs"], strict=True)]
    if not tests:
        raise ValueError("no tests")
    passed = 0
    for number, test in enumerate(tests if blocks else (), 1):
        passed += _passes(textwrap.dedent(blocks[-1]), test, timeout)
        if number == 5 and not passed:
            break
    return passed / len(tests)

def _passes(program, test, timeout):
    "does it pass one test: a text with assertions, or (input, output, name of a function or None)?"
    if isinstance(test, str):
        tree = ast.parse(test)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for node in list(ast.walk(tree)):  # x == y becomes exactly(x) == exactly(y)
            if isinstance(node, ast.Compare):
                node.left, *node.comparators = [ast.Call(ast.Name("exactly"), [x], []) for x in (node.left, *node.comparators)]
        names = list(names) if names <= set(dir(builtins)) else []  # of builtin names only: the program defines one of them
        return _value(program, ast.unparse(tree) + "\nresult = [True]", names, timeout) == [True]
    given, wanted, name = test
    if name:
        given = [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else given  # one JSON value a line
        function = f"(Solution().{name} if hasattr(globals().get('Solution'), {name!r}) else {name})"
        got = _value(program, f"result = [exactly({function}(*{given!r}))]", [name], timeout)
        return got is not None and (_same(got, [wanted]) or _same(got, wanted))  # some data sets wrap the value in a list
    given, wanted = ("\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in (given, wanted))
    result = run_python(program, given, timeout, prelude=PRELUDE)
    got, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (result.stdout, wanted))
    return result.returncode == 0 and _same(got, wanted)

def _value(program, test, names, timeout):
    "what a test gives `result`, or None; it has clean builtins, and what the program defines under other names or these"
    mark = secrets.token_hex(8)
    test = f"globals().update((name, defined[name]) for name in {names} if name in defined)\n{test}\n" \
           f"write(1, ('\\n{mark}' + dumps(result) + '\\n').encode())"
    _, found, result = run_python(program, timeout=timeout, prelude=PRELUDE, test=test).stdout.rpartition(mark)
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(result.partition("\n")[0]) if found else None

def _same(got, wanted):
    "equal: integers exactly, other numbers within 1e-5 relative; (1, 2) is [1, 2]"
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(_same, got, wanted))
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(_same(got[key], wanted[key]) for key in got)
    whole = [bool(re.fullmatch(r"[-+]?\d+", str(x))) for x in (got, wanted)]
    if got == wanted or all(whole) or isinstance(got, str) != isinstance(wanted, str):
        return got == wanted
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return abs(float(got) - float(wanted)) <= 1e-8 + abs(float(wanted)) * (1e-9 if whole[1] else 1e-5)
    return False

if __name__ == "__main__":
    grade_items(int(sys.argv[2])) if sys.argv[1] == "grader" else run(**run_programs())
