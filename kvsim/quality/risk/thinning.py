"""Kernel thinning of a cache with the attention kernel, in a short version."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray, FloatArray, IntArray
from kvsim.quality.risk.comparators import Entries, similarity_scale
from kvsim.quality.risk.influence import HeadView

FAILURE: Final = 0.5
"""Probability with which the walk may leave its corridor: the paper's delta."""


def thinned(view: HeadView, count: int, queries: DoubleArray, rng: np.random.Generator) -> Entries:
    """Halve the tokens until ``count`` are left (kernel thinning, Dwivedi and Mackey, arXiv 2105.05842).

    Kernel halving only: pairs of a random order, one of each kept by a self-balancing walk. KT-SWAP, the search for
    the best of several candidate sets, is left out. Kernel: exp(s k.k') (<v, v'> / max ||v||^2 + 1) of centred keys, as
    thinning for attention takes it (recalled; Thinformer, arXiv 2606.10944, was not opened).

    Raises
    ------
    ValueError
        ``count`` is not the number of tokens divided by a power of two.
    """
    tokens = len(view.keys)
    halvings = round(np.log2(tokens / count))
    if count << halvings != tokens:
        msg = f"kernel halving leaves {tokens} / 2^m tokens, not {count}"
        raise ValueError(msg)
    kept = rng.permutation(tokens)
    kernel = _kernel(view, queries)
    for _ in range(halvings):
        kept = halve(kernel, kept, rng)
    return Entries.weighted(view.keys[kept], view.values[kept], np.full(count, tokens / count))


def _kernel(view: HeadView, queries: DoubleArray) -> FloatArray:
    """Up to a factor, (n, n)."""
    centred = view.keys - view.keys.mean(axis=0)
    centred = (np.sqrt(similarity_scale(view, queries)) * centred).astype(np.float32)
    values = (view.values / np.sqrt((view.values**2).sum(axis=1).max())).astype(np.float32)
    kernel: FloatArray = centred @ centred.T
    kernel = np.exp(kernel - kernel.max())
    kernel *= values @ values.T + np.float32(1.0)
    return kernel


def halve(kernel: FloatArray | DoubleArray, points: IntArray, rng: np.random.Generator) -> IntArray:
    """Keep one point of each pair (Algorithm 1b of the paper), half of an even number in all."""
    signs = np.zeros(len(kernel))
    chances = rng.random(len(points) // 2)
    deviation, slack, kept = 0.0, 2.0 * np.log(2.0 * max(1, len(points) // 2) / FAILURE), []
    for pair, chance in enumerate(chances):
        one, other = points[2 * pair], points[2 * pair + 1]
        apart = float(kernel[one, one] + kernel[other, other] - 2.0 * kernel[one, other])
        drift = float(signs @ (kernel[one] - kernel[other]))
        corridor = max(np.sqrt(apart * deviation * slack), apart)
        if corridor > 0.0:
            deviation += apart * max(0.0, 1.0 + (apart - 2.0 * corridor) * deviation / corridor**2)
            if chance < min(1.0, 0.5 * max(0.0, 1.0 - drift / corridor)):
                one, other = other, one
        # What is kept counts against what goes: the walk keeps their difference small.
        kept.append(one)
        signs[one] -= 1.0
        signs[other] += 1.0
    return np.asarray(kept, dtype=np.int64)
