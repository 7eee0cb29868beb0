r"""
Units of measurement, currencies and the things that are counted: when do two of them agree?

    >>> [canonical("km/h"), canonical("kilometers per hour"), canonical("sq. ft")]
    ['h^-1 km', 'h^-1 km', 'ft^2']
"""

import re

# Each line: a symbol, and other ways to write it. Plurals need not be listed.
NAMES = """
m meter metre
km kilometer kilometre kms
cm centimeter centimetre
mm millimeter millimetre
nm nanometer nanometre
μm micrometer micron um
dm decimeter decimetre
in inch inche
ft foot feet
yd yard yds
mi mile
g gram gm
kg kilogram kgs kilo
mg milligram
lb pound lbs
oz ounce
t ton tonne
s second sec secs
ms millisecond
μs microsecond us
min minute mins
h hour hr hrs
day days d
week weeks wk
month months
year years yr
L liter litre l
mL milliliter millilitre ml
dL deciliter dl
cL centiliter cl
gal gallon
qt quart
pt pint
cup cups
acre acres
ha hectare
N newton
kN kilonewton
Pa pascal
kPa kilopascal
atm atmosphere
bar bars
J joule
kJ kilojoule
cal calorie
kcal kilocalorie
eV electronvolt
keV
MeV
GeV
W watt
kW kilowatt
MW megawatt
kWh
V volt
kV kilovolt
A ampere amp
mA milliampere
Ω ohm
kΩ
C coulomb
F farad
T tesla
Hz hertz
kHz kilohertz
MHz megahertz
GHz gigahertz
K kelvin
mol mole
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
ALIASES = {}
for line in NAMES.split("\n"):
    symbol, *others = line.split() or [""]
    for alias in [symbol, *others]:
        ALIASES[alias] = symbol
del ALIASES[""]
ALIASES |= {"am": "am", "pm": "pm"}
ALIASES |= {"kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mph": "mi/h", "fps": "ft/s"}
ALIASES |= {"mps": "m/s", "cc": "cm^3"}

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


def singular(word: str) -> str:
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
        if word.lower() in FILLERS and not (word == "in" and not powers):
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
        words = [singular(word) for word in re.findall(r"[^\W\d_]+", text)]
        return " ".join(word for word in words if word not in FILLERS)
    for symbol, power in sorted(factors(text).items()):
        spelled.append(symbol if power == 1 else f"{symbol}^{power}")
    return " ".join(spelled)


def is_unit(text: str) -> bool:
    """Is a text made of nothing but known units?"""
    found = factors(text)
    symbols = set(ALIASES.values()) | {"unit"}
    return bool(found) and all(symbol in symbols for symbol in found)


def agree(one: str, other: str) -> bool:
    """Do two units in one spelling agree?

    >>> [agree("cm", "cm"), agree("cm", "m"), agree("cm^2", "unit^2"), agree("cm", "unit^2")]
    [True, False, True, False]
    """
    if one == other:
        return True
    first = factors(one)
    second = factors(other)
    if "unit" in first or "unit" in second:
        return sum(first.values()) == sum(second.values())
    if is_unit(one) or is_unit(other):
        return first == second
    # Of "prime numbers" and "numbers" one says more of the same thing.
    return f" {one}".endswith(f" {other}") or f" {other}".endswith(f" {one}")
