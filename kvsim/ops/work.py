"""Work: how many FLOPs an operation needs, what it reads and writes, and how many elements it must decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from kvsim.specs.base import Dtype

Numeric = float | npt.NDArray[np.float64]


class Component(StrEnum):
    """What a second of engine time is spent on; the report's time split."""

    WEIGHTS = "weights"
    ATTENTION = "attention"
    COMPRESSION = "compression"
    COMMUNICATION = "communication"
    OVERHEAD = "overhead"


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel moves and computes.

    ``flops`` run on the tensor units in ``dtype``; ``vector_flops`` on the vector units; ``decoded_elements`` are
    values unpacked from a compressed format by the method named ``unpack_family``.
    """

    flops: Numeric = 0.0
    bytes_read: Numeric = 0.0
    bytes_written: Numeric = 0.0
    vector_flops: Numeric = 0.0
    decoded_elements: Numeric = 0.0
    unpack_family: str | None = None
    dtype: Dtype = Dtype.BF16
    launches: float = 1.0

    def scaled(self, share: float) -> Work:
        """Give a share of the work, launches included: what is done now and then, per step."""
        return replace(
            self,
            flops=self.flops * share,
            bytes_read=self.bytes_read * share,
            bytes_written=self.bytes_written * share,
            vector_flops=self.vector_flops * share,
            decoded_elements=self.decoded_elements * share,
            launches=self.launches * share,
        )


@dataclass(frozen=True, slots=True)
class OpCall:
    """A named operation with its work, and what the time counts as."""

    name: str
    work: Work
    component: Component
    count: int = 1
    """How often it runs (layers)."""


def compression_calls(works: Mapping[str, Work]) -> tuple[OpCall, ...]:
    """Give named work as operations whose time counts as compression."""
    return tuple(OpCall(name, work, Component.COMPRESSION) for name, work in works.items())
