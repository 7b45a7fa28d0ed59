"""One sequence of an ensemble: keys and values of its tokens, and queries that attend as the spec says."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray, FloatArray, IntArray
from kvsim.numerics.floats import round_bf16
from kvsim.tensors.ensemble.heads import HeadModel, draw_heads
from kvsim.tensors.ensemble.spec import EnsembleSpec
from kvsim.tensors.kv import KvTensors, LayerKv, Rope

MARKER: Final = 12.0
"""Coordinate of a marked key along its code, in units of an average channel's standard deviation."""
SINK_SPREAD: Final = 0.2
"""Sink mass runs evenly over the mean plus or minus this, query by query."""
NEWTON_STEPS: Final = 12


def draw(spec: EnsembleSpec, seed: int, *, sequence: int = 0, name: str = "ensemble") -> KvTensors:
    """Draw one sequence's cache with its queries; the same arguments give the same cache, called ``name``."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1, sequence]))
    rope = Rope.plain(spec.head_dim, spec.rope_theta)
    needles = _needle_positions(spec, rng)
    previous: tuple[DoubleArray, DoubleArray] | None = None
    layers = []
    for heads in draw_heads(spec, seed):
        latent = tuple(_latent(spec, rng, None if previous is None else previous[part]) for part in range(2))
        previous = (latent[0], latent[1])
        layers.append(_draw_layer(spec, heads, rope, rng, latent[0], latent[1], needles))
    return KvTensors(
        tuple(layers),
        rope,
        spec.head_dim**-0.5,
        f"{name}, model seed {seed}, sequence {sequence}",
        needles=tuple(int(position) for position in needles),
    )


def _needle_positions(spec: EnsembleSpec, rng: np.random.Generator) -> IntArray:
    """Anywhere but among sinks and the newest sixteenth, and before any query that may ask."""
    newest = max(spec.num_tokens // 16, spec.num_prompt_queries // 4)
    allowed = np.arange(spec.num_sinks, spec.num_tokens - newest)
    return np.sort(rng.permutation(allowed)[: spec.num_needles])


def _latent(spec: EnsembleSpec, rng: np.random.Generator, below: DoubleArray | None) -> DoubleArray:
    """Normal coordinates (H, n, D) of variance 1, correlated with the token before and the layer below."""
    noise = rng.standard_normal((spec.num_kv_heads, spec.num_tokens, spec.head_dim))
    if spec.token_correlation:
        carry, fresh = spec.token_correlation, np.sqrt(1 - spec.token_correlation**2)
        for token in range(1, spec.num_tokens):
            noise[:, token] = carry * noise[:, token - 1] + fresh * noise[:, token]
    if below is None:
        return noise
    return np.asarray(spec.layer_correlation * below + np.sqrt(1 - spec.layer_correlation**2) * noise)


def _draw_layer(
    spec: EnsembleSpec, heads: tuple[HeadModel, ...], rope: Rope, rng: np.random.Generator,
    key_latent: DoubleArray, value_latent: DoubleArray, needles: IntArray,
) -> LayerKv:  # fmt: skip
    positions = np.broadcast_to(np.arange(spec.num_tokens), (spec.num_kv_heads, spec.num_tokens)).copy()
    plain_keys = np.stack(
        [_keys(spec, head, rng, latent, needles) for head, latent in zip(heads, key_latent, strict=True)]
    )
    keys = round_bf16(rope.rotate(plain_keys.astype(np.float32), positions))
    values = np.stack([_values(spec, head, latent) for head, latent in zip(heads, value_latent, strict=True)])
    drawn = [_queries(spec, head, rope, rng, keys[index], needles) for index, head in enumerate(heads)]
    prompt, later = (np.concatenate([pair[part] for pair in drawn]) for part in range(2))
    return LayerKv(keys, round_bf16(values), positions, later, prompt)


def _keys(
    spec: EnsembleSpec, head: HeadModel, rng: np.random.Generator, latent: DoubleArray, needles: IntArray
) -> DoubleArray:
    """Keys of one head before RoPE, (n, D)."""
    coordinates = latent.copy()
    # An exponential law of logits is a power law of attention weights.
    coordinates[:, : spec.num_topics] = rng.standard_exponential((spec.num_tokens, spec.num_topics)) - 1.0
    coordinates *= head.key_std
    code = spec.num_topics + np.arange(spec.num_needles)
    sink = spec.num_topics + spec.num_needles
    sinks, marked = np.arange(spec.num_sinks), needles if head.retrieves else needles[:0]
    for tokens in (sinks, marked):
        coordinates[np.ix_(tokens, np.arange(sink + 1))] = 0.0
    coordinates[sinks, sink] = MARKER * np.where(sinks == 0, 1.0, 0.75)
    coordinates[marked, code[: len(marked)]] = MARKER
    keys: DoubleArray = (coordinates @ head.basis.T + head.key_mean) * head.channel_scale
    return keys


def _values(spec: EnsembleSpec, head: HeadModel, latent: DoubleArray) -> DoubleArray:
    values: DoubleArray = (latent * head.value_std) @ head.value_basis.T + head.value_mean
    values[: spec.num_sinks] *= spec.sink_value_scale
    return values


def _queries(
    spec: EnsembleSpec, head: HeadModel, rope: Rope, rng: np.random.Generator, keys: FloatArray, needles: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Queries of the prompt's end and of what comes after, (G, w, D) and (G, m, D), after RoPE."""
    window, later = spec.num_prompt_queries, spec.num_queries
    positions = np.arange(spec.num_tokens - window, spec.num_tokens + later)
    asks = np.arange(window + later) >= (window - window // 4 if spec.question_visible else window)
    plain = _plain_queries(spec, head, rng, len(positions))
    directions = np.stack([_sink_direction(spec, head, len(positions)), _needle_directions(spec, head, len(positions))])
    turned = rope.rotate((directions / head.channel_scale).astype(np.float32), positions)
    base = rope.rotate((plain / head.channel_scale).astype(np.float32), positions)
    visible = np.arange(spec.num_tokens) <= positions[:, None]
    wanted = _wanted(spec, needles, len(positions))
    masses = _masses(spec, rng, base.shape[:2], asks if head.retrieves else np.zeros_like(asks))
    scale = spec.head_dim**-0.5
    levels = _solve_masses(
        scale * base.astype(np.float64) @ keys.T, scale * turned.astype(np.float64) @ keys.T, visible, wanted, masses
    )
    queries = round_bf16(base + np.einsum("cgt,ctd->gtd", levels, turned))
    return queries[:, :window], queries[:, window:]


def _plain_queries(spec: EnsembleSpec, head: HeadModel, rng: np.random.Generator, count: int) -> DoubleArray:
    """Give what queries ask about before RoPE, without sink and needle: (G, t, D)."""
    root = np.sqrt(spec.head_dim)
    topics = np.stack([rng.choice(spec.num_topics, size=count, p=row) for row in head.topic_preference])
    content = (spec.attention_exponent * root / head.key_std[topics])[..., None] * head.basis.T[topics]
    noise = spec.query_noise * rng.standard_normal((spec.group_size, count, spec.head_dim))
    return np.asarray(content + noise + head.query_mean)


def _sink_direction(spec: EnsembleSpec, head: HeadModel, count: int) -> DoubleArray:
    return np.broadcast_to(head.basis[:, spec.num_topics + spec.num_needles], (count, spec.head_dim))


def _needle_directions(spec: EnsembleSpec, head: HeadModel, count: int) -> DoubleArray:
    """Give the code that each query looks for, in turn."""
    if not spec.num_needles:
        return np.zeros((count, spec.head_dim))
    return np.asarray(head.basis.T[spec.num_topics + np.arange(count) % spec.num_needles])


def _wanted(spec: EnsembleSpec, needles: IntArray, count: int) -> NDArray[np.bool_]:
    """Tokens that each query's sink and needle parts are to raise, (2, t, n)."""
    wanted = np.zeros((2, count, spec.num_tokens), dtype=bool)
    wanted[0, :, : spec.num_sinks] = True
    if spec.num_needles:
        wanted[1, np.arange(count), needles[np.arange(count) % spec.num_needles]] = True
    return wanted


def _masses(
    spec: EnsembleSpec, rng: np.random.Generator, shape: tuple[int, ...], asks: NDArray[np.bool_]
) -> DoubleArray:
    """Attention mass that sinks and the needle shall have, (2, G, t); 0 asks for nothing."""
    spread = min(SINK_SPREAD, spec.sink_mass / 2, (1 - spec.sink_mass) / 2)
    even = np.linspace(-spread, spread, int(np.prod(shape)))
    sinks = spec.sink_mass + rng.permutation(even).reshape(shape)
    if not spec.num_sinks:
        sinks = np.zeros(shape)
    return np.stack([sinks, np.where(asks, (1 - sinks) * spec.needle_mass, 0.0)])


def _solve_masses(
    base: DoubleArray, along: DoubleArray, visible: NDArray[np.bool_], wanted: NDArray[np.bool_], masses: DoubleArray
) -> DoubleArray:
    """Find how far to go along each direction, (2, G, t), so that wanted tokens get their masses.

    Newton's method on log odds, which are nearly linear, one direction at a time. ``base``: (G, t, n); ``along``,
    ``wanted``: (2, t, n).
    """
    levels = np.zeros(masses.shape)
    share = masses / np.maximum(1e-12, 1.0 - masses.sum(axis=0))
    asked = np.any(masses > 0.0, axis=1, keepdims=True).swapaxes(1, 2)
    rest: NDArray[np.bool_] = np.all(~(wanted & asked), axis=0)
    # A query that sees nothing but what it wants (the very first) has no odds to set.
    active = (masses > 0.0) & (rest & visible).any(axis=-1)
    for _ in range(NEWTON_STEPS):
        logits = np.where(visible, base + np.einsum("cgt,ctn->gtn", levels, along), -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        outside = (weights * rest).sum(axis=-1)
        for part in range(2):
            inside = (weights * wanted[part]).sum(axis=-1)
            slope = _mean(weights, wanted[part], along[part]) - _mean(weights, rest, along[part])
            log_odds = np.log(np.maximum(inside, 1e-300)) - np.log(np.maximum(outside, 1e-300))
            step = (np.log(np.maximum(share[part], 1e-12)) - log_odds) / np.maximum(slope, 0.2)
            levels[part] += np.where(active[part], np.clip(step, -4.0, 4.0), 0.0)
    return levels


def _mean(weights: DoubleArray, chosen: NDArray[np.bool_], values: DoubleArray) -> DoubleArray:
    """Weighted mean of ``values`` over chosen tokens."""
    some = weights * chosen
    return np.asarray((some * values).sum(axis=-1) / np.maximum(some.sum(axis=-1), 1e-300))
