"""What an hour of a device costs: published prices, each dated and sourced."""

from __future__ import annotations

from functools import lru_cache

from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml, validate
from kvsim.specs.base import Spec
from kvsim.specs.price import Price


class _PriceFile(Spec):
    """One file of ``presets/prices``."""

    prices: tuple[Price, ...]


@lru_cache(maxsize=1)
def load_prices() -> tuple[Price, ...]:
    """Read all shipped prices, in the order of their files.

    Raises
    ------
    InvalidSpec
        A price file is malformed.
    """
    rows: list[Price] = []
    for path in sorted(preset_dir("prices").glob("*.yaml")):
        rows.extend(validate(_PriceFile, load_yaml(path), str(path), require_units=True).prices)
    return tuple(rows)


def default_price(device_name: str) -> Price | None:
    """Choose the price to use where the user names none; None where none is listed.

    The rule: of each provider's on-demand prices take the lowest, then take the lower median over providers. The
    result is a listed row, not an average. Spot, reserved and ownership prices are never taken by default.
    """
    cheapest: dict[str, Price] = {}
    for price in load_prices():
        if price.device != device_name or price.commitment != "on_demand":
            continue
        known = cheapest.get(price.provider)
        if known is None or price.usd_per_device_hour < known.usd_per_device_hour:
            cheapest[price.provider] = price
    ranked = sorted(cheapest.values(), key=lambda price: (price.usd_per_device_hour, price.provider))
    return ranked[(len(ranked) - 1) // 2] if ranked else None
