"""The link catalogue, and what transfers over its links cost."""

from __future__ import annotations

import pytest

from kvsim.cost.links import load_link_priors, price_link
from kvsim.cost.priors import EDGES, Edge
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.link_catalog import list_links, load_link
from kvsim.specs.link import CustomLink


@pytest.mark.parametrize("name", list_links())
def test_every_link_is_named_by_its_file_and_priced_with_an_ordered_band(name: str) -> None:
    spec = load_link(name)
    assert spec.name == name
    central, best, worst = (price_link(name, edge).seconds(1e9) for edge in EDGES)
    assert best < central < worst
    assert price_link(name).bytes_per_s < spec.bandwidth.value


def test_aliases_are_unique_and_none_hides_a_name() -> None:
    aliases = [alias for name in list_links() for alias in load_link(name).aliases]
    assert len(set(aliases)) == len(aliases)
    assert not set(aliases) & set(list_links())
    assert load_link("IB_NDR").name == "infiniband-ndr-400"


def test_rates_follow_the_generations() -> None:
    families = (
        ("nvlink-3", "nvlink-4", "nvlink-5"),
        ("pcie-gen4-x16", "pcie-gen5-x16"),
        ("infiniband-hdr-200", "infiniband-ndr-400"),
        ("roce-100", "roce-200", "roce-400"),
        ("ethernet-10", "ethernet-25", "ethernet-100"),
    )
    for family in families:
        rates = [load_link(name).bandwidth.value for name in family]
        assert rates == sorted(rates)


def test_an_unknown_link_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="infiniband-ndr-400"):
        load_link("infiniband-ndr")


def test_a_link_given_by_its_figures_costs_exactly_those_at_every_edge() -> None:
    link = CustomLink(bandwidth=10e9, latency_s=0.5)
    assert {price_link(link, edge).seconds(20e9) for edge in EDGES} == {2.5}


def test_a_link_of_ones_own(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    text = (
        "name: mine\ntitle: My link\nkind: roce\nbandwidth: {value: 8 GB/s, source: me}\n"
        "sources: {me: {title: measured by me, as_of: 2026-01-01}}\n"
    )
    path.write_text(text, encoding="utf-8")
    assert price_link(str(path)).bytes_per_s == pytest.approx(8e9 * 0.70)
    path.write_text(text.replace("source: me", "source: you"), encoding="utf-8")
    with pytest.raises(InvalidSpec, match="you"):
        load_link(str(path))


def test_every_kind_has_an_efficiency_with_a_source() -> None:
    priors = load_link_priors()
    for name in list_links():
        assert priors.transfer_efficiency[load_link(name).kind].source
    assert priors.transfer_setup_s["default"].efficiency(Edge.CENTRAL) > 0
