"""Hadamard rotations: orthogonal, and free of multiplications.

A vector turned by one has its energy spread evenly over its channels, so that a single large channel no longer sets
the step of a quantiser (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import math

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import FloatArray


def largest_block(dim: int) -> int:
    """Give the largest power of two that divides ``dim``, 1 for an odd one."""
    return dim & -dim


def is_power_of_two(dim: int) -> bool:
    """Whether Sylvester's matrix exists in ``dim`` dimensions."""
    return dim > 0 and dim & (dim - 1) == 0


def hadamard_matrix(dim: int) -> FloatArray:
    """Sylvester's matrix scaled to be orthonormal, (dim, dim); symmetric, so its own inverse.

    Raises
    ------
    InvalidSpec
        Unless ``dim`` is a power of two.
    """
    return rotate(np.eye(_power_of_two(dim), dtype=np.float32))


def rotate(vectors: FloatArray, block: int | None = None) -> FloatArray:
    """Turn vectors, (..., D), by the orthonormal Hadamard matrix; applied twice it gives them back.

    Parameters
    ----------
    block : int, optional
        Turn each run of so many channels by itself: a power of two that divides D. All D channels by default.

    Raises
    ------
    InvalidSpec
        ``block`` is no power of two, or does not divide D.
    """
    dim = vectors.shape[-1]
    size = _power_of_two(dim if block is None else block)
    if dim % size:
        msg = f"Hadamard blocks of {size} do not divide {dim} channels; a block of {largest_block(dim)} does"
        raise InvalidSpec(msg)
    # Channels first, so that every sum runs over contiguous memory.
    turned = np.ascontiguousarray(vectors.astype(np.float32).reshape(-1, size).T)
    half = 1
    while half < size:
        pairs = turned.reshape(size // (2 * half), 2, half, -1)
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        half *= 2
    turned *= np.float32(1.0 / math.sqrt(size))
    return np.ascontiguousarray(turned.T).reshape(vectors.shape)


def random_signs(dim: int, seed: int) -> FloatArray:
    """Draw ``dim`` signs, +1 or -1: ``rotate(vectors * signs)`` is a random rotation, ``rotate(y) * signs`` undoes it.

    Three such rounds come close to a rotation drawn uniformly; one is what QuaRot uses.
    """
    return (2.0 * np.random.default_rng(seed).integers(0, 2, dim) - 1.0).astype(np.float32)


def _power_of_two(size: int) -> int:
    if not is_power_of_two(size):
        msg = f"a Hadamard matrix needs a power of two, not {size}; blocks of {largest_block(max(size, 1))} would do"
        raise InvalidSpec(msg)
    return size
