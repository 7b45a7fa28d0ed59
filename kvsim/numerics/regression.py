"""Least squares with a penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.numerics.arrays import DoubleArray, FloatArray


@dataclass(frozen=True, eq=False)
class AffineMap:
    """``inputs @ weights + intercept``.

    Attributes
    ----------
    weights : (inputs, outputs)
    intercept : (outputs,)
    """

    weights: DoubleArray
    intercept: DoubleArray

    def __call__(self, inputs: FloatArray) -> DoubleArray:
        """Give the outputs of rows, (n, inputs)."""
        outputs: DoubleArray = inputs.astype(np.float64) @ self.weights + self.intercept
        return outputs


def ridge(inputs: FloatArray, outputs: FloatArray | DoubleArray, penalty: float = 1.0) -> AffineMap:
    """Minimise ||inputs W + b - outputs||² + penalty ||W||² over rows; the intercept is free.

    ``inputs`` (n, d), ``outputs`` (n, m); in fp64 by the normal equations, which the penalty makes regular.
    """
    rows, wanted = inputs.astype(np.float64), outputs.astype(np.float64)
    mean_row, mean_wanted = rows.mean(axis=0), wanted.mean(axis=0)
    centred = rows - mean_row
    gram = centred.T @ centred + penalty * np.eye(rows.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (wanted - mean_wanted))
    return AffineMap(weights, mean_wanted - mean_row @ weights)
