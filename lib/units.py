r"""
Units of measurement, currencies and the things that are counted: when do two of them agree?

    >>> [canonical("km/h"), canonical("kilometers per hour"), canonical("sq. ft")]
    ['h^-1 km', 'h^-1 km', 'ft^2']
"""

import re

# Each line: a symbol, and other ways to write it. Plurals need not be listed.
NAMES = """
km kms
kg kgs kilo
g gm
cm centimetre
mm millimetre
μm um micron
μs us
mL ml
in inch inche
ft foot feet
yd yard yds
mi mile
lb pound lbs
oz ounce
t ton tonne
s sec secs
min minute mins
h hour hr hrs
day days d
week weeks wk
month months
year years yr a
L litre l
m metre
Å angstrom
gal gallon
qt quart
pt pint
cup cups
acre acres
ha hectare
atm atmosphere
bar bars
cal calorie
kcal kilocalorie
kWh
A amp
kΩ kilohm
MΩ megohm
M molar
rad radian
celsius
fahrenheit
erg
dyn dyne
pc parsec
AU
ly
rpm
dB decibel
$ dollar usd buck
€ euro eur
£ pounds_sterling gbp
¥ yen jpy
₹ rupee inr rs
₩ won krw
₽ ruble rouble rub
yuan rmb cny
franc chf
¢ cent penny pence pennie
"""

# Units that have prefixes.
METRIC = {
    "m": "meter",
    "g": "gram",
    "s": "second",
    "L": "liter",
    "N": "newton",
    "Pa": "pascal",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "A": "ampere",
    "Ω": "ohm",
    "C": "coulomb",
    "F": "farad",
    "H": "henry",
    "T": "tesla",
    "Hz": "hertz",
    "K": "kelvin",
    "mol": "mole",
    "eV": "electronvolt",
}
PREFIXES = {
    "": "",
    "p": "pico",
    "n": "nano",
    "μ": "micro",
    "m": "milli",
    "c": "centi",
    "d": "deci",
    "k": "kilo",
    "M": "mega",
    "G": "giga",
}
ALIASES = {}
for short, prefix in PREFIXES.items():
    for base, word in METRIC.items():
        ALIASES[short + base] = short + base
        ALIASES[prefix + word] = short + base
        ALIASES[prefix + word.removesuffix("er") + "re"] = short + base
for line in NAMES.split("\n"):
    symbol, *others = line.split() or [""]
    for alias in [symbol, *others]:
        ALIASES[alias] = symbol
del ALIASES[""]
ALIASES |= {"am": "am", "pm": "pm"}
ALIASES |= {"kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mph": "mi/h", "fps": "ft/s"}
ALIASES |= {"mps": "m/s", "cc": "cm^3"}
SYMBOLS = {*ALIASES.values(), "unit"}

POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
# Words without a meaning in a unit.
FILLERS = {"a", "an", "the", "of", "in", "each", "exactly"}
WORD = re.compile(r"([^\W\d_]+|[$€£¥₹₩₽¢°%□])\s*(?:\^?\s*{?\s*(-?\d+)\s*}?)?|(/)")


def lookup(word: str) -> str | None:
    """The symbol of a unit that has this name."""
    for form in (word, word.lower()):
        # Symbols are as short as ambiguous in capitals: M is no meter.
        if form != word and len(word) < 3:
            continue
        if form in ALIASES:
            return ALIASES[form]
        for ending in ("s", "es"):
            stem = form.removesuffix(ending)
            if len(stem) >= 3 and stem != form and stem in ALIASES:
                return ALIASES[stem]
    return None


def is_filler(word: str) -> bool:
    """Has a word no meaning in a unit? "A" has: it is the ampere."""
    return word != "A" and word.lower() in FILLERS


def singular(word: str) -> str:
    """A word that is no unit: small letters count as capitals only in words, not in symbols."""
    if len(word) < 3:
        return word
    word = word.lower()
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def factors(text: str) -> dict[str, int]:
    """The units of a text with their powers; a word that is no unit stands for itself."""
    text = re.sub(r"\\(?:cdot|times|,|;| )|[.*·⋅()]", " ", text)
    text = re.sub(r"\\?\bper\b", "/", text).replace("\\", "")
    powers = {}
    sign = 1
    multiplier = 1
    last = None
    for word, exponent, slash in WORD.findall(text):
        if slash:
            sign = -1
            continue
        if word.lower() in POWERS:
            if word.lower() in ("squared", "cubed") and last is not None:
                powers[last] *= POWERS[word.lower()]
            else:
                multiplier = POWERS[word.lower()]
            continue
        if is_filler(word) and not (word == "in" and not powers):
            continue
        power = sign * multiplier * int(exponent or 1)
        multiplier = 1
        symbol = lookup(word) or singular(word)
        if "/" in symbol or "^" in symbol:
            for inner, inner_power in factors(symbol).items():
                powers[inner] = powers.get(inner, 0) + power * inner_power
            continue
        powers[symbol] = powers.get(symbol, 0) + power
        last = symbol
    return {symbol: power for symbol, power in powers.items() if power}


def canonical(text: str) -> str:
    """One spelling of a unit; words that are none stay in their order."""
    text = re.sub(r"(?i)\bdegrees?\b\s*(?=.)", "", text)
    spelled = []
    if not is_unit(text):
        words = re.findall(r"[^\W\d_]+", text)
        telling = [word for word in words if not is_filler(word)]
        return " ".join(map(singular, telling or words))
    for symbol, power in sorted(factors(text).items()):
        spelled.append(symbol if power == 1 else f"{symbol}^{power}")
    return " ".join(spelled)


def is_unit(text: str) -> bool:
    """Is a text made of nothing but known units?"""
    found = factors(text)
    return bool(found) and all(symbol in SYMBOLS for symbol in found)


def known(powers: dict[str, int]) -> dict[str, int]:
    """The units among the words."""
    return {symbol: power for symbol, power in powers.items() if symbol in SYMBOLS}


def agree(one: str, other: str) -> bool:
    """Do two units in one spelling agree?

    >>> [agree("cm", "cm"), agree("cm", "m"), agree("cm^2", "unit^2"), agree("cm", "unit^2")]
    [True, False, True, False]
    """
    if one == other:
        return True
    first = factors(one)
    second = factors(other)
    if is_unit(one) and is_unit(other):
        if "unit" in first or "unit" in second:
            return sum(first.values()) == sum(second.values())
        return first == second
    if is_unit(one) or is_unit(other):
        # 5 m is 5 m north, but $5 is not $5 per apple.
        extra = {symbol for symbol in first | second if symbol not in SYMBOLS}
        is_remark = all((first | second)[symbol] == 1 for symbol in extra)
        return is_remark and known(first) == known(second)
    # Of "prime numbers" and "numbers" one says more of the same thing.
    return f" {one}".endswith(f" {other}") or f" {other}".endswith(f" {one}")
