"""The last number that a text says, exactly.

Digits with or without thousands separators (`1,234`, LaTeX's `1{,}234`), decimals, `3/4`, `3 1/2`, `\\frac{3}{4}`,
exponents of at most three digits, a sign that is no subtraction, a currency before and a percent sign behind. Where a
text has a `\\boxed{...}`, only the last one is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = r"(?:[0-9]{1,3}(?:(?:,|\{,\}|\\,)[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?)"
_SIGN = "[-+\u2212]"
_NUMBER = re.compile(
    rf"""
    (?:(?<![A-Za-z0-9_)\]}}%]) (?P<sign>{_SIGN}))?            # behind a number, a word or a bracket it subtracts
    (?:(?:\\?[$]|[€£¥]) (?P<inner>{_SIGN})?)?
    (?:
        \\[dt]?frac \s* \{{ \s* (?P<above>{_SIGN}?{_DECIMAL}) \s* \}} \s* \{{ \s* (?P<below>{_DECIMAL}) \s* \}}
      | \\[dt]?frac (?P<one>[0-9]) (?P<other>[0-9])
      | (?<![A-Za-z0-9_/]) (?:(?P<whole>[0-9]+) [ ])?
        (?P<part>{_DECIMAL}) \s? / \s? (?P<of>[0-9]+) (?![0-9]) (?!\.[0-9]) (?!\s?/)
      | (?<![A-Za-z0-9_]) (?P<plain>{_DECIMAL}) (?:[eE] (?P<exponent>[-+]?[0-9]{{1,3}}) (?![0-9]))?
      | (?<![A-Za-z0-9_.]) (?P<point>\.[0-9]+)
    )
    (?P<percent>\s?\\?%)?
    """,
    re.VERBOSE,
)
_BOXED = "\\boxed{"
_LONGEST = 1000
"""Characters of a numeral; nobody's answer is longer, and Python refuses to read far longer ones."""


@dataclass(frozen=True, slots=True)
class Number:
    """A value as it is written: `50%` is 50 with a percent sign."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number, tolerance: float) -> bool:
        """Whether both mean the same, up to `tolerance`; where only one has a percent sign, p% is p and p/100."""
        if self.percent == other.percent:
            pairs = [(self.value, other.value)]
        else:
            signed, plain = (self, other) if self.percent else (other, self)
            pairs = [(signed.value, plain.value), (signed.value / 100, plain.value)]
        return any(abs(one - two) <= Fraction(tolerance) for one, two in pairs)


def last_number(text: str) -> Number | None:
    """The last number of a text; None where it has none, or one without a value (`1/0`)."""
    boxed = last_boxed(text)
    numerals = list(_NUMBER.finditer(text if boxed is None else boxed))
    found = numerals[-1] if numerals else None
    value = None if found is None or len(found[0]) > _LONGEST else _value(found)
    if found is None or value is None:
        return None
    signs = [found["sign"], found["inner"]]
    negative = sum(sign in ("-", "\u2212") for sign in signs) % 2 == 1
    return Number(-value if negative else value, found["percent"] is not None)


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` of a text holds; None where there is none that ends."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for position in range(start + len(_BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[start + len(_BOXED) : position]
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    if found["plain"] is not None:
        return _plain(found["plain"]) * Fraction(10) ** int(found["exponent"] or 0)
    if found["point"] is not None:
        return Fraction(f"0{found['point']}")
    above = found["above"] or found["one"] or found["part"]
    below = _plain(found["below"] or found["other"] or found["of"])
    if not below:
        return None
    part = _plain(above) / below
    whole = found["whole"]
    return part + int(whole) if whole is not None and part < 1 else part


def _plain(digits: str) -> Fraction:
    for separator in ("{,}", "\\,", ","):
        digits = digits.replace(separator, "")
    return Fraction(digits.replace("\u2212", "-"))
