"""Numbers as people read them; the exact ones stand in the tables beside them."""

from __future__ import annotations

import math

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def percent(share: float) -> str:
    """A share of 1 in percent: one digit after the point, more where one would make it look like none or all."""
    if share == 0 or share >= 1:
        return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"
    for digits in (1, 2, 3, 4):
        text = f"{share:.{digits}%}"
        if text.rstrip("%").strip("0") != "." and not text.startswith("100"):
            return text
    return f"{scientific(share * 100)}%"


def count(number: int) -> str:
    """A whole number with commas between thousands."""
    return f"{number:,}"


def size(number: int) -> str:
    """Bytes in binary units, one digit after the point."""
    value, unit = float(number), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{number} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def figure(value: float) -> str:
    """A measured value with three significant digits, and all digits before the point."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return scientific(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def scientific(value: float) -> str:
    """Two significant digits and a power of ten."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}"


def power_of_ten(exponent: int) -> str:
    """10 to a whole power, for the ticks of a logarithmic axis."""
    return "1" if exponent == 0 else "10" if exponent == 1 else f"10{str(exponent).translate(_RAISED)}"
