"""What formats share that store keys as they are before RoPE, and turn them again on each read."""

from __future__ import annotations

from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.specs.model import LayerGroup

_ROPE_FLOPS_PER_ELEMENT = 3.0
"""Two products and a sum."""


class BeforeRopeEncoding(PerHeadEncoding):
    """A format whose keys are unrotated in the cache, so that channels keep their own statistics."""

    @property
    def undoes_rope(self) -> bool:
        return True

    def rope_flops_per_token(self, group: LayerGroup) -> float:
        """FLOPs to turn one attended token's keys, all KV heads."""
        return _ROPE_FLOPS_PER_ELEMENT * group.num_kv_heads * group.k_head_dim
