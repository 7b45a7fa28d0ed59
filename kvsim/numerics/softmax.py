"""Softmax and its denominator in fp64."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from kvsim.numerics.arrays import DoubleArray, FloatArray

RealArray = TypeVar("RealArray", FloatArray, DoubleArray)


def softmax(logits: DoubleArray) -> DoubleArray:
    """Weights of logits (..., n) over the last axis; -inf weighs nothing, and each row needs a finite one."""
    weights: DoubleArray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def log_sum_exp(logits: RealArray) -> RealArray:
    """Log of the sum of exponentials over the last axis, (..., 1), in their dtype; each row needs a finite one."""
    top = logits.max(axis=-1, keepdims=True)
    total: RealArray = top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return total
