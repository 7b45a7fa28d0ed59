"""Softmax in fp64."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import DoubleArray


def softmax(logits: DoubleArray) -> DoubleArray:
    """Weights of logits (..., n) over the last axis; -inf weighs nothing, and each row needs a finite one."""
    weights: DoubleArray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights
