"""Folding vectors into others: the nearest of those that stay, and means weighted by what is folded in."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import FloatArray, IntArray

LEAST_NORM = 1e-6
"""What shorter vectors count as when a cosine is taken (kvpress; kernels/select/merge)."""


def complement(kept: IntArray, tokens: int) -> IntArray:
    """Give the indices that are not in ``kept``, (H, kept), of each row of ``tokens``: (H, tokens - kept) ascending."""
    is_gone = np.ones((len(kept), tokens), dtype=bool)
    np.put_along_axis(is_gone, kept, False, axis=1)
    return np.nonzero(is_gone)[1].reshape(len(kept), -1).astype(np.int64)


def nearest_by_cosine(vectors: FloatArray, candidates: FloatArray) -> tuple[IntArray, FloatArray]:
    """Find the candidate of largest cosine of each vector: its place and the cosine, (H, e) each.

    ``vectors``: (H, e, D), ``candidates``: (H, k, D) with k >= 1. Of equal cosines the first candidate is taken.
    """
    places = np.empty(vectors.shape[:2], dtype=np.int64)
    cosines = np.empty(vectors.shape[:2], dtype=np.float32)
    for head, (some, others) in enumerate(zip(_unit(vectors), _unit(candidates), strict=True)):
        similarity = some @ others.T
        places[head] = similarity.argmax(axis=1)
        cosines[head] = np.take_along_axis(similarity, places[head][:, None], axis=1)[:, 0]
    return places, cosines


def _unit(vectors: FloatArray) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: FloatArray = vectors / np.maximum(norms, LEAST_NORM)
    return unit


def weight_at(places: IntArray, weights: FloatArray, slots: int) -> FloatArray:
    """Sum ``weights``, (H, e), over those of each place: (H, slots)."""
    rows = [np.bincount(one, some, slots) for one, some in zip(places, weights, strict=True)]
    return np.stack(rows).astype(np.float32)


def sum_at(places: IntArray, weighted: FloatArray, slots: int) -> FloatArray:
    """Sum vectors, (H, e, D), over those of each place: (H, slots, D)."""
    sums = np.zeros((len(places), slots, weighted.shape[2]), dtype=np.float32)
    for row, one, some in zip(sums, places, weighted, strict=True):
        order = np.argsort(one, kind="stable")
        starts = np.flatnonzero(np.diff(one[order], prepend=-1))
        if len(order):
            row[one[order][starts]] = np.add.reduceat(some[order], starts, axis=0)
    return sums


def folded_means(kept: FloatArray, gone: FloatArray, places: IntArray, weights: FloatArray) -> FloatArray:
    """Give (x_s + sum w x_e) / (1 + sum w) for each kept vector, (H, k, D), over the ``gone`` that go to its place.

    ``gone``: (H, e, D); ``places`` and ``weights``: (H, e), weights >= 0. A vector that nothing goes to is unchanged.
    """
    slots = kept.shape[1]
    total = weight_at(places, weights, slots)[..., None]
    summed = sum_at(places, weights[..., None] * gone, slots)
    # Bit for bit as it was where nothing is folded in.
    means: FloatArray = np.where(total > 0, (kept + summed) / (1 + total), kept).astype(np.float32)
    return means
