"""Queries for a compressor that has seen none: drawn from what the keys alone say."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray

_SEED: Final = 6001
_LEAST_VARIANCE: Final = 1e-6
"""Of a direction of keys, beside that of the widest."""


def isotropic_queries(keys: DoubleArray, attention_scale: float, num_queries: int, spread: float) -> DoubleArray:
    """Draw queries, (m, D), whose logits vary equally along every direction in which keys (n, D) do.

    ``spread``: root mean square of all logits about their mean.
    """
    centred = keys - keys.mean(axis=0)
    variances, directions = np.linalg.eigh(centred.T @ centred / len(keys))
    widths = np.sqrt(np.maximum(variances, _LEAST_VARIANCE * max(variances[-1], 1e-300)))
    drawn = np.random.default_rng(_SEED).standard_normal((num_queries, keys.shape[1]))
    return _spread(drawn / widths @ directions.T, centred, attention_scale, spread)


def key_queries(keys: DoubleArray, attention_scale: float, num_queries: int, spread: float) -> DoubleArray:
    """Take ``num_queries`` keys, evenly through the cache and less their mean, as queries of the same ``spread``."""
    centred = keys - keys.mean(axis=0)
    chosen = np.linspace(0, len(keys) - 1, num_queries).round().astype(np.int64)
    return _spread(centred[chosen], centred, attention_scale, spread)


def _spread(queries: DoubleArray, centred: DoubleArray, attention_scale: float, spread: float) -> DoubleArray:
    size = np.sqrt(np.mean((attention_scale * (queries @ centred.T)) ** 2))
    return np.asarray(queries * (spread / size if size > 0.0 else 1.0))


def resolved_spread(tokens: int, atoms: int) -> float:
    """Spread of logits at which attention falls on as many tokens as there are atoms.

    Normal logits of standard deviation s leave N_eff = n exp(-s^2), so s = sqrt(ln(n / K)).
    """
    return float(np.sqrt(np.log(max(tokens / atoms, 1.0 + 1e-9))))
