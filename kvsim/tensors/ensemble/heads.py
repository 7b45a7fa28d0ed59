"""What is fixed by the model: per KV head the bases, scales and means that all its sequences share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray
from kvsim.tensors.ensemble.spec import EnsembleSpec


@dataclass(frozen=True, eq=False)
class HeadModel:
    """One KV head, all in coordinates before RoPE.

    Attributes
    ----------
    basis : (D, D)
        Columns are the keys' eigenvectors. The first columns lie in slow channels: topics, needle codes, the sink.
    key_std : (D,)
        Standard deviation along each column.
    channel_scale : (D,)
        1, or the heavy scale, equal within a RoPE pair.
    key_mean, query_mean : (D,)
        Parallel in each RoPE pair, so that their product falls with distance.
    value_basis : (D, D)
    value_std : (D,)
    value_mean : (D,)
    topic_preference : (G, T)
        Per query head, how often it asks about each topic.
    retrieves : bool
    """

    basis: DoubleArray
    key_std: DoubleArray
    channel_scale: DoubleArray
    key_mean: DoubleArray
    query_mean: DoubleArray
    value_basis: DoubleArray
    value_std: DoubleArray
    value_mean: DoubleArray
    topic_preference: DoubleArray
    retrieves: bool


def draw_heads(spec: EnsembleSpec, seed: int) -> tuple[tuple[HeadModel, ...], ...]:
    """Draw the model: per layer its KV heads."""
    count = spec.num_layers * spec.num_kv_heads
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0]))
    retrieving = round(spec.retrieval_heads * count)
    if spec.retrieval_heads > 0.0 and spec.num_needles:
        retrieving = max(1, retrieving)
    chosen = set(rng.permutation(count)[: retrieving if spec.num_needles else 0].tolist())
    heads = [_draw_head(spec, rng, retrieves=index in chosen) for index in range(count)]
    return tuple(tuple(heads[start : start + spec.num_kv_heads]) for start in range(0, count, spec.num_kv_heads))


def _draw_head(spec: EnsembleSpec, rng: np.random.Generator, *, retrieves: bool) -> HeadModel:
    dim = spec.head_dim
    key_mean, query_mean = _means(spec, rng)
    return HeadModel(
        basis=_key_basis(spec, rng),
        key_std=_key_std(spec, rng),
        channel_scale=_channel_scale(spec, rng),
        key_mean=key_mean,
        query_mean=query_mean,
        value_basis=_orthonormal(rng, dim),
        value_std=np.sqrt(power_law(dim, spec.value_spectrum_exponent)),
        value_mean=spec.value_mean * rng.standard_normal(dim),
        topic_preference=_preferences(spec, rng),
        retrieves=retrieves,
    )


def power_law(dim: int, exponent: float) -> DoubleArray:
    """Eigenvalues i ** -exponent with mean 1."""
    values = np.arange(1, dim + 1, dtype=np.float64) ** -exponent
    return np.asarray(values / values.mean())


def slow_channels(spec: EnsembleSpec) -> NDArray[np.int64]:
    """Channels of the pairs that RoPE turns least."""
    half, slow = spec.head_dim // 2, spec.slow_channels // 2
    pairs = np.arange(half - slow, half)
    return np.concatenate((pairs, pairs + half))


def _orthonormal(rng: np.random.Generator, dim: int) -> DoubleArray:
    turned, triangle = np.linalg.qr(rng.standard_normal((dim, dim)))
    return np.asarray(turned * np.sign(np.diag(triangle)))


def _key_basis(spec: EnsembleSpec, rng: np.random.Generator) -> DoubleArray:
    """Columns within slow channels first, then columns within fast ones: RoPE mixes the latter only."""
    slow = slow_channels(spec)
    fast = np.setdiff1d(np.arange(spec.head_dim), slow)
    basis = np.zeros((spec.head_dim, spec.head_dim))
    basis[np.ix_(slow, np.arange(len(slow)))] = _orthonormal(rng, len(slow))
    basis[np.ix_(fast, np.arange(len(slow), spec.head_dim))] = _orthonormal(rng, len(fast))
    return basis


def _key_std(spec: EnsembleSpec, rng: np.random.Generator) -> DoubleArray:
    """Deal the spectrum out: topics get the largest eigenvalues, markers middling ones, all others any."""
    dim, markers = spec.head_dim, spec.num_needles + 1
    middling = rng.permutation(np.arange(max(spec.num_topics, dim // 4), 3 * dim // 4))[:markers]
    taken = np.concatenate((np.arange(spec.num_topics), middling))
    others = rng.permutation(np.setdiff1d(np.arange(dim), taken))
    ranks = np.concatenate((taken, others))
    return np.asarray(np.sqrt(power_law(dim, spec.key_spectrum_exponent)[ranks]))


def _channel_scale(spec: EnsembleSpec, rng: np.random.Generator) -> DoubleArray:
    half = spec.head_dim // 2
    scale = np.ones(half)
    scale[rng.permutation(half)[: spec.heavy_pairs]] = spec.heavy_channel_scale
    return np.concatenate((scale, scale))


def _means(spec: EnsembleSpec, rng: np.random.Generator) -> tuple[DoubleArray, DoubleArray]:
    """Give means whose product in each pair is one amplitude: over RoPE's log-spaced pairs the logit falls as -log lag.

    The sum over pairs of A cos(w lag) counts the pairs with w < 1 / lag, so it falls by A per pair, and pairs are
    2 ln(theta) / D apart in ln w; the logit is -(A D / (2 ln theta)) ln(lag).
    """
    half = spec.head_dim // 2
    angle = rng.uniform(0.0, 2 * np.pi, half)
    direction = np.concatenate((np.cos(angle), np.sin(angle)))
    amplitude = spec.recency_exponent * np.log(spec.rope_theta) / half * np.sqrt(spec.head_dim)
    key_amplitude = spec.key_mean * np.sqrt(2.0)
    carried = key_amplitude if key_amplitude > 0.0 else 1.0
    return key_amplitude * direction, amplitude / carried * direction


def _preferences(spec: EnsembleSpec, rng: np.random.Generator) -> DoubleArray:
    weights = 1.0 / np.arange(1, spec.num_topics + 1)
    rows = [rng.permutation(weights / weights.sum()) for _ in range(spec.group_size)]
    return np.stack(rows)
