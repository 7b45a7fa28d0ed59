"""The largest numbers of rows."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import BoolArray, DoubleArray, FloatArray


def mark_largest(rows: FloatArray | DoubleArray, count: int) -> BoolArray:
    """Mark the ``count`` largest numbers of each row of (R, n), earlier ones first where they are equal."""
    marked = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(marked, np.argsort(-rows, axis=1, kind="stable")[:, :count], values=True, axis=1)
    return marked
