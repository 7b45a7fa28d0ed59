"""Sharing one budget of entries over heads."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import BoolArray, DoubleArray, FloatArray, IntArray


def joint_top_k(scores: FloatArray | DoubleArray, total: int, safeguard: int = 0) -> BoolArray:
    """Which entries are the ``total`` best of all heads, (H, n), each head's ``safeguard`` best among them.

    Of equal scores that entry wins which stands higher within its own head, then the earlier entry, so that heads of
    equal scores get equal shares. ``scores`` may be +inf; ``total`` is at least H x ``safeguard``.
    """
    heads = np.broadcast_to(np.arange(scores.shape[0])[:, None], scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(scores.shape[1]), scores.shape), axis=1)
    raised = np.where(rank < safeguard, np.inf, scores)
    best = np.lexsort((heads.ravel(), rank.ravel(), -raised.ravel()))[:total]
    chosen = np.zeros(scores.size, dtype=bool)
    chosen[best] = True
    return chosen.reshape(scores.shape)


def fullest_rank(tokens: IntArray, ranks: int) -> float:
    """Tokens of the fullest of ``ranks`` equal runs of heads over the mean, from tokens per head (H,)."""
    held = tokens.reshape(ranks, -1).sum(axis=1)
    return float(held.max() / held.mean())
