"""Other orders of the same numbers: all heads of a token side by side, keys before RoPE."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import FloatArray, IntArray
from kvsim.tensors.kv import LayerKv, Rope

T = TypeVar("T", bound=np.generic)


def by_token(vectors: NDArray[T]) -> NDArray[T]:
    """Put all heads' channels of a token side by side: (H, n, D) to (n, H·D)."""
    heads, tokens, dim = vectors.shape
    return vectors.transpose(1, 0, 2).reshape(tokens, heads * dim)


def by_head(rows: NDArray[T], heads: int) -> NDArray[T]:
    """Invert `by_token`."""
    tokens, channels = rows.shape
    return np.ascontiguousarray(rows.reshape(tokens, heads, channels // heads).transpose(1, 0, 2))


def bare_keys(layer: LayerKv, rope: Rope | None) -> FloatArray:
    """Keys of a layer before RoPE, (H, n, D); as they are without one."""
    return layer.keys if rope is None else rope.undo(layer.keys, layer.positions)


def turned_keys(bare: FloatArray, positions: IntArray, rope: Rope | None) -> FloatArray:
    """Invert `bare_keys`: keys (H, n, D) turned by their positions (H, n)."""
    return bare if rope is None else rope.rotate(bare, positions)
