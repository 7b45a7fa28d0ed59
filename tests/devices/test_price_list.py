"""Prices: dated, sourced, for known devices, and the rule of the default price."""

from datetime import date

import pytest

from kvsim import price_list
from kvsim.device_catalog import list_devices, load_device
from kvsim.price_list import default_price, load_prices
from kvsim.specs.price import Price


def price(provider: str, usd: float, commitment: str = "on_demand", device: str = "h100-sxm") -> Price:
    return Price(
        device=device,
        provider=provider,
        commitment=commitment,
        usd_per_device_hour=usd,
        as_of=date(2026, 1, 1),
        source="test",
    )


def test_every_price_is_for_a_known_device_dated_and_sourced():
    assert load_prices()
    for row in load_prices():
        assert row.device in list_devices()
        assert date(2024, 1, 1) <= row.as_of <= date(2026, 11, 30)
        assert len(row.source) > 20
        assert 0.1 < row.usd_per_device_hour < 20


def test_no_price_is_listed_twice():
    keys = [
        (row.device, row.provider, row.commitment, row.region, row.source, row.usd_per_device_hour)
        for row in load_prices()
    ]
    assert len(keys) == len(set(keys))


def test_spot_is_below_the_same_providers_on_demand_price():
    on_demand = {(row.device, row.provider): row for row in load_prices() if row.commitment == "on_demand"}
    spot = [row for row in load_prices() if row.commitment == "spot"]
    assert spot
    for row in spot:
        assert row.usd_per_device_hour < on_demand[row.device, row.provider].usd_per_device_hour


@pytest.mark.parametrize(
    ("name", "provider", "usd"),
    [
        # h100-sxm on demand: Verda 2.29, Nebius 2.95, Lambda 3.99, AWS 6.88.
        ("h100-sxm", "Nebius", 2.95),
        # Verda 4.89, Nebius 5.50: an even count takes the lower of the middle two.
        ("b200-sxm", "Verda (DataCrunch)", 4.89),
        # Google's cheapest region.
        ("tpu-v6e", "GCP", 2.70),
    ],
)
def test_default_price_is_the_lower_median_over_providers(name, provider, usd):
    chosen = default_price(name)
    assert chosen is not None
    assert (chosen.provider, chosen.usd_per_device_hour) == (provider, pytest.approx(usd))
    assert chosen in load_prices()


def test_a_provider_with_many_rows_counts_once(monkeypatch):
    rows = (price("a", 1.0), price("b", 9.0), price("b", 8.0), price("b", 7.0), price("c", 2.0))
    monkeypatch.setattr(price_list, "load_prices", lambda: rows)
    chosen = default_price("h100-sxm")
    assert chosen is not None
    assert (chosen.provider, chosen.usd_per_device_hour) == ("c", 2.0)


def test_spot_reserved_and_owned_never_become_the_default(monkeypatch):
    rows = tuple(price("a", 1.0, commitment) for commitment in ("spot", "reserved_3yr", "owned_tco"))
    monkeypatch.setattr(price_list, "load_prices", lambda: rows)
    assert default_price("h100-sxm") is None


def test_phones_and_macs_have_no_price():
    for name in list_devices():
        if load_device(name).spec.kind in {"edge", "mobile"}:
            assert default_price(name) is None
