"""How much each entry of a cache moves attention outputs, over a sample of queries.

The influence of entry i on query q is a_i(q) (v_i - o(q)), a_i its softmax weight and o the output; over all queries of
a sample it is the entry's response profile. Profiles of all entries add up to zero. Influence functions are textbook;
that they are the profiles of arXiv 2607.01520 is a reconstruction from its abstract and a note.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray

NUM_FEATURES: Final = 64
"""Numbers that a sketch of a profile has: the F that kernels/select/weighted_atoms is counted at."""
_SEED: Final = 260701520
_LEAST_REST: Final = 1e-6
"""Attention on all other entries, below which what they would give is not told from rounding."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What queries read of a whole cache: ``log_normaliser`` (m,) of their softmax, ``outputs`` (m, Dv)."""

    log_normaliser: DoubleArray
    outputs: DoubleArray

    def shares(self, logits: DoubleArray) -> DoubleArray:
        """Softmax weights of logits (m, n) of any part of that cache."""
        return np.asarray(np.exp(logits - self.log_normaliser[:, None]))


def read(logits: DoubleArray, values: DoubleArray) -> Reading:
    """Let queries read: logits (m, n), log-weights included, and values (n, Dv)."""
    top = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(axis=1, keepdims=True)
    return Reading((top + np.log(total))[:, 0], weights @ values / total)


def squared_influence(shares: DoubleArray, values: DoubleArray, outputs: DoubleArray) -> DoubleArray:
    """Mean over queries of a_i^2 ||v_i - o||^2, (n,): the squared norm of each profile."""
    return np.asarray((shares**2 * _squared_distance(values, outputs)).mean(axis=0))


def squared_removal(shares: DoubleArray, values: DoubleArray, outputs: DoubleArray) -> DoubleArray:
    """Mean over queries of a_i^2 ||v_i - o_-i||^2, (n,), o_-i the output without the entry: what its loss does.

    v_i - o = (1 - a_i) (v_i - o_-i), so the influence of an entry with all the attention vanishes, and this does not.
    """
    effect = shares / np.maximum(1.0 - shares, _LEAST_REST)
    return np.asarray((effect**2 * _squared_distance(values, outputs)).mean(axis=0))


def _squared_distance(values: DoubleArray, outputs: DoubleArray) -> DoubleArray:
    """||v_i - o||^2, (m, n)."""
    products = outputs @ values.T
    apart = (values**2).sum(axis=1) - 2.0 * products + (outputs**2).sum(axis=1)[:, None]
    return np.asarray(np.maximum(apart, 0.0))


def sketch(
    shares: DoubleArray, values: DoubleArray, outputs: DoubleArray, num_features: int = NUM_FEATURES
) -> DoubleArray:
    """Profiles as (n, F), whose products are in the mean those of the profiles (a tensor sketch).

    Feature f adds up all queries with random signs, and all channels of v - o with random normal weights, so a profile
    of m queries by Dv channels is never formed: two products of the shares with m x F matrices do.
    """
    rng = np.random.default_rng(_SEED)
    signs = rng.choice(np.array([-1.0, 1.0]), (len(shares), num_features))
    mixing = rng.standard_normal((values.shape[1], num_features))
    seen = shares.T @ signs * (values @ mixing)
    common = shares.T @ (signs * (outputs @ mixing))
    return np.asarray((seen - common) / np.sqrt(len(shares) * num_features))
