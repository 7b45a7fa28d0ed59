"""How far back a head looks by position alone."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import FloatArray
from kvsim.numerics.softmax import softmax


def early_attention(queries: FloatArray, keys: FloatArray, attention_scale: float) -> FloatArray:
    """Area under the cumulated attention curve of one query over n keys, (..., D) and (..., n, D) to (...).

    1 where all attention lies on the first key, 1 / n where it lies on the last, about a half where it is spread out.
    """
    logits = attention_scale * np.einsum("...d,...nd->...n", queries.astype(np.float64), keys.astype(np.float64))
    area: FloatArray = np.cumsum(softmax(logits), axis=-1).mean(axis=-1).astype(np.float32)
    return area
