"""Risk by formulas: from attention and an encoding's relative error to noise of logits and error of outputs.

Symbols, per query: a_i softmax weights, o = sum a_i v_i, s the attention scale, D relative squared error
E||x - x'||^2 / ||x||^2 of keys or values, c the shrink 1 - <x, x'> / ||x||^2 (a Lloyd-Max or centroid quantiser has
c = D: its code is the mean of what it stands for; an unbiased one has c = 0). The formulas start from D and c;
`distortion` measures them, one number per KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray
from kvsim.quality.dropping import squared_distance
from kvsim.tensors import TENSORS, BoolArray, FloatArray, LayerKv, attend
from kvsim.tensors.statistics import effective_tokens, head_energy, kurtosis

HEAVY_KURTOSIS: Final = 10.0
"""Kurtosis of keys above which the even spread of error over channels, that the formula assumes, is doubtful."""
DIFFUSE_SHARE: Final = 0.2
"""N_eff beside the number of tokens above which value errors that tokens share no longer average out."""
LARGE_NOISE: Final = 0.5
"""Standard deviation of logits above which the first order in it is not enough."""
QUIET_SHARE: Final = 0.2
"""Squared value norm of heavy tokens, beside the mean, below which an error that tokens share falls on them."""


@dataclass(frozen=True, eq=False)
class Distortion:
    """How far K and V of one layer are from what they were, per KV head, (H,).

    Attributes
    ----------
    key_error, value_error : (H,)
        Relative squared error D.
    key_shrink, value_shrink : (H,)
        Shrink c; negative where vectors grew.
    """

    key_error: DoubleArray
    value_error: DoubleArray
    key_shrink: DoubleArray
    value_shrink: DoubleArray


def distortion(before: LayerKv, after: LayerKv) -> Distortion:
    """Measure D and c of a layer whose tokens were all kept (or of the kept ones: give both as kept)."""
    seen = after.is_seen[..., None]
    pairs = [(before.tensor(name) * seen, after.tensor(name) * seen) for name in TENSORS]
    return Distortion(*(_relative_error(*pair) for pair in pairs), *(_shrink(*pair) for pair in pairs))


def _relative_error(before: FloatArray, after: FloatArray) -> DoubleArray:
    energy, change = head_energy(before), head_energy(after.astype(np.float64) - before)
    return np.asarray(change / np.where(energy > 0.0, energy, 1.0))


def _shrink(before: FloatArray, after: FloatArray) -> DoubleArray:
    energy = head_energy(before)
    product = (before.astype(np.float64) * after).sum(axis=(1, 2))
    return np.asarray(np.where(energy > 0.0, 1.0 - product / np.where(energy > 0.0, energy, 1.0), 0.0))


@dataclass(frozen=True, eq=False)
class LayerTheory:
    """Predictions for one layer, per query head, (Hq,); output errors are relative, E||o - o'||^2 / E||o||^2, rooted.

    Attributes
    ----------
    logit_noise : (Hq,)
        Root of the mean variance of a logit.
    logit_error : (Hq,)
        The same with the shrink of logits, less their mean per query.
    key_output_error, value_output_error : (Hq,)
    output_error : (Hq,)
        Both together, independent of each other.
    cautions : tuple of frozenset of str
        Per query head, why the prediction may fail: see `CAUTIONS`.
    """

    logit_noise: DoubleArray
    logit_error: DoubleArray
    key_output_error: DoubleArray
    value_output_error: DoubleArray
    output_error: DoubleArray
    cautions: tuple[frozenset[str], ...]


CAUTIONS: Final = {
    "heavy keys": f"kurtosis of keys above {HEAVY_KURTOSIS:g}: errors need not be spread evenly over channels",
    "diffuse": f"attention over more than {DIFFUSE_SHARE:.0%} of tokens: value errors in common do not average out",
    "quiet heavy tokens": f"tokens with most weight have below {QUIET_SHARE:.0%} of the mean squared value norm, as "
    "sinks do: an error that tokens share (groups along tokens, dropped dimensions) is large beside them",
    "large noise": f"logit noise above {LARGE_NOISE:g}: the first order is not enough",
}


def predict_layer(
    layer: LayerKv, attention_scale: float, error: Distortion, mask: BoolArray | None = None
) -> LayerTheory:
    """Predict logit noise and output error of an encoding with this distortion, of tokens that ``mask`` lets be seen.

    Sources: the project's notes on quality formulas, 4.1 (derived there and checked by simulation); the shrink of a
    centroid quantiser is TurboQuant's bias, arXiv 2504.19874, 2 / pi at one bit. Errors are taken as independent
    between tokens and spread evenly over channels, and the output to first order in logits.
    """
    group = layer.group_size
    key_error, key_shrink, value_error, value_shrink = (
        np.repeat(one, group)[:, None]
        for one in (error.key_error, error.key_shrink, error.value_error, error.value_shrink)
    )
    seen = attend(layer, attention_scale, mask)
    weights, outputs = seen.weights.astype(np.float64), seen.outputs.astype(np.float64)
    values = np.repeat(layer.values, group, axis=0).astype(np.float64)
    variance = logit_variance(layer, attention_scale, np.maximum(0.0, key_error - key_shrink**2))
    logits = seen.logits.astype(np.float64)
    is_seen = np.isfinite(logits)
    count = is_seen.sum(axis=-1, keepdims=True)
    logits = np.where(is_seen, logits, 0.0)
    drift = -key_shrink[..., None] * np.where(is_seen, logits - logits.sum(axis=-1, keepdims=True) / count, 0.0)
    variance = np.where(is_seen, variance, 0.0)
    distance = squared_distance(values, outputs)
    from_keys = (weights**2 * variance * distance).sum(axis=-1)
    bias = weights * drift
    from_keys += ((bias @ values - bias.sum(axis=-1, keepdims=True) * outputs) ** 2).sum(axis=-1)
    norms = (values**2).sum(axis=-1)[:, None, :]
    size = (outputs**2).sum(axis=-1)
    from_values = np.maximum(0.0, value_error - value_shrink**2) * (weights**2 * norms).sum(axis=-1)
    from_values += value_shrink**2 * size
    seen_tokens = count.sum(axis=(1, 2))
    noise = np.sqrt(variance.sum(axis=(1, 2)) / seen_tokens)
    total = np.where(size.sum(axis=1) > 0.0, size.sum(axis=1), 1.0)
    return LayerTheory(
        logit_noise=noise,
        logit_error=np.sqrt((variance + drift**2).sum(axis=(1, 2)) / seen_tokens),
        key_output_error=np.sqrt(from_keys.sum(axis=1) / total),
        value_output_error=np.sqrt(from_values.sum(axis=1) / total),
        output_error=np.sqrt((from_keys + from_values).sum(axis=1) / total),
        cautions=_cautions(layer, weights, noise, error),
    )


def logit_variance(layer: LayerKv, attention_scale: float, key_error: DoubleArray) -> DoubleArray:
    """Var(delta_i) = s^2 ||q||^2 ||k_i||^2 D / dim of error spread evenly over channels, (Hq, m, n).

    Quality formulas 4.1; the lower bound of D for b bits is 4^-b and TurboQuant's upper bound sqrt(3) pi / 2 4^-b
    (arXiv 2504.19874). ``key_error``: (Hq, 1).
    """
    queries = (layer.queries.astype(np.float64) ** 2).sum(axis=-1)
    keys = np.repeat((layer.keys.astype(np.float64) ** 2).sum(axis=-1), layer.group_size, axis=0)
    dim = layer.keys.shape[2]
    return np.asarray(attention_scale**2 / dim * key_error[..., None] * queries[..., None] * keys[:, None, :])


def _cautions(
    layer: LayerKv, weights: DoubleArray, noise: DoubleArray, error: Distortion
) -> tuple[frozenset[str], ...]:
    heavy = np.repeat((kurtosis(layer.keys) > HEAVY_KURTOSIS) & (error.key_error > 0.0), layer.group_size)
    spread = effective_tokens(weights).mean(axis=-1) / weights.shape[-1]
    diffuse = (spread > DIFFUSE_SHARE) & np.repeat(error.value_error > 0.0, layer.group_size)
    norms = np.repeat((layer.values.astype(np.float64) ** 2).sum(axis=-1), layer.group_size, axis=0)[:, None, :]
    squares = weights**2
    quiet = (squares * norms).sum(axis=(1, 2)) < QUIET_SHARE * norms.mean(axis=(1, 2)) * squares.sum(axis=(1, 2))
    quiet &= np.repeat(error.value_error > 0.0, layer.group_size)
    found = {"heavy keys": heavy, "diffuse": diffuse, "quiet heavy tokens": quiet, "large noise": noise > LARGE_NOISE}
    return tuple(frozenset(name for name, flags in found.items() if flags[head]) for head in range(len(noise)))


def mse_bounds(bits: float) -> tuple[float, float]:
    """Least and TurboQuant's greatest relative error of a vector at ``bits`` per element.

    4^-b (Shannon and Yao) and sqrt(3) pi / 2 4^-b: theorems 1 and 3 of arXiv 2504.19874, for unit vectors in the worst
    case.
    """
    least = 4.0**-bits
    return least, np.sqrt(3.0) * np.pi / 2 * least


def qjl_logit_variance(residual_error: float, squared_norms: DoubleArray, dim: int) -> DoubleArray:
    """Variance of <y, x'> of TurboQuant's unbiased variant: pi / (2 d) ||y||^2 ||x||^2 D(b - 1), arXiv 2504.19874.

    An upper bound: what the sign vector already knows of the product is left out. ``squared_norms``: ||y||^2 ||x||^2.
    """
    return np.asarray(np.pi / (2 * dim) * squared_norms * residual_error)
