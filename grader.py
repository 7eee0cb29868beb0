r"""
The one judge of answers: generate.py, prime.py and evaluate.py import it unchanged. Maths first, then the pool of workers, then
code rewards (grade_code); programs run in the sandbox of runs/sandbox.py.

    >>> grade_math(r"... so its area is \boxed{\tfrac12\text{ cm}^2}.", "0.5")
    True

A parser of our own computes the value of an answer as it reads it (nothing that a model wrote reaches eval or sympify), at four
random points if it has variables: exactly while it stays rational, else to 220 digits. README has the rules of what is equal.
"""
import concurrent.futures, contextlib, functools, itertools, json, math, os, re, resource, signal, textwrap, time
import unicodedata, zlib
from collections import namedtuple
from fractions import Fraction

import mpmath  # sympy's arithmetic
import sympy

from runs.sandbox import PRCTL, PRELUDE, GraderError, RunResult, ask, isolation, run_python, serve  # noqa: F401

MAX_CHARS, MAX_BITS = 20_000, 64_000
class Unparsed(Exception): "not mathematics that we can read, or too costly to work out"

# --- from a response to the text of its answer
BRACED = functools.reduce(lambda inner, _: r"(?:[^{}\\]++|\\.|{%s})*+" % inner, range(40), "")  # balanced braces
BOX = re.compile(r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)\s*(?:{(%s)}|(\d))" % BRACED, re.S)
GLUE = re.compile(r"(?:[\s$,;&]|\\[,;:()!]|\\q?quad\b|\\text\s*{\s*(?:and|or)\s*}|\b(?:and|or)\b|\b[a-z](?:_\d)?\s*=)*")
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
        minus = re.search(r"(?:[=$(]\s*-\s*|(?<![\w})\].-])-)$", response[max(0, start - 20):start])  # a bullet is none
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
    r"""The texts that count as right: a string, the box or last phrase of a solution (if it is no word there), of
    \textbf{(B)} 7 also B and 7, of a list each."""
    if isinstance(gold, (list, tuple)):
        return [text for item in gold for text in golds(item)]
    phrase = re.search(r"answer is:?\s*(?:\$(.+?)\$|([-+*/^().\d\s]+?)\.?\s*$)", str(gold))
    text = extract_answer(str(gold)) or (phrase and (phrase[1] or phrase[2])) or str(gold)
    choice = re.fullmatch(r"\s*\\(?:text(?:bf|rm)?|math(?:bf|rm)){\(([A-F])\)[\s\\~]*}[\s\\~]*(?=\S)(.+)", text)
    return [text, *choice.groups()] if choice else [text]

# --- from text to tokens: numbers, letters, \commands, _indices, @words@ and signs
SIGNS = str.maketrans(dict(zip("−–—∗÷∕⁄º′’％;&", "---*///°''%,,")) | {c: f" {c}" for c in "½⅓⅔¼¾⅛⅜⅝⅞"} | {
    s[0]: f"\\{s[1:]} " for s in """×times ·times ⋅times ≤le ≥ge ≠ne ≈approx ±pm ∓mp ∞infty ∪cup ∩cap ∈in ∅emptyset √sqrt πpi
    ∠angle ∖setminus ≡equiv ℝmathbb{R} ℤmathbb{Z} ℕmathbb{N} ℚmathbb{Q} αalpha βbeta
    γgamma δdelta θtheta λlambda μmu ρrho σsigma φphi ωomega ΔDelta ΩOmega""".split()})
FUNCTIONS = """asinh acosh atanh asin acos atan sinh cosh tanh sin cos tan cot sec csc log lg exp sqrt abs floor ceil max min
    gcd lcm""".split()
SAME = dict(pair.split(":") for pair in """ln:log le:<= leq:<= leqslant:<= ge:>= geq:>= geqslant:>= lt:< gt:> ne:!= neq:!=
    approx:~ simeq:~ equiv:= cdot:* times:* div:/ bmod:# mod:# vert:| mid:| lbrace:{ rbrace:} langle:( rangle:)
    varnothing:emptyset infinity:infty choose:binom backslash:setminus smallsetminus:setminus exponentialE:e
    varphi:phi varepsilon:epsilon vartheta:theta percent:% pct:% percentage:% and:& or:;""".split())
NAMES = "|".join([*FUNCTIONS, *SAME, *"pi infty alpha beta gamma delta theta lambda mu omega sigma tau phi rho".split()])
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"(?<!\\)\\\\(?=[a-zA-Z]{2})", r"\\"), (r"\\\\\\\\", r"\\\\"),  # doubled by somebody's escaping
    (r"\\{1,4}(?:[a-z]{0,9}boxed|fbox)(?![a-z])", " "),
    (r"(?<=\d)\s*{\s*,\s*}\s*(?=\d)", ","),  # 14{,}916
    (r"\\left\s*\\{(?=\s*\\begin)(.*?)\\right\s*\.", r"\1"),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\.?", " "),
    (r"\\(?:displaystyle|limits|boldsymbol|vec|hat|math(?:bf|it|sf|cal)|bf|rm)(?![a-zA-Z])", " "),
    (r"\\!\s*|{}(?=\s*\^)|(?<=\d)\\,(?=\d{3}(?!\d))|\b(?:np|numpy|math)\.(?=[a-z])", ""),  # 14\,916, np.sqrt
    *[(rf"(?<=[\d}}])\s*(\\text\s*{{)?\s*\b{word}s?\b", rf"*10^{zeros} \1")  # 5 million
      for word, zeros in dict(hundred=2, thousand=3, million=6, billion=9).items()],
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),  # 3 x 10^8
    (r"(?<=\d):00(?!\d)", ""),
    (r"(?i)(?<=\d)\s*(\\text\s*{)?\s*\b([ap])\.?m\b\.?", lambda m: f" {m[1] or ''}{m[2].lower()}m"),
    (r"^\*\*(.*)\*\*$", r"\1"), (r"\\%", "%"), (r"\*\*", "^"), (r"\\prime", "'"), (r"\\not\s*=", r"\\ne "),
    (r"\\[lc]dots|\\dots[bcim]|\.\.\.", r"\\dots "),
    (r"{([^{}]*)\\choose(?![a-z])([^{}]*)}", r"\\binom{\1}{\2}"),
    (r"(?:\\text\s*{\s*)?(?:\bfor (?:all|any|every)(?: (?:real|rational|positive|integers?|natural|numbers?))*\b|\\forall)"
     r"[\s}$]*[a-z](?:\s*\\in\s*\\mathbb\s*{?[RNZQ]}?(?:\^{?[+*]}?)?)?$", ""),
    (r",\s*(?=[=<>])|\\text\s*{\s*(?:if|for|when)\s*}", " "),  # in systems and cases
    (r"\\begin\s*{vmatrix}", r"\\det ⟦⟦"),
    (r"\\begin\s*{(?:array}\s*{[^{}]*|\w*matrix|cases|aligned|align\*)}", "⟦⟦"),  # a matrix is a tuple of its rows
    (r"[,;.]?\s*(?:\\\\\s*)?\\end\s*{(?:array|\w*matrix|cases|aligned|align\*)}", "⟧⟧"),
    (r"[,;.]?\s*\\\\|\\(?=[-\d])", "⟧, ⟦"),
    (r"\\{ ?(\w) ?(?:\\in ?\\mathbb ?{?R}? ?)?(?:\\mid|[|:])((?:[^{}]|{[^{}]*})*)\\}", r"\2"),  # the set of all x with x > 2
    (r"-\s*(?=\\{)", r"\\setminus "),
    (r"\\(?:begin|end)\s*{\w+\*?}|(?<!\\)\\[,;:> ]|\\q?quad(?![a-z])|~|\\?[$€£]|\\[()\[\]]", " "),
    (r"\\pmod\s*({(?:[^{}]|{\w*})*}|\w+)", r"(\\mod \1)"),
    (r"(\\equiv[^()]{0,99}?)\\?b?mod(?![a-z])\s*([^()\s]+)$", r"\1(\\mod \2)"),  # no arithmetic
    (r"\(\s*(?:\\(?:text|mathrm|operatorname)\s*{\s*mod\s*}|\\?b?mod)\s*([^()]*)\)", r"\\bmod{\1}@≡\1@"),  # its unit
    (r"\\[dtc](frac|binom)(?![a-z])", r"\\\1"), (r"\\frac\s*(\d)\s*(\d+)", r"\\frac{\1}{\2}"),
    (r"arc(?=sin|cos|tan)", "a"), (r"\\?(sin|cos|tan)\s*\^\s*{\s*-\s*1\s*}", r"\\a\1"),
    (r"\\?sqrt\s*\[([^\[\]]*)\]", r"\\sqrt_{\1}"),
    (r"\^\s*{?\s*('[\s']*)}?", r"\1"),
    (r"(?:\^\s*{?\s*\\circ\s*}?|\\degrees?(?![a-z])|°)(?:\s*(?:\\(?:text|mathrm)\s*{\s*)?[CF]\b}?)?", "°"),
    (r"\^\s*{?\s*(?:\\(?:text|mathrm|mbox)\s*{(?:th|st|nd|rd)}|th\b)\s*}?", ""),  # the 5^{th}
    (r"(?<=\w[a-z])\.(?= )", ""),  # sq. ft.
    (r"\\mathbb\s*{?\s*R(?:\s*})?", r"(-\\infty,\\infty)"),
    (r"\^\s*({[^{}]*}|\w)\s*_\s*({[^{}]*}|\w)", r"_\2^\1"),  # x^2_i
    (r"(?:^|(?<==))([^:,=]+):([^:,=]+(?::[^:,=]+)+)$",  # 1:2:3
     lambda m: "(1," + ",".join(f"({x})/({m[1]})" for x in m[2].split(":")) + ")"),
    (r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*{(\d{1,20})}",  # 0.1666...
     lambda m: f"({m[1]}{m[2]}{m[3]}-{m[1]}{m[2]})/({'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"(?<![\w.^}/*])(\d+) +(\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 2 3/4
    (r"(?<![\w.^}])(\d+)\s*(\\frac\s*{\d+}\s*{\d+})", r"(\1+\2)"),
    (r"(?<![\w.^}/])(\d+)/(\d+)(?=\s*[a-zA-Z\\(])", r"\\frac{\1}{\2}"),  # 1/2x
    (r"(?<![\w.^])([\d.]+)[\s']*'(?!\s*\d)", r"\1"),  # feet
    (r"(\d\.\d*)\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*{?\s*([-+]?\d+)\s*}?", r"\1e\2")]]
WORDS = re.compile(r"\\(text(?:bf|it|rm|normal|sf)?|mbox|mathrm|operatorname\*?|emph)\s*{((?:[^{}]|\^\s*{-?\d+})*)}")
UNIT = re.compile(
    r"(?:(?<=[\d})%])|(?<=\\pi))\s*(?:"
    r"(?:[ckm]?m|m[lL]|min|in|ft|yd|sq|k?g|lbs?|oz|hr?s?|mph|k?Hz|k[JWN]|th|st|nd|rd|seconds?|minutes?)\b(?![({])(?:/[hs]\b)?"
    rf"|(?:(?<=[\d}})] )|(?<=\\pi ))(?!{NAMES}|abc|xyz)[a-z]{{3,}}\b)"
    r"(?: (?!or\b|and\b)[a-z]{2,}\b)*")
NUMBER = r"[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)(?:\.\d*)?(?![^(\[]{0,99}[)\]])|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,4}(?!\d))?"
TOKEN = re.compile(rf"\s*(?:(\\[a-zA-Z]+|{'|'.join(f for f in FUNCTIONS if len(f) > 2)}|(?:{NAMES})(?![a-zA-Z]))"  # a name
                   r"|(?=[a-zA-Z]{4})([A-Z]?[a-z]{0,20}[aeiou][a-z]{0,20}(?![a-zA-Z]))"  # a word
                   rf"|({NUMBER}|@[^@]*@|\\.|[<>!]=|_\s*(?:{{(?:[^{{}}]|{{[^{{}}]*}})*}}|\\?[a-zA-Z]+|.)|\S))")

def unwrap(m):
    r"\text{...} and its relatives: letters and formulas go back into the formula, words and units become one token"
    text = re.sub(r"[@\\]", " ", m[2]).strip()
    if text in FUNCTIONS or m[1][0] == "o":
        return f"\\{text} "
    if number := re.fullmatch(r"(-?\d[\d,./]*) ?([a-zA-Z][a-zA-Z ]*)", text):
        return f" {number[1]} @{number[2]}@"
    before = r"(?:[\d}]|\\(?:mathrm|text)\s*{[^{}]*}\s*(?:\^\s*{?-?\d+}?\s*)?(?:\\cdot|/))\s*$"
    unit = re.search(before, m.string[:m.start()]) and not re.fullmatch(r"[eiId]|\([A-F]\)", text)
    word = text.strip(" ,") not in SAME and re.search("[a-zA-Z]" if unit else "[a-zA-Z]{2}", text)
    return f"@{text}@" if word else f" {text} "

def as_unit(m):
    "5 m and 2.5e-3 m are lengths, but in 1+2m, (a+b)h and 2m^2-m a letter is a variable"
    around = m.string[max(0, m.start() - 200):m.start()], m.string[m.end():m.end() + 50]
    before, after = (re.split(r"[=,~@]|\b(?:or|and)\b|\\approx", text) for text in around)
    atoms = r"[\d.,^*/!\s]|\\(?:frac|sqrt|pi|times|cdot)(?![a-z])"
    before[-1] = functools.reduce(lambda t, _: re.sub(rf"[({{](?:[-+]|{atoms})*[)}}]", "1", t), range(4), before[-1])  # (1+2) m
    number = rf"\s*(?:-|\\pm)?(?:{atoms}|[(){{}}]|(?<=[{{(e])-|e(?=-?\d))*"
    alone = re.fullmatch(number, before[-1]) and re.fullmatch(r"\s*(?:\^\s*{?-?\d}?)?[\s)}\].]*", after[0])
    return f"@{m[0].strip()}@" if alone or len(m[0].strip()) > 1 else m[0]

def clean(text):
    "one spelling for what people write in many"
    text = re.sub("([⁰¹²³⁴-ⁿ]+)|[₀-ₙ]+", lambda m: f"{'^' if m[1] else '_'}{{{m[0]}}}", text[:2 * MAX_CHARS])
    text = " ".join(unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS).split())
    if len(text) > MAX_CHARS:
        raise Unparsed("too long")
    for pattern, new in [*REWRITES, (WORDS, unwrap), (UNIT, as_unit)]:
        text = " ".join(pattern.sub(new, text).split())  # on long runs of blanks patterns take quadratic time
    text = re.sub(r"(@[a-z])?@\s*\^\s*{?(-?\d+)}?", lambda m: f"{m[1]}^{m[2]}@" if m[1] else "@@@", text)  # 4m^2 is not 4m
    text = re.sub(r"@\s*(?:[/*]|\\cdot)?\s*@", " ", text)
    return re.sub(r"^\\(?:approx|simeq)\b", "", text.strip(" =")).rstrip(".,: ")

def tokenize(text):
    tokens, bars = [], itertools.cycle(["\\lvert", "\\rvert"])
    for name, word, other in TOKEN.findall(text):
        name = SAME.get(name.strip("\\"), name.strip("\\"))
        token = "\\" + name if name.isalpha() and len(name) > 1 else name or word and "@" + word or other
        if token in (",", "&", ";") and tokens[-1:] == [","]:  # "2, and 3"
            tokens.pop()
        tokens.append(next(bars) if token == "|" else token)
    return tokens

# --- arithmetic at one point: with fractions, else in mpmath; long numbers, powers and factorials are refused
mp = mpmath.MPContext()  # a private one, so that nobody else's precision changes
mp.dps = 220

def exact(*xs): return all(isinstance(x, Fraction) for x in xs)
def bits(x): return sum(map(int.bit_length, x.as_integer_ratio())) if exact(x) else abs(mp.mag(x)) if mp.isnormal(x) else 0
def floor(x): return Fraction(int(mp.floor(mp.re(x) + mp.mpf("1e-50"))))
def divide(a, b): return a * (1 / b)
def mild(name): return lambda x: getattr(mp, name)(x) if abs(x) < 1e40 else mp.nan  # exp(10^3000) takes seconds
def gcd(*xs): return Fraction(math.gcd(*(x.numerator for x in xs)), math.lcm(*(x.denominator for x in xs)))

def power(a, b):
    if abs(mp.convert(b)) * (bits(a) + 1) > MAX_BITS:
        raise Unparsed("power too big")
    if exact(a, b) and b.denominator == 1:
        return a ** int(b)
    odd = exact(b) and b.denominator % 2 and not mp.im(a) and mp.re(a) < 0  # a real odd root
    return mp.power(-a, b) * (-1) ** b.numerator if odd else mp.power(a, b)

@functools.lru_cache(256)
def factorial(n):
    if not abs(mp.convert(n)) < 4096:
        raise Unparsed("factorial too big")
    return Fraction(math.factorial(int(n))) if exact(n) and n.denominator == 1 and n >= 0 else mp.gamma(n + 1)

SETS = {"\\cup": sympy.Union, "\\cap": sympy.Intersection, "\\setminus": sympy.Complement}
TABLE = {"\\" + name: mild(name) for name in FUNCTIONS} | {
    "+": lambda a, b: a + b, "-": lambda a, b: a + -b, "*": lambda a, b: a * b, "/": divide, "\\frac": divide, "^": power,
    "#": lambda a, b: a - b * floor(divide(a, b)), "\\sqrt": lambda x, n=Fraction(2): power(x, 1 / n), "!": factorial,
    "\\binom": lambda n, k: factorial(n) / (factorial(k) * factorial(n - k)), "\\abs": abs, "\\lvert": abs, "\\lfloor": floor,
    "\\lceil": lambda x: -floor(-x), "\\gcd": gcd, "\\lcm": lambda *xs: 1 / gcd(*(1 / x for x in xs)), "\\lg": mp.log10,
    "\\det": lambda *xs: mp.det([xs[k:k + math.isqrt(len(xs))] for k in range(0, len(xs), math.isqrt(len(xs)))]),
    "\\log": mp.log, "\\max": lambda *xs: max(xs, key=mp.re), "\\min": lambda *xs: min(xs, key=mp.re), ":": divide}

# --- from tokens to values
# A number has xs: one value, or one for each point, NaN where there is none; digits, the significant ones of a decimal; a unit,
# cm, %, °, or _8 in base 8. A collection has items and brackets: "" (none), "{}", "[)", ..., "⟦⟧" for a matrix or its row. An
# equation or inequality has signs, sides, the side that is its name, and the value that it gives this, if it does.
Value = namedtuple("Value", "xs digits unit brackets items signs sides name", defaults=[None, 0, "", None, (), (), (), None])
CLOSERS = {opener: closers for opener, *closers in map(str.split, r"""( ) ]|[ ) ]|{ }|\{ \}|⟦ ⟧|\lvert \rvert|\lfloor \rfloor|
    \lceil \rceil""".split("|"))} | {"": [""]}
RELATIONS = "= < > <= >= != ~ \\in".split()
LEVEL = dict(zip(["@", "\\cap", "\\setminus", *"+-*/:#"], (1, 1, 1, 2, 2, 3, 3, 3, 3)))  # of what follows an operand
LEVEL |= dict.fromkeys("^!%°_'", 6)
LEVEL |= dict.fromkeys([*CLOSERS, *("\\" + name for name in FUNCTIONS)], 4)  # others, as in 2x, have 5
LEVEL |= dict.fromkeys([",", "&", ";", "\\cup", *RELATIONS, *itertools.chain(*CLOSERS.values())], 0)  # the end of an expression
CONSTANTS = {"i": mp.mpc(0, 1), "e": mp.e, "\\pi": mp.pi, "\\infty": mp.inf, "%": Fraction(1, 100), "°": mp.pi / 180}

def collection(items, brackets=""): return Value(brackets=brackets, items=items) if len(items) != 1 else items[0]
def members(v): return [x for item in v.items for x in members(item)] if v.brackets in ("", "{}") else [v]
def is_tuple(v): return bool(v.brackets) and v.brackets[0] in "([⟦"
def negative(v): return v._replace(xs=v.xs and [-x for x in v.xs], items=[negative(x) for x in v.items])
def plain(v): return compute("*", v._replace(unit=""), variable(v.unit))._replace(digits=v.digits) if v.unit else v
def binding(token): return LEVEL.get(token[:1] if token[:1] in ("@", "_") else token, 5)

@functools.lru_cache(256)
def parse(text):
    "the value of a cleaned text; +- gives a list of both"
    if re.search(r"(?<![\w.^}])[\d.]+ \d", text):
        raise Unparsed("two numbers side by side")
    both = dict.fromkeys(text.replace("\\pm", plus).replace("\\mp", minus) for plus, minus in ("+-", "-+"))
    return collection(joint([bracket("", ["", *reversed(tokenize(one))]) for one in both]))

def bracket(opener, tokens):
    "the value of a list up to the end of its bracket. Here and below tokens are in reversed order, and what is read is popped"
    items, signs, closer = [], set(), tokens.pop() if tokens[-1] in CLOSERS[opener] else ","
    while closer in (",", "&", ";", "\\cup"):
        signs.add(closer)
        items.append(relation(tokens))
        closer = tokens.pop()
    if closer not in CLOSERS[opener]:
        raise Unparsed("brackets")
    if "\\cup" in signs:
        return combine("\\cup", *items)
    items = items if ";" in signs else joint(items)
    return compute(opener, *items) if opener in TABLE else collection(items, opener[-1:] + closer[-1:])

def joint(items):
    "x > 2 and x < 5 as one set; but x < 2 and x > 5, which is nowhere, are meant as two"
    if len(items) > 1 and all(x.signs and {*x.signs} <= {"<", "<=", "!="} and equal(x.name, items[0].name) for x in items):
        with contextlib.suppress(Unparsed):
            return items if (both := combine("\\cap", *items)).xs else [both]
    return items

def relation(tokens):
    "an expression or a relation. x = 1 + 1 = 2 and |AB| = 2 ~ 2.1 have the value of the last side before ~, x < 5 an interval"
    signs, sides, names = [], [], []
    while not sides or tokens[-1] in RELATIONS:
        signs += [tokens.pop()] if sides else []
        before = tokens[:]
        sides.append(expression(tokens))
        names.append(is_name("".join(reversed(before[len(tokens):]))))
    if not signs:
        return sides[0]
    if signs[0][0] == ">":  # 3 > x is x < 3
        signs, sides, names = [sign.replace(">", "<") for sign in signs[::-1]], sides[::-1], names[::-1]
    value, named, kinds = Value(), [*map(bool, names)], {*signs}
    if kinds <= {"=", "~", "\\in"} and (any(named) or "~" in kinds or all(equal(sides[-1], side) for side in sides)):
        first = sides[:[*signs, "~"].index("~") + 1]
        value = ([side for side, name in zip(first, named) if not name] or sides)[-1]
    elif kinds == {"!="} and sum(named) == 1 == len(signs):
        value = combine("\\setminus", parse("(-\\infty,\\infty)"), sides[named.index(False)])
    elif kinds <= {"<", "<="} and sum(named) == 1:
        k, ends = named.index(True), [Value([-mp.inf]), *sides, Value([mp.inf])]
        value = collection([ends[k], ends[k + 2]], "[("[["<", *signs][k] == "<"] + "])"[[*signs, "<"][k] == "<"])
    return value._replace(signs=signs, sides=sides, name=sides[named.index(True) if True in named else 0])

def is_name(text):
    "can an equation give it a value: x, f(2), AB, |AB|, dy/dx, angle APC?"
    rest = re.sub(r"_\s*(?:{[^{}]*}|.)|\^{-1}(?=\()|(?<=[a-zA-Z'}])\([^()]*\)|\\(?:lim|sum|int|prod).*", "", text)
    return re.fullmatch(r"[a-zA-Z\s\\:/,(){}'@\[\]⟦⟧]*", rest) and not re.search(r"\\(?:pi|infty|sqrt|empty)", rest)

def expression(tokens, lowest=0):
    "the value of an operand and of all that binds to it tighter than the lowest level"
    value = operand(tokens, lowest)
    while (level := binding(tokens[-1])) > lowest:
        sign = tokens.pop() if level not in (4, 5) else "*"
        if sign[0] in "_'" and not value.xs or value.unit[:1] == "≡":
            raise Unparsed("an index of a set, or more after a modulus")
        if sign[0] in "%°@_'":
            end = "" if len(value.xs or ()) > 1 else "(?=@?$)"  # 4 prime numbers are 4, but a condition must agree, like a base
            must = re.search(r"\b(?:or|at (?:most|least)|(?:even|odd|prime|positive|negative|divisible|is)%s)\b" % end, sign)
            value = value._replace(unit=value.unit or "_" * bool(must) + re.sub(r"[@{}\s.]", "", sign))
        elif level == 1:
            value = combine(sign, value, expression(tokens, level))
        else:
            value = compute(sign, value, *([] if sign == "!" else [expression(tokens, level)]))
    return value

def combine(sign, *sets):
    "a union, intersection or difference: of real numbers and intervals by sympy, which joins what touches; else of members"
    ends, (first, *others) = {}, map(members, sets)
    if sum(map(len, others), len(first)) > 30:
        raise Unparsed("sets too big")
    try:
        found = SETS[sign](*[region(s, ends) for s in sets])
    except Unparsed:
        others = [x for other in others for x in other]
        if sign != "\\cup" and (any(map(is_tuple, first + others)) or not all(s.items for s in sets)):
            return variable(sign + str(sets))  # Z without {0}: equal if written alike
        return collection(first + others if sign == "\\cup" else [
            x for x in first if any(equal(x, y) for y in others) == (sign == "\\cap")])
    items = []
    for part in sympy.Union.make_args(found):
        items += [ends[x] for x in part] if not isinstance(part, sympy.Interval) else [
            collection([ends[part.start], ends[part.end]], "[("[part.left_open == True] + "])"[part.right_open == True])]
    return collection(items) if items else variable("\\emptyset")

def region(v, ends):
    "a set of real numbers for sympy, whose numbers are the keys of ends"
    if v.items and not is_tuple(v):
        return sympy.Union(*[region(x, ends) for x in v.items])
    numbers = []
    for item in v.items or [v]:
        x, *more = plain(item).xs or [mp.nan]
        if more or mp.im(x) or mp.isnan(x) or bits(x) > MAX_BITS or len(v.items) > 2:
            raise Unparsed("not real numbers")
        numbers.append(mp.sign(x) * sympy.oo if mp.isinf(x) else sympy.Rational(str(x) if exact(x) else mp.nstr(mp.re(x), 99)))
        ends.setdefault(numbers[-1], item)
    if numbers[0] > numbers[-1]:
        raise Unparsed("no interval")
    return sympy.Interval(*numbers, v.brackets[0] == "(", v.brackets[1] == ")") if v.items else sympy.FiniteSet(*numbers)

def operand(tokens, lowest):
    "a number, a bracket, a fraction, a function, a variable or a word; a sign goes with the product that follows"
    token = tokens.pop()
    if token in ("+", "-"):
        value = expression(tokens, max(lowest, 3))
        return negative(value) if token == "-" else value
    if token and token in CLOSERS:
        return bracket(token, tokens)
    if re.match(r"\.?\d", token):
        digits = re.sub(r"^[0.]*|[,.]|[eE].*", "", token) if re.search(r"\.\d|[eE]", token) else ""
        return Value([Fraction(token.replace(",", ""))], len(digits))
    if token in ("\\frac", "\\binom"):
        return compute(token, operand(tokens, 6), operand(tokens, 6))
    if token == "\\det" and tokens[-1] == "⟦":
        return compute(token, *[x for row in operand(tokens, 6).items for x in row.items])
    if token[1:] in FUNCTIONS:
        return function(token, tokens)
    if not token.strip("\\@")[:1].isalpha() or token in LEVEL:
        raise Unparsed("no operand")
    while tokens[-1][:1] in ("_", "'"):  # its indices and primes
        token += re.sub(r"[@{}\s]", "", tokens.pop())
    if token.strip("'") == "f" and tokens[-1] == "(":
        return unknown(token, operand(tokens, 6))
    return variable(token.strip("@ ").lower() if token[0] == "@" else token)

def unknown(name, argument):
    "a function f of which nothing is known: a random number for each value of its argument"
    columns = [x.xs for x in argument.items or [argument]]
    if not all(columns):
        raise Unparsed("argument")
    points = zip(*[xs * (4 // len(xs)) for xs in columns])
    names = [name + str([str(x) if exact(x) else mp.nstr(x, 99) for x in point]) for point in points]
    return Value([variable(text).xs[k] for k, text in enumerate(names)])

def function(name, tokens):
    "sin x, sin^2 x, sin(x), log_2 8, sqrt_3 x, max(a, b)"
    base = [parse(tokens.pop()[1:])] if tokens[-1][:1] == "_" else []
    exponent = [operand(tokens, 6)] if tokens[-1] == "^" and tokens.pop() else []
    value = expression(tokens, 6 if name == "\\sqrt" or tokens[-1] in CLOSERS else 4)  # sin 2x ends before a bracket or cos
    value = compute(name, *(value.items or [value]), *base)
    return compute("^", value, *exponent) if exponent else value

def variable(name):
    "a constant, or a random rational for each of four points, which depends on the name only; positive at the first two"
    draws = [zlib.crc32(f"{name} {k}".encode()) for k in range(4)]
    xs = [Fraction(d % 600 + 1900, 297) if k % 2 else Fraction(d % 2200 + 300, 997) for k, d in enumerate(draws)]
    xs = [-x if k == 3 or k == 2 and draws[2] >> 16 & 1 else x for k, x in enumerate(xs)]
    return Value([CONSTANTS[name]] if name in CONSTANTS else xs)

def compute(name, *args):
    "a function of numbers, point by point; a factor goes into a tuple"
    if name == "*" and is_tuple(args[1]):
        return args[1]._replace(items=[compute("*", args[0], x) for x in args[1].items])
    columns, xs = [plain(a).xs for a in args], []
    if name not in TABLE or any(not c or max(map(bits, c)) > MAX_BITS for c in columns):
        raise Unparsed(name)
    for k, *column in zip(range(max(map(len, columns))), *map(itertools.cycle, columns)):
        try:
            x = TABLE[name](*column)
            real = exact(x) or not mp.im(x) or any(map(mp.im, column))
            xs.append(x if real or k < 2 else mp.nan)  # a root of a negative variable depends on the branch
        except (ArithmeticError, TypeError, ValueError, AttributeError):  # no value there, or not for such arguments
            xs.append(mp.nan)
    return Value(xs)

# --- equality of values: g is the gold, a the answer; rules are (parity, tolerance)
def close(x, y):  # exactly if both are fractions
    size = max(abs(mp.convert(x)), abs(mp.convert(y)))
    return x == y or not exact(x, y) and size < mp.inf and abs(mp.convert(x + -y)) <= size * mp.mpf("1e-200") + mp.mpf("1e-210")

def same_number(g, a, parity=False, tolerance=None):
    n = max(len(g.xs), len(a.xs))
    both = [xy for xy in zip(g.xs * (n // len(g.xs)), a.xs * (n // len(a.xs))) if not any(map(mp.isnan, xy))]
    if n > 1 or not both or close(*both[0]):
        return len(both) >= min(n, 2) and all(close(x, y) for x, y in both)
    x, y = both[0]
    whole, error, x = exact(x) and x.denominator == 1, abs(mp.convert(x + -y)), mp.convert(x)
    digit = mp.mpf(10) ** (mp.floor(mp.log10(abs(x))) + 1 - g.digits) if x and g.digits > 1 else 0  # its last one
    relative = "1e-4" if g.digits or parity else "1e-12" if a.digits >= 12 and not whole else 0
    granted = max(tolerance or 0, digit / 2, abs(x) * mp.mpf(relative)) * (1 + mp.mpf("1e-50"))
    return error <= granted < mp.inf or parity and any(abs(x * k - y) < abs(x * k) / 10000 for k in (100, mp.mpf("0.01")))

def same_relation(g, a):
    "equations up to a constant factor, inequalities up to a positive one"
    if len(g.signs) > 1 and g.signs == a.signs and all(map(equal, g.sides, a.sides)):
        return True
    if g.signs != a.signs or len(g.signs) > 1 or not all(side.xs for side in g.sides + a.sides):
        return False
    difference = compute("-", *g.sides)
    ratio = [r for r in compute("/", difference, compute("-", *a.sides)).xs if not mp.isnan(r)]
    return len({*difference.xs}) > 1 < len(ratio) and all(
        r and close(r, ratio[0]) and (g.signs[0][0] != "<" or mp.re(r) > 0) for r in ratio)

def spread(v):
    "(x, y) = (1, 2) as x = 1, y = 2"
    if not (v.name and v.name.items and len(v.name.items) == len(v.items)):
        return v
    return collection([x._replace(signs=("=",), sides=(name, x), name=name) for name, x in zip(v.name.items, v.items)])

def equal(g, a, *rules):
    "does the value a answer the gold g?"
    if all(x.signs for v in (g, a) for x in members(v)):
        g, a = spread(g), spread(a)
    if g.signs and a.signs:
        return same_relation(g, a) or equal(g.name, a.name) and equal(g._replace(signs=()), a, *rules)
    if g.xs and a.xs:
        units = {v.unit if len(v.unit) < 4 or not v.unit[0].islower() else "" for v in (g, a)}  # cm, May and _8 must agree
        same = len(units) > 1 and "°" not in units and same_number(plain(g), plain(a), *rules)  # 50% is 0.5, 5g 5 times g
        return same or (len(units) == 1 or "" in units and not {"_", "'"} & {*"".join(units)}) and same_number(g, a, *rules)
    if is_tuple(g) or is_tuple(a):
        brackets = {g.brackets, a.brackets} - {"⟦⟧"}
        return (brackets <= {"", "()"} or len(brackets) == 1) and len(g.items) == len(a.items) and all(
            equal(x, y, *rules) for x, y in zip(g.items, a.items))
    xs, ys = members(g), members(a)
    return len(xs) > 1 < len(ys) and all(any(equal(x, y, *rules) for y in ys) for x in xs) and all(
        any(equal(x, y, *rules) for x in xs) for y in ys)

# --- the judge
def judge(answer, gold, parity, tolerance):
    "is_equiv for one gold; raises Unparsed"
    answer, gold = clean(answer), clean(gold)
    if parity:  # without bases and kinds of brackets
        answer, gold = (re.sub(r"(?<=\d)_({\d+}|\d+)", "", t).replace("[", "(").replace("]", ")") for t in (answer, gold))
    if re.fullmatch(r"\(?[A-F]\)?", gold):
        one_letter = r"@?\(?([A-F])[).:](?:\W{1,9}(?=\S)(?:(?!\b[A-F]\b(?! [a-z])).)*)?"  # "(B) 12" is B, "(B), (C)" none
        answer = re.sub(rf"^{one_letter}$", r"\1", answer, flags=re.S)
    words = re.search("[a-z]{3}|^@?no@?$", gold, re.I) and not re.search(r"[\d\\^_=+{|]", answer + gold)
    signs = r"[@\s']|^\(|\)$|(?<=[a-z]{3})-(?=[a-z]{3})" if words else r"[@\\]|(?<![\d,])\s|\s(?!\d)|\s(?=\d{3}\b)"
    x, y = (re.sub(signs, "", t, flags=re.I).strip(".") for t in (answer, gold))
    if x == y or words and len(y) > 1 and x.lower() == y.lower():
        return x != ""
    if re.fullmatch("[A-Z]{3,}|[IVX]+", y):  # an order, a numeral: no product
        return False
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
class Score(float):
    'a grade in [0, 1]; failure: None, or why it is 0.0: "timeouts", and of maths "crashes" (a dead child) or "unparsed"'
    def __new__(cls, value, failure=None):
        score = super().__new__(cls, value)
        score.failure = failure
        return score

class Grader:
    """grade(responses, references) returns Scores in order, submit(response, reference) a Future. A reference is {"ability":
    "math" or "code", "ground_truth": ...}, "tolerance" if it has one. An item has timeout seconds from the start of its work
    (code code_timeout, and timeout for each test); if it hangs or eats memory, it scores 0.0 and costs no other. Failures are
    counted. The work is done in children, new interpreters (safe after CUDA has started) that end with their parent."""
    def __init__(self, workers=None, timeout=5.0, memory_mb=1024, code_timeout=60.0, fallback=False, parity=False):
        self.timeout, self.code_timeout, self.options = timeout, code_timeout, (memory_mb, fallback, parity)
        self.idle, self.failures = [], []
        self.threads = concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count())  # each waits for one child

    timeouts, crashes, unparsed = (property(lambda self, name=name: self.failures.count(name))
                                   for name in ("timeouts", "crashes", "unparsed"))
    def __enter__(self): return self
    def __exit__(self, *_): self.threads.shutdown(cancel_futures=True)  # children end with the threads that have started them

    def grade(self, responses, references):
        return [future.result() for future in [self.submit(*pair) for pair in zip(responses, references, strict=True)]]

    def submit(self, response, reference):
        if reference.get("ability") not in ("math", "code"):
            raise ValueError(f"a reference needs the ability 'math' or 'code', not {reference.get('ability')!r}")
        return self.threads.submit(self.work, response, reference)

    def work(self, response, reference):
        gold = reference["ground_truth"]
        if reference["ability"] == "code":
            score = grade_code(response, gold, self.timeout, self.code_timeout)
        else:
            item = [response, gold, reference.get("tolerance"), *self.options]
            score = Score(*ask(self.idle, __file__, None, self.timeout, item))
        self.failures += [score.failure] * (score.failure is not None)
        return score

def judge_item(response, gold, tolerance, memory_mb, fallback, parity):
    with contextlib.suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answer = extract_answer(response, fallback)
    right, unparsed = (False, False) if answer is None else verdict(answer, gold, parity, tolerance)
    return float(right), "unparsed" if unparsed else None

# --- code rewards
def grade_code(response, tests, timeout=10.0, total=math.inf):
    """Share of `tests` that the last ```python block of `response` passes, of which each has `timeout` seconds, all `total`.
    tests, or its JSON: {"inputs": [...], "outputs": [...]}, stdin and stdout; with "fn_name": arguments (or a text, one a line
    as JSON) and value of that function, or method of class Solution; or a list of assertions or programs (MBPP, HumanEval);
    else ValueError. All tests count, unlike in PRIME's own scorer; but if the first five fail the rest is not run."""
    tests = json.loads(tests) if isinstance(tests, str) else tests
    if isinstance(tests, dict):
        tests = [(*pair, tests.get("fn_name")) for pair in zip(tests["inputs"], tests["outputs"], strict=True)]
    if not tests:
        raise ValueError("no tests")
    _, fence, block = response.rpartition("```python")
    code = textwrap.dedent(block.partition("\n")[2].partition("```")[0])
    passed, deadline = 0, time.monotonic() + total
    for number, test in enumerate(tests if fence else (), 1):
        passed += passes(code, test, min(timeout, deadline - time.monotonic()))
        if time.monotonic() > deadline:
            return Score(0.0, "timeouts")
        if number == 5 and not passed:
            break
    return Score(passed / len(tests))

def passes(code, test, timeout):
    "does it pass one test: a text with assertions, or (input, output, name of a function or None)?"
    if isinstance(test, str):
        return run_python(code, timeout=timeout, prelude=PRELUDE, test=test).returncode == 0
    given, wanted, name = test
    if name:
        with contextlib.suppress(ValueError, RecursionError):  # of data that is no JSON, no value, or one that is deeply nested
            values = [json.loads(line) for line in given.split("\n") if line.strip()] if isinstance(given, str) else given
            call = "import json\nfrom math import inf, nan\nsolution = defined.get('Solution', type(None))()\n" \
                   f"print(json.dumps(getattr(solution, {name!r}, defined.get({name!r}))(*{values!r})))"
            done = run_python(code, timeout=timeout, prelude=PRELUDE, test=call)
            got, text = json.loads(done.stdout), isinstance(given, str) and isinstance(wanted, str)  # [got]: some data wraps it
            return done.returncode == 0 and (same(got, wanted) or same([got], wanted) or text and same(got, json.loads(wanted)))
        return False
    given, wanted = ("\n".join(map(str, x)) if isinstance(x, list) else str(x) for x in (given, wanted))
    result = run_python(code, given, timeout, prelude=PRELUDE)
    if len(result.stdout) > 4 * len(wanted) + 10_000:
        return False  # without looking at megabytes
    got, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (result.stdout, wanted))
    return result.returncode == 0 and same(got, wanted)

def same(got, wanted):
    "equal: integers exactly, other numbers within 1e-5 relative; (1, 2) is [1, 2]"
    if isinstance(got, list) and isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(same, got, wanted))
    if isinstance(got, dict) and isinstance(wanted, dict):
        return got.keys() == wanted.keys() and all(same(got[key], wanted[key]) for key in got)
    whole = [bool(re.fullmatch(r"[-+]?\d+", str(x))) for x in (got, wanted)]
    if got == wanted or all(whole) or isinstance(got, str) != isinstance(wanted, str):
        return got == wanted
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        error = abs(float(got) - float(wanted))
        return error < math.inf and error <= 1e-8 + abs(float(wanted)) * (1e-9 if whole[1] else 1e-5)
    return False

if __name__ == "__main__":
    PRCTL(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with its caller even while it is busy
    serve(judge_item)
