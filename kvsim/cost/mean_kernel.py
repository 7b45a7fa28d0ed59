"""Several collections of timings of one library call, priced by their geometric mean.

Engines call the same cuBLAS product for linear layers in 16 bits, so that their tables are measurements of one thing on
different machines. The mean of two such tables predicts a third better than either alone does (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from kvsim.cost.kernels import FloatArray, Kernel
from kvsim.cost.priors import Edge
from kvsim.specs.base import Basis


class MeanKernel(Kernel):
    """Geometric mean of kernels; the first is the one that names and notes go by."""

    def __init__(self, members: tuple[Kernel, ...]) -> None:
        super().__init__(members[0].artefact, members[0].predictor)
        self._members = members

    @property
    def members(self) -> tuple[Kernel, ...]:
        """The kernels whose mean it is."""
        return self._members

    @property
    def source(self) -> str:
        """Every member's source."""
        return f"geometric mean of {len(self.members)}: {' | '.join(member.source for member in self.members)}"

    @property
    def basis(self) -> Basis:
        """The least certain of the members'."""
        return max((member.basis for member in self.members), key=list(Basis).index)

    def outside(self, **given: float) -> tuple[str, ...]:
        """Columns of a shape that lie beyond the rows of every member."""
        beyond = [set(member.outside(**given)) for member in self.members]
        return tuple(name for name in given if all(name in one for one in beyond))

    def at_edges(self, shape: Mapping[str, FloatArray]) -> dict[Edge, FloatArray]:
        """Mean of the members; the band holds the mean of their bands and, beside it, how far they lie apart."""
        edges = [member.at_edges(shape) for member in self.members]
        logs = {edge: np.stack([np.log(one[edge]) for one in edges]) for edge in Edge}
        central = logs[Edge.CENTRAL].mean(0)
        apart = logs[Edge.CENTRAL].std(0)
        below = np.hypot(central - logs[Edge.OPTIMISTIC].mean(0), apart)
        above = np.hypot(logs[Edge.PESSIMISTIC].mean(0) - central, apart)
        return {
            Edge.CENTRAL: np.exp(central),
            Edge.OPTIMISTIC: np.exp(central - below),
            Edge.PESSIMISTIC: np.exp(central + above),
        }


@lru_cache(maxsize=64)
def mean_of(members: tuple[Kernel, ...]) -> MeanKernel:
    """Mean of some kernels, the same object for the same ones, so that tables made of it can be kept."""
    return MeanKernel(members)
