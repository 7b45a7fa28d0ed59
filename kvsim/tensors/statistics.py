"""Statistics of keys, values and attention that decide how well a cache compresses."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray

Floats: TypeAlias = NDArray[np.floating[Any]]


def head_energy(vectors: Floats) -> DoubleArray:
    """Sum of squares of each head of (H, n, D), (H,)."""
    return np.asarray((vectors.astype(np.float64) ** 2).sum(axis=(1, 2)))


def kurtosis(vectors: Floats) -> DoubleArray:
    """Fourth moment over the squared second, about zero, of all elements of (..., n, D): 3 for normal vectors.

    Heavy channels raise it: a fraction f of channels that are s times larger gives
    3 (1 - f + f s^4) / (1 - f + f s^2)^2.
    """
    squares = vectors.astype(np.float64) ** 2
    second = squares.mean(axis=(-2, -1))
    return np.asarray((squares**2).mean(axis=(-2, -1)) / np.where(second > 0.0, second, 1.0) ** 2)


def effective_tokens(weights: Floats) -> DoubleArray:
    """N_eff = 1 / sum a_i^2 of attention weights (..., n): over how many tokens attention is spread."""
    return np.asarray(1.0 / (weights.astype(np.float64) ** 2).sum(axis=-1))


def rank_exponent(weights: Floats, first: int = 4, last: int = 200) -> float:
    """Exponent a of weight ~ rank ** -a, fitted to logs over ranks ``first`` to ``last``, mean over leading axes."""
    ordered = np.sort(weights.astype(np.float64), axis=-1)[..., ::-1]
    ranks = np.arange(first, min(last, weights.shape[-1]))
    logs = np.log(ordered[..., ranks - 1]).reshape(-1, len(ranks)).mean(axis=0)
    return float(-np.polyfit(np.log(ranks), logs, 1)[0])


def spectrum(vectors: Floats) -> DoubleArray:
    """Eigenvalues of the covariance of (n, D), largest first."""
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    return np.asarray(np.linalg.svd(centred, compute_uv=False) ** 2 / len(vectors))


def spectrum_exponent(vectors: Floats, first: int = 4) -> float:
    """Exponent p of eigenvalue ~ i ** -p, fitted to logs from ``first`` to half the channels."""
    values = spectrum(vectors)
    ranks = np.arange(first, len(values) // 2 + 1)
    return float(-np.polyfit(np.log(ranks), np.log(values[ranks - 1]), 1)[0])
