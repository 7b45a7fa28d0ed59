"""What an hour of a device costs: dated and sourced, never inside a device spec."""

from __future__ import annotations

from datetime import date
from typing import Literal

from kvsim.specs.base import Spec
from kvsim.units import UsdPerHour


class Price(Spec):
    """One published price. A price without a date or a source does not exist."""

    device: str
    """Name of a device spec."""
    provider: str
    commitment: Literal["on_demand", "spot", "reserved_1yr", "reserved_3yr", "owned_tco"]
    usd_per_device_hour: UsdPerHour
    region: str | None = None
    as_of: date
    source: str
