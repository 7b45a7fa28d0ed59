"""Risk of dropping tokens or dimensions, by formulas: an identity, bounds, and what chance would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray
from kvsim.tensors import FloatArray, LayerKv, attend


@dataclass(frozen=True, eq=False)
class EvictionTheory:
    """What dropping tokens does, (Hq, m).

    Attributes
    ----------
    lost_mass : (Hq, m)
        m, the weight of what is dropped.
    output_change : (Hq, m)
        ||o - o'|| = m ||mean v of dropped - mean v of kept||, means by weight; an identity.
    bound : (Hq, m)
        2 m max ||v||, what can be said from the mass alone.
    """

    lost_mass: DoubleArray
    output_change: DoubleArray
    bound: DoubleArray


def evict(weights: NDArray[Any], values: NDArray[Any], is_kept: NDArray[np.bool_]) -> EvictionTheory:
    """Drop tokens and renormalise (quality formulas 4.2). ``weights``, ``is_kept``: (Hq, m, n); ``values``: (Hq, n, D).

    Where all tokens are dropped the change is not defined and given as NaN.
    """
    exact = weights.astype(np.float64)
    wide = values.astype(np.float64)
    lost = np.where(is_kept, 0.0, exact).sum(axis=-1)
    kept = exact.sum(axis=-1) - lost
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_lost = (np.where(is_kept, 0.0, exact) @ wide) / lost[..., None]
        mean_kept = (np.where(is_kept, exact, 0.0) @ wide) / kept[..., None]
    change = np.where(lost > 0.0, lost * np.linalg.norm(np.where(lost[..., None] > 0.0, mean_lost, 0.0) - mean_kept,
                                                        axis=-1), 0.0)  # fmt: skip
    largest = np.linalg.norm(wide, axis=-1).max(axis=-1)[:, None]
    return EvictionTheory(lost, change, 2.0 * lost * largest)


def merge_values(
    weights: NDArray[Any], values: NDArray[Any], is_kept: NDArray[np.bool_], merged: NDArray[Any]
) -> tuple[DoubleArray, DoubleArray]:
    """||o - o'|| where dropped values were folded into kept ones whose keys stay, and without it; (Hq, m) each.

    With m the lost mass, means by weight, and D_s what the fold adds to a kept value: o - o' = m (mean v of dropped -
    mean v of kept) - mean D of kept, an identity. Folding helps where the second term points along the first and is no
    longer than twice it. ``weights``, ``is_kept``: (Hq, m, n); ``values``, ``merged``: (Hq, n, D).
    """
    exact, wide = weights.astype(np.float64), values.astype(np.float64)
    of_kept = np.where(is_kept, exact, 0.0)
    kept = of_kept.sum(axis=-1, keepdims=True)
    evicted = exact @ wide - (of_kept @ wide) / kept
    folded = (of_kept @ (merged.astype(np.float64) - wide)) / kept
    return np.linalg.norm(evicted - folded, axis=-1), np.linalg.norm(evicted, axis=-1)


def random_eviction_error(weights: NDArray[Any], values: NDArray[Any], kept: int) -> tuple[DoubleArray, DoubleArray]:
    """E||o - o'||^2 where ``kept`` of n tokens stay at random: by variance over K, and by finite influence; (Hq, m).

    The first, (1 - p) tr(Sigma) / K with p = K / n and influence n a_i (v_i - o), is a reconstruction of the
    query-agnostic rate of arXiv 2607.01520, not its text; 1 - p is for drawing without replacement. It is blind to a
    token with nearly all weight. The second, sum (1 - p) / (p + (1 - p) a_i) a_i^2 ||v_i - o_-i||^2 with o_-i the
    output without token i, is an interpolation that the project found after the first had failed.
    """
    exact, wide = weights.astype(np.float64), values.astype(np.float64)
    outputs = exact @ wide
    share = kept / exact.shape[-1]
    distance = squared_distance(wide, outputs)
    plain = (1 - share) / share * (exact**2 * distance).sum(axis=-1)
    # v_i - o_-i = (v_i - o) / (1 - a_i)
    without = distance / np.maximum(1e-12, 1.0 - exact) ** 2
    finite = ((1 - share) / (share + (1 - share) * exact) * exact**2 * without).sum(axis=-1)
    return plain, finite


def truncation_error(vectors: NDArray[Any], rank: int) -> float:
    """Least relative squared error of (n, D) at a rank: the tail of squared singular values (Eckart-Young)."""
    energy = np.linalg.svd(vectors.astype(np.float64), compute_uv=False) ** 2
    return float(energy[rank:].sum() / energy.sum())


def truncation_bounds(
    layer: LayerKv, attention_scale: float, key_change: FloatArray, value_change: FloatArray
) -> tuple[DoubleArray, DoubleArray]:
    """Bound what dropped dimensions do, from their change of keys and values, (H, n, D); quality formulas 4.3.

    |logit change| <= s ||q|| ||k - k_r||, (Hq, m, n), and, with logits as they were, ||output change|| <=
    sum a_i ||v_i - v_i,r||, (Hq, m).
    """
    group = layer.group_size
    queries = np.linalg.norm(layer.queries.astype(np.float64), axis=-1)[..., None]
    keys = np.repeat(np.linalg.norm(key_change.astype(np.float64), axis=-1), group, axis=0)[:, None, :]
    values = np.repeat(np.linalg.norm(value_change.astype(np.float64), axis=-1), group, axis=0)
    weights = attend(layer, attention_scale).weights.astype(np.float64)
    return attention_scale * queries * keys, (weights @ values[..., None])[..., 0]


def squared_distance(values: DoubleArray, outputs: DoubleArray) -> DoubleArray:
    """||v_i - o||^2 as (Hq, m, n)."""
    products = outputs @ values.swapaxes(1, 2)
    squares = (values**2).sum(axis=-1)[:, None, :] + (outputs**2).sum(axis=-1)[..., None]
    return np.asarray(np.maximum(0.0, squares - 2 * products))
