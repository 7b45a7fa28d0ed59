"""Every channel of every layer is stored: the neutral reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvsim.compression.reduction.base import Reduction
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.codec import ReductionCodec


class NoReduction(Reduction):
    """All channels, all layers."""

    names: ClassVar = {"full_width": {}}
    summaries: ClassVar = {"full_width": "all channels of all layers are stored"}

    family: ClassVar = "baseline"

    kind: Literal["full_width"] = "full_width"

    @property
    def is_none(self) -> bool:
        return True

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        return group

    def codec(self) -> ReductionCodec:
        from kvsim.compression.codec import NoReductionCodec

        return NoReductionCodec()
