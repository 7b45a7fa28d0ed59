"""Plain softmax attention over a cache: what every risk measure is read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.numerics.arrays import BoolArray, FloatArray
from kvsim.numerics.softmax import softmax
from kvsim.tensors.kv import LayerKv


@dataclass(frozen=True, eq=False)
class Attended:
    """Attention of a layer's queries over its cache.

    Attributes
    ----------
    logits, weights : (Hq, m, n)
        Scaled products with log-weights, and their softmax over tokens; fp64 inside.
    outputs : (Hq, m, Dv)
    """

    logits: FloatArray
    weights: FloatArray
    outputs: FloatArray


def attend(layer: LayerKv, attention_scale: float, mask: BoolArray | None = None) -> Attended:
    """Let ``layer.queries`` read the cache; tokens where ``mask``, (Hq, m, n), is False are not seen."""
    heads, dim = layer.num_kv_heads, layer.keys.shape[2]
    grouped = layer.queries.reshape(heads, -1, dim).astype(np.float64)
    keys, values = layer.keys.astype(np.float64), layer.values.astype(np.float64)
    logits = attention_scale * (grouped @ keys.transpose(0, 2, 1))
    if layer.log_weights is not None:
        logits = logits + layer.log_weights[:, None, :]
    if mask is not None:
        logits = np.where(mask.reshape(logits.shape), logits, -np.inf)
    weights = softmax(logits)
    outputs = weights @ values
    query_heads, count = layer.queries.shape[:2]
    return Attended(*(array.reshape(query_heads, count, -1).astype(np.float32) for array in (logits, weights, outputs)))
