"""Formulas beside simulation: where they hold, by what factor, and where they fail, which they say themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kvsim.quality.dropping import evict, random_eviction_error, truncation_bounds, truncation_error
from kvsim.quality.measure import compare_caches
from kvsim.quality.store import StoredCache
from kvsim.quality.theory import CAUTIONS, distortion, mse_bounds, predict_layer, qjl_logit_variance
from kvsim.tensors import KvTensors, attend
from kvsim.tensors.ensemble import draw, preset

CENTROIDS = {
    2: (0.4528, 1.5104), 3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}  # fmt: skip
"""Positive half of the Lloyd-Max quantiser of a standard normal."""
Quantise = Callable[[np.ndarray], np.ndarray]


def rotated(bits: int, seed: int = 5) -> Quantise:
    """Lloyd-Max after a random rotation, with exact norms: TurboQuant's first algorithm."""

    def quantise(vectors: np.ndarray) -> np.ndarray:
        dim = vectors.shape[-1]
        turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]
        norms = np.linalg.norm(vectors, axis=-1, keepdims=True) / np.sqrt(dim)
        levels = np.array(sorted([-one for one in CENTROIDS[bits]] + list(CENTROIDS[bits])))
        codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, vectors / norms @ turn)
        return ((levels[codes] @ turn.T) * norms).astype(np.float32)

    return quantise


def uniform(bits: int, axis: int) -> Quantise:
    """Uniform between least and greatest, per token (axis -1) or per channel over all tokens (axis 1)."""

    def quantise(vectors: np.ndarray) -> np.ndarray:
        least = vectors.min(axis=axis, keepdims=True)
        step = (vectors.max(axis=axis, keepdims=True) - least) / (2**bits - 1)
        return (least + np.round((vectors - least) / step) * step).astype(np.float32)

    return quantise


def _same(vectors: np.ndarray) -> np.ndarray:
    return vectors


def factors(kv: KvTensors, keys: Quantise, values: Quantise) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Measured over predicted variance of logits and energy of output error, per head; and what theory warns of."""
    layers = tuple(replace(layer, keys=keys(layer.keys), values=values(layer.values)) for layer in kv.layers)
    stored = StoredCache(replace(kv, layers=layers), (None,) * kv.num_layers, (0.0,) * kv.num_layers)
    seen = compare_caches(kv, stored).heads
    said = [
        predict_layer(before, kv.attention_scale, distortion(before, after))
        for before, after in zip(kv.layers, layers, strict=True)
    ]
    logit = np.concatenate([one.logit_error for one in said])
    output = np.concatenate([one.output_error for one in said])
    with np.errstate(divide="ignore", invalid="ignore"):
        logit_factor = (np.array([head.logit_error for head in seen]) / logit) ** 2
        output_factor = (np.array([head.output_error for head in seen]) / output) ** 2
    return logit_factor, output_factor, set().union(*(one for layer in said for one in layer.cautions))


@pytest.fixture(scope="module")
def plain() -> KvTensors:
    """Everyday attention over keys without heavy channels."""
    return draw(preset("llama-like", num_layers=2, heavy_channel_scale=1.0), 0)


@pytest.fixture(scope="module")
def heavy() -> KvTensors:
    return draw(preset("heavy-keys", num_layers=2), 0)


@pytest.fixture(scope="module")
def diffuse() -> KvTensors:
    return draw(preset("diffuse", num_layers=2, heavy_channel_scale=1.0), 0)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_logit_noise_of_rotated_keys_is_within_a_fifth(plain: KvTensors, bits: int) -> None:
    logit, _, _ = factors(plain, rotated(bits), _same)
    assert 0.85 < np.median(logit) < 1.15
    assert logit.min() > 0.75
    assert logit.max() < 1.3


def test_the_shrink_of_logits_is_the_distortion() -> None:
    """A centroid quantiser has c = D; leaving the shrink out would miss (D logit)^2."""
    kv = draw(preset("llama-like", num_layers=1, heavy_channel_scale=1.0), 1)
    layer = kv.layers[0]
    after = replace(layer, keys=rotated(2)(layer.keys))
    error = distortion(layer, after)
    assert error.key_error == pytest.approx(0.1175, abs=0.004)
    assert error.key_shrink == pytest.approx(error.key_error, abs=0.01)
    slope = [
        np.polyfit(old.ravel(), new.ravel(), 1)[0]
        for old, new in zip(
            attend(layer, kv.attention_scale).logits, attend(after, kv.attention_scale).logits, strict=True
        )
    ]
    assert np.mean(slope) == pytest.approx(1 - error.key_shrink.mean(), abs=0.03)


@pytest.mark.parametrize(("bits", "low", "high"), [(3, 0.4, 2.5), (4, 0.4, 2.5)])
def test_key_error_in_the_output_is_right_to_a_factor(plain: KvTensors, bits: int, low: float, high: float) -> None:
    """Few heads and tokens carry it, so single heads differ by more than the median."""
    _, output, cautions = factors(plain, rotated(bits), _same)
    assert low < np.median(output) < high
    assert "heavy keys" not in cautions


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("quantise", [rotated, lambda bits: uniform(bits, -1)], ids=["rotated", "per token"])
def test_value_error_per_token_is_within_a_fifth(
    plain: KvTensors, quantise: Callable[[int], Quantise], bits: int
) -> None:
    _, output, _ = factors(plain, _same, quantise(bits))
    assert 0.8 < np.median(output) < 1.2


def test_coherent_shrink_is_most_of_the_value_error_of_diffuse_attention(diffuse: KvTensors) -> None:
    """Independent errors average out over many tokens and D ||o|| does not: without it, 2 to 6 times too low."""
    quantise = rotated(2)
    _, output, cautions = factors(diffuse, _same, quantise)
    assert 0.85 < np.median(output) < 1.2
    assert "diffuse" in cautions
    layer = diffuse.layers[0]
    error = distortion(layer, replace(layer, values=quantise(layer.values)))
    unbiased = replace(error, value_shrink=np.zeros_like(error.value_shrink))
    both, noise = (
        (predict_layer(layer, diffuse.attention_scale, one).value_output_error ** 2).mean() for one in (error, unbiased)
    )
    assert 2 < both / noise < 6


# --- where formulas fail, and say so --------------------------------------------------------------------------------


def test_heavy_channels_break_the_logit_formula_both_ways(heavy: KvTensors) -> None:
    """Per channel, error sits where queries are small: 10 times too high. Per token, it is up to twice too low."""
    per_channel, _, cautions = factors(heavy, uniform(2, 1), _same)
    assert np.median(per_channel) < 0.15
    assert "heavy keys" in cautions
    per_token, _, cautions = factors(heavy, uniform(3, -1), _same)
    assert np.median(per_token) > 1.25
    assert cautions >= {"heavy keys", "large noise"}


def test_large_logit_noise_breaks_the_first_order(heavy: KvTensors) -> None:
    """Softmax saturates: at a logit noise of 2.5 the output error stops growing, and the formula does not."""
    _, output, cautions = factors(heavy, rotated(2), _same)
    assert np.median(output) < 0.8
    assert "large noise" in cautions
    kv = draw(preset("diffuse", num_layers=2), 0)
    _, output, cautions = factors(kv, uniform(2, -1), _same)
    assert np.median(output) > 5
    assert cautions >= {"large noise", "heavy keys"}


def test_values_that_share_a_direction_break_the_formula_for_diffuse_attention() -> None:
    """Equal vectors have equal errors: nothing averages out. 20 times too low."""
    kv = draw(preset("diffuse", num_layers=1, value_mean=3.0), 0)
    _, output, cautions = factors(kv, _same, uniform(2, -1))
    assert np.median(output) > 10
    assert "diffuse" in cautions


def test_sinks_break_the_formula_for_errors_that_tokens_share(plain: KvTensors) -> None:
    """A sink's small value gets the error of its whole channel, with half of the weight: 4 times too low."""
    _, output, cautions = factors(plain, _same, uniform(3, 1))
    assert np.median(output) > 3
    assert "quiet heavy tokens" in cautions


def test_nothing_is_predicted_and_nothing_warned_of_where_nothing_changes(plain: KvTensors) -> None:
    layer = plain.layers[0]
    said = predict_layer(layer, plain.attention_scale, distortion(layer, layer))
    assert not said.output_error.any()
    assert not said.logit_error.any()
    assert all(not one for one in said.cautions)
    assert set(CAUTIONS) == {"heavy keys", "diffuse", "quiet heavy tokens", "large noise"}


# --- TurboQuant's theorems ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_lies_between_the_bounds(bits: int) -> None:
    vectors = np.random.default_rng(bits).standard_normal((1, 4000, 128)).astype(np.float32)
    measured = ((rotated(bits)(vectors) - vectors) ** 2).sum() / (vectors**2).sum()
    least, greatest = mse_bounds(bits)
    assert least < measured < greatest


def test_signs_of_a_projection_give_unbiased_products_with_the_stated_variance() -> None:
    rng = np.random.default_rng(0)
    dim, draws = 64, 3000
    vector, query = rng.standard_normal((2, dim))
    estimates = []
    for _ in range(draws):
        projection = rng.standard_normal((dim, dim))
        signs = np.sign(projection @ vector)
        estimates.append(np.sqrt(np.pi / 2) / dim * np.linalg.norm(vector) * query @ (projection.T @ signs))
    bound = float(qjl_logit_variance(1.0, np.array(query @ query * (vector @ vector)), dim))
    assert np.mean(estimates) == pytest.approx(query @ vector, abs=4 * np.sqrt(bound / draws))
    assert 0.6 * bound < np.var(estimates) < 1.05 * bound


# --- dropping -------------------------------------------------------------------------------------------------------


def test_lost_mass_identity_is_exact_and_below_its_bound(plain: KvTensors) -> None:
    layer = plain.layers[0]
    rng = np.random.default_rng(0)
    full = attend(layer, plain.attention_scale)
    keep = np.broadcast_to(rng.random((1, 1, layer.num_tokens)) < 0.3, full.weights.shape)
    values = np.repeat(layer.values, layer.group_size, axis=0)
    found = evict(full.weights, values, keep)
    seen = attend(layer, plain.attention_scale, np.ascontiguousarray(keep)).outputs
    change = np.linalg.norm(seen.astype(np.float64) - full.outputs, axis=-1)
    assert found.output_change == pytest.approx(change, rel=1e-3, abs=1e-4)
    assert (found.output_change <= found.bound).all()
    nothing = evict(full.weights, values, np.ones_like(keep))
    assert not nothing.lost_mass.any()
    assert not nothing.output_change.any()


def test_random_eviction_is_predicted_where_no_token_rules(diffuse: KvTensors, plain: KvTensors) -> None:
    """Variance over K holds for diffuse attention; with sinks it is far too low, finite influence within a fifth."""
    for kv, plain_range, finite_range in ((diffuse, (0.9, 1.1), (0.9, 1.1)), (plain, (1.3, 50.0), (0.8, 1.25))):
        layer = kv.layers[0]
        full = attend(layer, kv.attention_scale)
        values = np.repeat(layer.values, layer.group_size, axis=0)
        kept, rng = layer.num_tokens // 4, np.random.default_rng(0)
        measured = []
        for _ in range(60):
            mask = np.zeros(layer.num_tokens, dtype=bool)
            mask[rng.permutation(layer.num_tokens)[:kept]] = True
            found = evict(full.weights, values, np.broadcast_to(mask, full.weights.shape))
            measured.append(found.output_change**2)
        by_variance, by_influence = random_eviction_error(full.weights, values, kept)
        assert plain_range[0] < np.mean(measured) / by_variance.mean() < plain_range[1]
        assert finite_range[0] < np.mean(measured) / by_influence.mean() < finite_range[1]


def test_truncation_is_bounded_by_what_it_drops(plain: KvTensors) -> None:
    layer = plain.layers[0]
    cut = {}
    for name in ("keys", "values"):
        left, sizes, right = np.linalg.svd(getattr(layer, name).astype(np.float64), full_matrices=False)
        cut[name] = ((left[..., :48] * sizes[:, None, :48]) @ right[:, :48]).astype(np.float32)
        change = ((cut[name][0] - getattr(layer, name)[0]) ** 2).sum() / (getattr(layer, name)[0] ** 2).sum()
        assert truncation_error(getattr(layer, name)[0], 48) == pytest.approx(change, rel=1e-4)
    bound_logits, bound_outputs = truncation_bounds(
        layer, plain.attention_scale, layer.keys - cut["keys"], layer.values - cut["values"]
    )
    full = attend(layer, plain.attention_scale)
    logits = attend(replace(layer, keys=cut["keys"]), plain.attention_scale).logits
    outputs = attend(replace(layer, values=cut["values"]), plain.attention_scale).outputs
    assert (np.abs(logits - full.logits) <= bound_logits + 1e-3).all()
    assert (np.linalg.norm(outputs - full.outputs, axis=-1) <= bound_outputs + 1e-3).all()
