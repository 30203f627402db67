"""Numbers as people and models write them: one grammar, for the right answers of data and for what a model says.

    answer    = {label} equation         label: words without a digit that end with ":", "is" or "are"
    equation  = quantity {"=" quantity}  the last one counts: 9*2 = 18
    quantity  = [sign] [currency] [sign] value [magnitude] [unit]
    value     = number [exponent | "/" number] | number [" and"] " " number "/" number
    exponent  = "e" digits | ["*10"] "^" digits, where "^" alone needs a 10 before it
    number    = one of `FORMS`
    magnitude = "hundred", "thousand", ...   unit: what is no number, as %, dollars, apples or a full stop

Marks around a quantity (bold, brackets, quotes, LaTeX's dollars and commands) do not matter. A percent sign is a unit,
so 7% is 7. What cannot be read whole is not read in part: ranges and alternatives (10-15, 12 or 13), lists, times,
dates, sums without a result (9*2) and broken numbers (1,23,4) are no answer.

A comma, a blank, an apostrophe or an underscore before groups of three digits separates thousands, and so do LaTeX's
{,}, India's groups (1,23,456), and points where there are several or a decimal comma follows (1.234.567 and 1.234,5).
Any other point is a decimal point (1.234), and a comma before fewer or more than three digits, or behind 0, a decimal
comma (1,5 and 0,125).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

from sled.errors import SettingError
from sled.settings.rules import Several

TEXTS = Several(str, "texts", one=False, hint="give one text per answer")
LONGEST = 400  # digits of a number

SIGNS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe58\ufe63\uff0d", "-") | dict.fromkeys("\u2044\u2215\u29f8", "/")
    | dict.fromkeys("\u00b7\u00d7\u22c5\u2217", "*") | dict.fromkeys("\u200b\u2060\ufeff\xad") | {
        "\u2018": "'", "\u2019": "'", "\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\uff0b": "+", "\u066a": "%",
        "\u066b": ".", "\u066c": ","})
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# LaTeX and markup, replaced in this order.
MARKUP = [(re.compile(pattern), by) for pattern, by in (
    (r"<<[^<>\n]*>>", ""),  # GSM8K's calculator
    (r"</?[A-Za-z]+>", ""),
    (r"\{,\}|,\\!", ","),
    (r"\\[,;:> ]|~", " "),
    (r"\\!|\\(?:left|right|displaystyle)\b", ""),
    (r"\\([$%#&_{}])", r"\1"),
    (r"\\[()\[\]]", " "),
    (r"\\(?:times|cdot)\b", "*"),
    (r"\\approx\b", "≈"),
    (r"\\pounds\b", "£"),
    (r"\\[dtc]?frac\s*(?:\{\s*([^{}]*?)\s*\}|(\d))\s*(?:\{\s*([^{}]*?)\s*\}|(\d))", r" \1\2/\3\4 "),
    *[(r"\\[A-Za-z]+\s*\{([^{}]*)\}", r"\1")] * 4)]  # \boxed{\text{...}}: commands within one another

MARKS = r"[\s*_`'\"“”«»#()\[\]{}≈:]*+"
CLOSING = r"[\s*_`'\"”»)\]}]*+"
CURRENCY = (r"(?:(?:US|CA|AU|NZ|HK|C|A|R)?[$¢-¥֏؋৲৳฿\u20a0-\u20c0﷼﹩＄￠￡￥￦]|Rs\b\.?"
            r"|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|CAD|AUD)\b)")
LABEL = re.compile(r"[^\d\n]*(?::|\bis\b|\bare\b)", re.IGNORECASE)
BEFORE = re.compile(rf"{MARKS}([-+]?){MARKS}(?:{CURRENCY}{MARKS})*+([-+]?){MARKS}", re.IGNORECASE)
RUN = re.compile(r"\d{1,3}(?: \d{3})++(?! ?[\d/])(?:[.,]\d+)?|\d+(?:[.,'_]\d+)*+|\.\d+")
# The forms of a number: what it looks like, what separates its thousands, and its decimal mark.
FORMS = [(re.compile(form), thousands, mark) for form, thousands, mark in (
    (r"\d+(\.\d+)?|\.\d+", "", "."),
    (r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?", ",", "."),
    (r"[1-9]\d?(,\d\d)+,\d{3}(\.\d+)?", ",", "."),
    (r"[1-9]\d{0,2}([' _]\d{3})+(\.\d+)?", "' _", "."),
    (r"[1-9]\d{0,2}([' ]\d{3})+,\d+", "' ", ","),
    (r"[1-9]\d{0,2}((\.\d{3}){2,}(,\d+)?|\.\d{3},\d+)", ".", ","),
    (r"\d+,\d+", "", ","))]
EXPONENT = re.compile(r"(?:e|\s*[*x]\s*10\s*\^\s*[{(]?\s*)([-+]?\d+)[})]?", re.IGNORECASE)
POWER = re.compile(r"\s*\^\s*[{(]?\s*([-+]?\d+)[})]?")
MIXED = re.compile(r"(?:\s+and)?\s+(\d{1,9})\s*/\s*(\d{1,9})(?!\d)")
OVER = re.compile(r"\s*/\s*(?=[\d.])")
MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MAGNITUDE = re.compile(rf"\s*({'|'.join(MAGNITUDES)})\b", re.IGNORECASE)
# Another number behind, with which the one before makes a range, a list, a sum or a number that is broken.
ANOTHER = re.compile(rf":\d|{CLOSING}(?:%|{CURRENCY})?{CLOSING}(?:(?:[-+*/^÷&;,]|\.\.+|(?<![a-z])(?:x|to|or|and)"
                     rf"(?![a-z])){MARKS}(?:{CURRENCY}{MARKS})*+[-+]?{MARKS})?\.?\d", re.IGNORECASE)
STARTS = re.compile(rf"(?:(?<![\w)])-)?(?:{CURRENCY}\s*-?)?(?=\.?\d)")
POWER_OF_UNIT = re.compile(r"(?<=[a-z])\^?[23](?!\d)", re.IGNORECASE)


class Read(NamedTuple):
    """A number, and the text around it."""

    value: Fraction
    around: str


def final_answer(text: str) -> Fraction | None:
    """The number behind a text's first `####` that has one: what a model invents behind its answer does not count."""
    return next((found.value for found in map(read, text.split("####")[1:]) if found), None)


def right_answer(text: str) -> Fraction | None:
    """The number that data give as right: by itself, or behind the `####` that ends a solution; else None.

    It is read as a model's answer is. But no other number may stand beside it, nor behind another `####`: a number
    misread here would judge every method wrongly.
    """
    _, *marked = text.split("####")
    found = [read(part) for part in marked or [text]]
    clear = all(each and not re.search(r"\d", POWER_OF_UNIT.sub("", each.around)) for each in found)
    return found[0].value if clear and len({each.value for each in found}) == 1 else None


def exact_match(texts: Sequence[str], answers: Sequence[int]) -> float:
    """Share of texts whose final answer equals the right one.

    Raises SettingError unless there are as many texts as answers, and some.
    """
    texts = TEXTS("texts", texts)
    if len(texts) != len(answers) or not answers:
        raise SettingError(f"{len(texts)} texts and {len(answers)} answers given; "
                           "give as many of one as of the other, at least one")
    right = [final_answer(text) == answer for text, answer in zip(texts, answers, strict=True)]
    return sum(right) / len(right)


def read(text: str) -> Read | None:
    """The answer in the first line of the text that is not blank, or None where it does not begin with one."""
    line, _, more = plain(text).strip().partition("\n")
    found, at = None, 0
    for part in line.split("="):
        start, at = at, at + len(part) + 1
        label = LABEL.match(part)
        value, end = _quantity(part, label.end() if label else 0)
        if value is not None and not ANOTHER.match(part, end):
            found = Read(value, f"{line[:start]} {line[start + end:]}\n{more}")
            if re.search("[,.;(]", part[end:]):  # a clause of its own: 18, since 9*2 = 18
                break
    return found


def every_number(text: str) -> Iterator[Fraction]:
    """All numbers of a running text, in their order."""
    text, at = plain(text), 0
    while start := STARTS.search(text, at):
        value, at = _value(text, start.end())
        if value is not None:
            yield -value if "-" in start[0] else value


def decimal(value: Fraction) -> str:
    """The value's digits: 0.125, or a fraction such as 1/3 where a decimal has no end."""
    twos, rest = 0, value.denominator
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        twos = max(twos, count)
    if rest != 1:
        return str(value)
    digits = str(abs(value.numerator) * 10**twos // value.denominator).rjust(twos + 1, "0")
    point = len(digits) - twos
    return "-" * (value < 0) + digits[:point] + "." * bool(twos) + digits[point:]


def plain(text: str) -> str:
    """The text's `letters`, without LaTeX's commands and markup."""
    text = letters(text)
    for pattern, by in MARKUP:
        text = pattern.sub(by, text)
    return text


def letters(text: str) -> str:
    """The text with digits, signs, fractions and blanks of any script as ASCII has them."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda found: "^" + found[0].translate(RAISED), text).translate(SIGNS)
    return re.sub(r"[^\x00-\x7f]", lambda found: _ascii(found[0]), text)


def _ascii(letter: str) -> str:
    if letter.isspace() and letter not in "\x85\u2028\u2029":
        return " "
    if unicodedata.decomposition(letter).startswith("<fraction>"):  # one half in one letter
        return " " + unicodedata.normalize("NFKC", letter).replace("\u2044", "/")
    digit = unicodedata.decimal(letter, None)
    return letter if digit is None else str(digit)


def _quantity(text: str, at: int) -> tuple[Fraction | None, int]:
    before = BEFORE.match(text, at)
    value, end = _value(text, before.end())
    return (value and -value if "-" in before.groups() else value), end


def _value(text: str, at: int) -> tuple[Fraction | None, int]:
    """The value that begins at `at`, or None; and where it ends, which is behind `at` where digits stand there."""
    value, end = _number(text, at)
    if value is None:
        return None, end
    if found := EXPONENT.match(text, end) or (value == 10 and POWER.match(text, end)):
        if len(found[1].strip("-+")) > 3:  # it would fill the memory
            return None, found.end()
        power = Fraction(10)**int(found[1])
        value, end = power if found.re is POWER else value * power, found.end()
    elif value.denominator == 1 and (found := MIXED.match(text, end)) and int(found[2]):
        value, end = value + Fraction(int(found[1]), int(found[2])), found.end()
    elif found := OVER.match(text, end):
        below, end = _number(text, found.end())
        if not below:
            return None, end
        value /= below
    if found := MAGNITUDE.match(text, end):
        value, end = value * 10**MAGNITUDES[found[1].lower()], found.end()
    return value, end


def _number(text: str, at: int) -> tuple[Fraction | None, int]:
    run = RUN.match(text, at)
    if run is None:
        return None, at
    for form, thousands, mark in FORMS if len(run[0]) <= LONGEST else ():
        if form.fullmatch(run[0]):
            return Fraction("".join(c for c in run[0] if c not in thousands).replace(mark, ".")), run.end()
    return None, run.end()
