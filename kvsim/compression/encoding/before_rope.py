"""What formats share that store keys as they are before RoPE, and turn them again on each read."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, IntArray, KvTensors, LayerKv

T = TypeVar("T", bound=np.generic)
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


def without_rope(layer: LayerKv, kv: KvTensors) -> FloatArray:
    """Keys before RoPE; as they are where RoPE is unknown, or its channels are no longer there (a reduced width)."""
    return kv.rope.undo(layer.keys, layer.positions) if _turns(layer, kv) and kv.rope else layer.keys


def with_rope(keys: FloatArray, positions: IntArray, layer: LayerKv, kv: KvTensors) -> FloatArray:
    """Keys of ``layer`` turned by their positions again."""
    return kv.rope.rotate(keys, positions) if _turns(layer, kv) and kv.rope else keys


def _turns(layer: LayerKv, kv: KvTensors) -> bool:
    return kv.rope is not None and 2 * len(kv.rope.inverse_frequencies) <= layer.keys.shape[2]


def by_token(vectors: NDArray[T]) -> NDArray[T]:
    """Put all heads' channels of a token side by side: (H, n, D) to (n, H·D)."""
    heads, tokens, dim = vectors.shape
    return vectors.transpose(1, 0, 2).reshape(tokens, heads * dim)


def by_head(rows: NDArray[T], heads: int) -> NDArray[T]:
    """Invert `by_token`."""
    tokens, channels = rows.shape
    return np.ascontiguousarray(rows.reshape(tokens, heads, channels // heads).transpose(1, 0, 2))
