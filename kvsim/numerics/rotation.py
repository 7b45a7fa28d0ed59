"""Random rotations of vectors, and the random projection of QJL; both fixed by a seed."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np

from kvsim.numerics.arrays import FloatArray
from kvsim.numerics.hadamard import random_signs, rotate

RotationKind = Literal["dense", "hadamard"]


class Rotation:
    """A random orthogonal map of ``dim`` channels.

    ``dense`` is the Q of a QR decomposition of a Gaussian matrix with the signs of R's diagonal, which is uniform over
    all rotations and reflections (Mezzadri 2007). ``hadamard`` is a Hadamard matrix after random signs: ``log2 dim``
    additions an element, only nearly as good as uniform, and only for powers of two.
    """

    def __init__(self, kind: RotationKind, dim: int, seed: int) -> None:
        self._dense = random_orthogonal(dim, seed) if kind == "dense" else None
        self._signs = random_signs(dim, seed)
        if kind == "hadamard":
            rotate(self._signs)  # refuses a dimension that is no power of two

    def turn(self, vectors: FloatArray) -> FloatArray:
        """Rotate vectors, (..., dim)."""
        return multiply(vectors, self._dense.T) if self._dense is not None else rotate(vectors * self._signs)

    def back(self, vectors: FloatArray) -> FloatArray:
        """Invert `turn`."""
        return multiply(vectors, self._dense) if self._dense is not None else rotate(vectors) * self._signs


def multiply(vectors: FloatArray, matrix: FloatArray) -> FloatArray:
    """Multiply vectors, (..., n), by a matrix, (n, m), as one product of contiguous rows, which is what is fast."""
    rows = np.ascontiguousarray(vectors).reshape(-1, vectors.shape[-1])
    return (rows @ matrix).reshape(*vectors.shape[:-1], matrix.shape[1])


@lru_cache(maxsize=32)
def random_orthogonal(dim: int, seed: int) -> FloatArray:
    """Draw a uniformly random orthogonal matrix, (dim, dim)."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@lru_cache(maxsize=32)
def gaussian_projection(dim: int, seed: int) -> FloatArray:
    """Draw QJL's matrix S, (dim, dim) of independent N(0, 1) (arXiv 2406.03482)."""
    return np.random.default_rng(seed).standard_normal((dim, dim)).astype(np.float32)
