"""What moving bytes over a named link costs: nominal rate x efficiency, after a set-up time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvsim.cost.priors import Edge, PriorTable, first_of
from kvsim.data_files import data_dir
from kvsim.documents import load_yaml, validate
from kvsim.link_catalog import load_link
from kvsim.specs.base import Basis, Spec
from kvsim.specs.link import CustomLink


class LinkPriors(Spec):
    """Priors of transfers, looked up by a link's kind, then ``default``."""

    schema_version: int
    name: str
    transfer_efficiency: PriorTable
    transfer_setup_s: PriorTable


@dataclass(frozen=True)
class PricedLink:
    """One direction of a link at one edge of the priors."""

    name: str
    bytes_per_s: float
    setup_s: float
    basis: Basis
    source: str

    def seconds(self, size_bytes: float) -> float:
        """Duration of a transfer that has the link to itself."""
        return self.setup_s + size_bytes / self.bytes_per_s


@lru_cache(maxsize=1)
def load_link_priors() -> LinkPriors:
    """Read ``calibration/priors/links.yaml``."""
    path = data_dir("calibration/priors") / "links.yaml"
    return validate(LinkPriors, load_yaml(path), path.name)


def price_link(link: str | CustomLink, edge: Edge = Edge.CENTRAL) -> PricedLink:
    """Price a link of the catalogue by its priors; one given by its figures costs exactly those, at every edge.

    Raises
    ------
    UnknownName
        No link of the catalogue has that name.
    """
    if isinstance(link, CustomLink):
        return PricedLink("custom", link.bandwidth, link.latency_s, Basis.LITERATURE, "given in the scenario")
    spec, priors = load_link(link), load_link_priors()
    efficiency = first_of(priors.transfer_efficiency, (spec.kind, "default"))
    setup = first_of(priors.transfer_setup_s, (spec.kind, "default"))
    latency_s = spec.latency.value if spec.latency is not None else 0.0
    return PricedLink(
        name=spec.name,
        bytes_per_s=spec.bandwidth.value * efficiency.efficiency(edge),
        setup_s=setup.cost(edge) + latency_s,
        basis=Basis.LITERATURE,
        source=f"{spec.sources[spec.bandwidth.source].title}; efficiency: {efficiency.source}; set-up: {setup.source}",
    )
