"""Merging on tensors: what goes where, what it leaves alone, and what it does to the output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.selection.d2o import layer_shares
from kvsim.compression.selection.prompt_attention import received_attention
from kvsim.numerics.merging import complement
from kvsim.quality.dropping import merge_values
from kvsim.quality.measure import kept_indices
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.tensors import KvTensors, LayerKv, attend
from tests.quality.conftest import noise_cache

WITHOUT = {
    "merging:0.5": "snapkv:0.5", "merging:0.75(scorer=pyramidkv)": "pyramidkv:0.75",
    "merging(rule=counts,compression_ratio=0.5)": "snapkv:0.5", "cam:0.5": "h2o:0.5", "cam:40": "h2o:40",
}  # fmt: skip
"""A method that merges -> the one that keeps the same tokens and does not."""


def _store(name: str, kv: KvTensors) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name)), kv)


@pytest.fixture(scope="module")
def repeated() -> KvTensors:
    """A prompt of 160 tokens, each twice: the second half has the keys and values of the first."""
    kv = noise_cache(11, layers=2, tokens=320)
    layers = []
    for layer in kv.layers:
        keys, values = (np.concatenate((one[:, :160], one[:, :160]), axis=1) for one in (layer.keys, layer.values))
        layers.append(replace(layer, keys=keys, values=values))
    return replace(kv, layers=tuple(layers))


@pytest.mark.parametrize("name", WITHOUT)
def test_the_same_tokens_stay_at_the_same_bytes(name: str, noise: KvTensors) -> None:
    merged, plain = _store(name, noise), _store(WITHOUT[name], noise)
    for one, other in zip(merged.kv.layers, plain.kv.layers, strict=True):
        assert np.array_equal(one.positions, other.positions)
        assert not np.array_equal(one.values, other.values)
        assert np.array_equal(one.keys, other.keys) == ("counts" not in name)
    if "counts" not in name:
        assert merged.bits == plain.bits
    else:
        entries = sum(layer.positions.size for layer in plain.kv.layers)
        assert merged.total_bits == plain.total_bits + 32 * entries


def test_equal_tokens_merge_without_loss_where_counts_are_kept(repeated: KvTensors) -> None:
    """Each distinct token is kept once at least, so nothing is lost: its weight is how often it was there."""
    half = parse_compression("merging(rule=counts,compression_ratio=0.5)").selection
    layers = []
    for layer in repeated.layers:
        kept = np.tile(np.arange(160, 320), (layer.num_kv_heads, 1))
        layers.append(half.merged(replace(repeated, layers=(layer,)), _first(layer), kept))
    for before, after in zip(repeated.layers, layers, strict=True):
        assert np.exp(after.log_weights) == pytest.approx(np.full(after.log_weights.shape, 2.0))
        old, new = (attend(one, repeated.attention_scale).outputs for one in (before, after))
        assert new == pytest.approx(old, abs=1e-6)


def _first(layer: LayerKv):  # type: ignore[no-untyped-def]
    from kvsim.compression.selector import layer_view

    return layer_view(noise_cache(1, layers=1, tokens=layer.num_tokens), 0)


@pytest.mark.parametrize("kept_newest", [160, 200, 310])
def test_equal_tokens_merge_without_change_of_what_stays(repeated: KvTensors, kept_newest: int) -> None:
    """Published rules keep no counts: values stay as they are, and so does attention among what is left."""
    for rule in ("norms", "counts"):
        selection = parse_compression(f"merging(rule={rule})").selection
        layer = repeated.layers[0]
        kept = np.tile(np.arange(320 - kept_newest, 320), (layer.num_kv_heads, 1))
        after = selection.merged(replace(repeated, layers=(layer,)), _first(layer), kept)
        assert after.values == pytest.approx(layer.take(kept).values, abs=1e-6)
        assert after.keys == pytest.approx(layer.take(kept).keys, abs=1e-6)


def test_d2o_leaves_equal_tokens_alone(repeated: KvTensors) -> None:
    stored = _store("d2o:240", repeated).kv
    for before, after in zip(repeated.layers, stored.layers, strict=True):
        twin = np.take_along_axis(before.values, (after.positions % 160)[..., None], axis=1)
        same = np.isclose(after.values, twin, atol=1e-5).all(axis=2)
        # A token whose twin is gone too may have gone elsewhere; the others merge with themselves.
        assert same.mean() > 0.9


def test_counts_add_up_to_the_tokens(noise: KvTensors) -> None:
    for layer in _store("merging(rule=counts,compression_ratio=0.75)", noise).kv.layers:
        weights = np.exp(layer.log_weights.astype(np.float64))
        # A cosine below 0 is below the threshold, and its token dropped.
        assert (weights.sum(axis=1) <= 320 + 1e-3).all()
        assert weights.sum(axis=1) == pytest.approx(np.full(2, 320), abs=3)
        assert np.allclose(weights, np.round(weights), atol=1e-4)


def test_a_threshold_of_one_merges_nothing(noise: KvTensors) -> None:
    merged, plain = _store("merging:0.5(similarity_threshold=1)", noise), _store("snapkv:0.5", noise)
    for one, other in zip(merged.kv.layers, plain.kv.layers, strict=True):
        assert np.array_equal(one.values, other.values)


def test_a_smaller_fraction_merges_fewer(noise: KvTensors) -> None:
    changed = []
    for fraction in (1.0, 0.5, 0.1):
        stored = _store(f"merging:0.5(merge_fraction={fraction})", noise).kv.layers[0]
        plain = _store("snapkv:0.5", noise).kv.layers[0]
        changed.append(int((stored.values != plain.values).any(axis=2).sum()))
    assert changed == sorted(changed, reverse=True)
    assert changed[0] > changed[2] > 0


def test_norm_weights_are_kvpress_rule(noise: KvTensors) -> None:
    """Against a plain loop over the rule as its docstring states it."""
    before, after = noise.layers[0], _store("merging:300", noise).kv.layers[0]
    kept = kept_indices(before, after)
    gone = complement(kept, 320)
    keys, values = before.keys[0].astype(np.float64), before.values[0].astype(np.float64)
    numerator, total = values[kept[0]].copy(), np.ones(300)
    for token in gone[0]:
        cosines = keys[kept[0]] @ keys[token] / np.linalg.norm(keys[kept[0]], axis=1) / np.linalg.norm(keys[token])
        target = int(cosines.argmax())
        size, other = np.linalg.norm(values[token]), np.linalg.norm(values[kept[0][target]])
        weight = max(cosines[target], 0) * size / (size + other)
        numerator[target] += weight * values[token]
        total[target] += weight
    # Merged values are rounded to bf16.
    assert after.values[0] == pytest.approx(numerator / total[:, None], rel=5e-3, abs=1e-4)


# --- CaM ------------------------------------------------------------------------------------------------------------


def test_cam_spreads_over_the_tokens_after(noise: KvTensors) -> None:
    """Against a plain loop over the paper's rule."""
    before, after = noise.layers[2], _store("cam:200(seed=3,merge_budget=16)", noise).kv.layers[2]
    plain = _store("h2o:200", noise).kv.layers[2]
    received = received_attention(before, noise.attention_scale)
    draws = np.random.default_rng((3, 2)).random(320)
    for head in range(2):
        kept = plain.positions[head]
        expected = plain.values[head].astype(np.float64)
        for token in complement(kept[None], 320)[0]:
            window = np.flatnonzero(kept > token)[:16]
            chance = received[head, token] / received[head, kept[window]].mean()
            if draws[token] < chance:
                expected[window] += before.values[head, token] / len(window)
        assert after.values[head] == pytest.approx(expected, rel=5e-3, abs=1e-4)


def test_seeds_draw_anew_and_equal_seeds_the_same(noise: KvTensors) -> None:
    one, again, other = (_store(f"cam:0.5(seed={seed})", noise).kv.layers[0].values for seed in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# --- D2O ------------------------------------------------------------------------------------------------------------


def test_d2o_gives_even_layers_more_of_the_same_total(noise: KvTensors) -> None:
    layers = list(noise.layers)
    # The first layer's window looks at few tokens.
    layers[0] = replace(layers[0], prompt_queries=8 * layers[0].prompt_queries)
    kv = replace(noise, layers=tuple(layers))
    kept = [layer.num_tokens for layer in _store("d2o:100", kv).kv.layers]
    assert sum(kept) == 600
    assert kept[0] < min(kept[1:])
    shares = layer_shares([received_attention(layer, kv.attention_scale) for layer in kv.layers])
    assert np.argmin(shares) == 0


def test_d2o_shares_are_equal_where_attention_is() -> None:
    assert layer_shares([np.ones((2, 8), np.float32)] * 3).tolist() == [1, 1, 1]


def test_d2o_weights_are_convex(noise: KvTensors) -> None:
    """(e x_s + sum e^u x_e) / (e + sum e^u): no entry leaves the box of all tokens."""
    for before, after in zip(noise.layers, _store("d2o:0.75", noise).kv.layers, strict=True):
        for name in ("key", "value"):
            old, new = before.tensor(name), after.tensor(name)
            assert (new <= old.max(axis=1, keepdims=True) + 1e-5).all()
            assert (new >= old.min(axis=1, keepdims=True) - 1e-5).all()


# --- theory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merging:0.5", "merging:0.75", "cam:0.5", "cam:0.75"])
def test_the_identity_of_merging_is_exact(name: str, noise: KvTensors) -> None:
    for before, after in zip(noise.layers, _store(name, noise).kv.layers, strict=True):
        weights = attend(before, noise.attention_scale).weights.astype(np.float64)
        group = before.group_size
        kept = np.zeros((before.num_kv_heads, 320), dtype=bool)
        np.put_along_axis(kept, after.positions, True, axis=1)
        merged = before.values.copy()
        np.put_along_axis(merged, after.positions[..., None], after.values, axis=1)
        values, folded, held = (np.repeat(one, group, axis=0) for one in (before.values, merged, kept))
        predicted, _ = merge_values(weights, values, np.broadcast_to(held[:, None], weights.shape), folded)
        moved = attend(before, noise.attention_scale).outputs - attend(after, noise.attention_scale).outputs
        assert predicted == pytest.approx(np.linalg.norm(moved, axis=-1), rel=1e-3, abs=1e-5)


def test_folding_in_the_mean_helps_up_to_twice_the_lost_mass() -> None:
    """With every kept value moved by w towards the plain mean u of dropped ones, the error is
    (m - w) (v_E - v_S) + w (v_E - u): least near w = m, and no better than none near w = 2 m."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((1, 400, 16)) + np.where(np.arange(400) < 100, 1.0, -1.0)[None, :, None]
    weights = rng.dirichlet(np.where(np.arange(400) < 100, 4.0, 0.2), size=(1, 50))
    is_kept = np.broadcast_to(np.arange(400) < 100, weights.shape)
    mass = weights[..., 100:].sum(axis=-1)
    dropped = values[:, 100:].mean(axis=1, keepdims=True)
    mean_kept = (weights[..., :100] @ values[:, :100]) / (1 - mass)[..., None]
    mean_dropped = (weights[..., 100:] @ values[:, 100:]) / mass[..., None]
    errors = {}
    for times in (0.0, 1.0, 2.0, 4.0):
        w = times * float(mass.mean())
        folded = (1 - w) * values + w * dropped
        errors[times], plain = merge_values(weights, values, is_kept, folded)
        formula = (mass - w)[..., None] * (mean_dropped - mean_kept) + w * (mean_dropped - dropped)
        assert errors[times] == pytest.approx(np.linalg.norm(formula, axis=-1), abs=1e-12)
        assert errors[0.0] == pytest.approx(plain)
    assert errors[1.0].mean() < 0.5 * errors[0.0].mean()
    assert errors[2.0].mean() > 0.8 * errors[0.0].mean()
    assert errors[4.0].mean() > 2 * errors[0.0].mean()
