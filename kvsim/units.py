"""Units: strings with a unit come in, SI numbers stay inside, formatting happens at the edge.

This is the only module that knows a decimal or binary prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, ValidationInfo

KILO: Final = 10**3
MEGA: Final = 10**6
GIGA: Final = 10**9
TERA: Final = 10**12
PETA: Final = 10**15
KIBI: Final = 2**10
MEBI: Final = 2**20
GIBI: Final = 2**30
TEBI: Final = 2**40
SECONDS_PER_HOUR: Final = 3600.0
HOURS_PER_MONTH: Final = 730.0
MILLISECONDS_PER_SECOND: Final = 1000.0
TICKS_PER_SECOND: Final = 10**12
"""The simulation clock counts integer picoseconds, so sums are exact."""

_DECIMAL: Final = {"": 1, "k": KILO, "K": KILO, "M": MEGA, "G": GIGA, "T": TERA, "P": PETA}
_BINARY: Final = {"Ki": KIBI, "Mi": MEBI, "Gi": GIBI, "Ti": TEBI}
_PREFIX: Final = {**_DECIMAL, **_BINARY}
_BYTES: Final = {f"{p}B": float(f) for p, f in _PREFIX.items()}
_BYTES_PER_SECOND: Final = {f"{p}B/s": float(f) for p, f in _PREFIX.items()}
_FLOPS: Final = {
    **{f"{p}FLOPS": float(f) for p, f in _DECIMAL.items()},
    **{f"{p}OPS": float(f) for p, f in _DECIMAL.items()},
}
_SECONDS: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": SECONDS_PER_HOUR}
_WATTS: Final = {"W": 1.0, "kW": 1e3, "MW": 1e6, "mW": 1e-3}
_JOULES: Final = {"J": 1.0, "kJ": 1e3, "MJ": 1e6, "Wh": SECONDS_PER_HOUR, "kWh": 1e3 * SECONDS_PER_HOUR}
_HERTZ: Final = {"Hz": 1.0, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9}
_USD_PER_HOUR: Final = {"USD/h": 1.0}

_NUMBER_WITH_UNIT: Final = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*")


def parse_quantity(text: str, units: Mapping[str, float], what: str) -> float:
    """Turn ``"3.35 TB/s"`` into its SI value; raise ValueError naming the units allowed."""
    match = _NUMBER_WITH_UNIT.fullmatch(text)
    allowed = ", ".join(sorted(units, key=len)[:8])
    if match is None or not match.group(2):
        msg = f"{what} needs a number with a unit, such as '3 {next(iter(units))}'; allowed units: {allowed}"
        raise ValueError(msg)
    number, unit = match.groups()
    if unit not in units:
        msg = f"unknown unit {unit!r} for {what}; allowed units: {allowed}"
        raise ValueError(msg)
    return float(number) * units[unit]


def _validator(units: Mapping[str, float], what: str, *, positive: bool) -> BeforeValidator:
    def parse(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            value = parse_quantity(value, units, what)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            msg = f"{what} must be a string with a unit or a number in SI units"
            raise ValueError(msg)  # noqa: TRY004 - pydantic turns only ValueError into a field error
        elif info.context and info.context.get("require_units"):
            msg = f"{what} {value!r} has no unit; write it as a string such as '{value} {next(iter(units))}'"
            raise ValueError(msg)
        if not math.isfinite(value):
            msg = f"{what} must be finite"
            raise ValueError(msg)
        if value < 0 or (positive and value == 0):
            msg = f"{what} must be {'positive' if positive else 'zero or more'}"
            raise ValueError(msg)
        return value

    return BeforeValidator(parse)


def _whole_bytes(value: Any) -> Any:
    return round(value) if isinstance(value, float) else value


Bytes = Annotated[int, BeforeValidator(_whole_bytes), _validator(_BYTES, "size in bytes", positive=True)]
BytesPerSecond = Annotated[float, _validator(_BYTES_PER_SECOND, "bandwidth", positive=True)]
FlopsPerSecond = Annotated[float, _validator(_FLOPS, "compute rate", positive=True)]
Seconds = Annotated[float, _validator(_SECONDS, "duration", positive=False)]
Watts = Annotated[float, _validator(_WATTS, "power", positive=True)]
Joules = Annotated[float, _validator(_JOULES, "energy", positive=True)]
Hertz = Annotated[float, _validator(_HERTZ, "frequency", positive=True)]
UsdPerHour = Annotated[float, _validator(_USD_PER_HOUR, "price", positive=True)]


def parse_joules(text: str) -> float:
    """Turn ``"53.8 Wh"`` into joules; raise ValueError naming the units allowed."""
    return parse_quantity(text, _JOULES, "energy")


def parse_watts(text: str) -> float:
    """Turn ``"4.5 W"`` into watts; raise ValueError naming the units allowed."""
    return parse_quantity(text, _WATTS, "power")


def seconds_to_ticks(seconds: float) -> int:
    """Round a duration to the clock's integer picoseconds."""
    return round(seconds * TICKS_PER_SECOND)


def format_bytes(size_bytes: float | None) -> str:
    """Show a size in binary units, as engines log it."""
    if size_bytes is None:
        return "unknown"
    for factor, unit in ((TEBI, "TiB"), (GIBI, "GiB"), (MEBI, "MiB"), (KIBI, "KiB")):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def format_rate(rate: float | None, unit: str) -> str:
    """Show a rate such as bytes/s or FLOPS with a decimal prefix."""
    if rate is None:
        return "unknown"
    for factor, prefix in ((PETA, "P"), (TERA, "T"), (GIGA, "G"), (MEGA, "M"), (KILO, "k")):
        if abs(rate) >= factor:
            return f"{rate / factor:.4g} {prefix}{unit}"
    return f"{rate:.4g} {unit}"


def format_seconds(seconds: float | None) -> str:
    """Show a duration in the largest unit that keeps three digits readable."""
    if seconds is None:
        return "unknown"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.3g} {unit}" if seconds < KILO else f"{seconds:.0f} s"
    return f"{seconds / 1e-9:.3g} ns" if seconds else "0 s"
