"""Measured covariances, points against limits, and the answer as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import pytest
from limit_cases import gaussian_cache

from kvsim.compression import STRATEGIES, Compression, parse_compression
from kvsim.compression.codec import Codec, LayerCodec, NoReductionCodec, StoredLayer
from kvsim.errors import InvalidSpec
from kvsim.limit import default_strategies, find_limit
from kvsim.limit.covariance import covariance_limit
from kvsim.limit.points import EncodingPoint, place
from kvsim.limit.rate_distortion import Spectrum, isotropic_distortion
from kvsim.quality.store import FittedStrategy
from kvsim.tensors import KvTensors, LayerKv, Rope

FALLING = 4.0 ** -np.arange(32)
LOW_RANK = np.where(np.arange(32) < 8, 4.0, 1e-8)


def place_codec(codec: Codec, caches: Sequence[KvTensors], samples: Sequence[KvTensors] = ()) -> EncodingPoint:
    """Place a codec that is no strategy of kvsim's."""
    plain = Compression()
    fitted = FittedStrategy(plain, plain.selection.selector(), NoReductionCodec(), codec.fit(samples))
    return place(plain, fitted, caches, covariance_limit(caches), covariance_limit(caches, "layer"))


class Grid(LayerCodec):
    """Uniform numbers over a vector's range, and 32 bits of scale for each vector."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        keys, values = self._rounded(layer.keys), self._rounded(layer.values)
        vectors = 2 * layer.num_kv_heads * layer.num_tokens
        return StoredLayer(keys, values, float(self.bits * (keys.size + values.size)), 32.0 * vectors)

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        low = array.min(axis=-1, keepdims=True)
        step = (array.max(axis=-1, keepdims=True) - low) / (2**self.bits - 1)
        return (low + step * np.round((array - low) / step)).astype(np.float32)


class KeepPrincipal(LayerCodec):
    """The best `rank` coordinates of the samples' covariance, in 16 bits each."""

    needs_calibration = True

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.axes: list[np.ndarray] = []

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        for index in range(samples[0].num_layers):
            rows = np.concatenate([one.layers[index].keys.reshape(-1, 32) for one in samples]).astype(np.float64)
            self.axes.append(np.linalg.eigh(rows.T @ rows)[1][:, -self.rank :])
        return self

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        axes = self.axes[index]
        keys, values = (((array @ axes) @ axes.T).astype(np.float32) for array in (layer.keys, layer.values))
        return StoredLayer(keys, values, 16.0 * self.rank * 2 * layer.num_kv_heads * layer.num_tokens)


@pytest.mark.parametrize("variances", [np.ones(32), FALLING, LOW_RANK])
@pytest.mark.parametrize("tokens", [256, 2048])
def test_the_true_limit_lies_between_both_estimates(variances: np.ndarray, tokens: int) -> None:
    truth = Spectrum.of(variances / variances.mean())
    found = covariance_limit([gaussian_cache(variances, tokens=tokens, heads=8)])
    for bits in (1.0, 2.0, 4.0):
        low, high = found.plug_in.distortion(bits), found.held_out.distortion(bits)
        assert low <= truth.distortion(bits) * 1.01, "sample eigenvalues understate the limit"
        assert truth.distortion(bits) <= high * 1.01, "held-out variances do not"
        assert low <= high


def test_more_tokens_close_the_gap_between_the_estimates() -> None:
    gaps = []
    for tokens in (256, 1024, 4096):
        found = covariance_limit([gaussian_cache(FALLING, tokens=tokens)])
        gaps.append(2.0 - found.plug_in.bits(found.held_out.distortion(2.0)))
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_several_caches_are_one_larger_one() -> None:
    parts = [gaussian_cache(FALLING, seed=seed, tokens=256) for seed in range(4)]
    assert covariance_limit(parts).components[0].num_tokens == 1024


def test_a_limit_does_not_change_with_scale_rotation_or_order_of_heads() -> None:
    cache = gaussian_cache(FALLING)
    layer = cache.layers[0]
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((32, 32)))[0]
    changed = LayerKv(
        (100.0 * layer.keys[::-1] @ turn).astype(np.float32),
        (0.01 * layer.values[::-1] @ turn).astype(np.float32),
        layer.positions, layer.queries, layer.prompt_queries,
    )  # fmt: skip
    one = covariance_limit([cache])
    other = covariance_limit([KvTensors((changed,), None, 1.0, "changed")])
    for bits in (1.0, 3.0):
        assert other.held_out.distortion(bits) == pytest.approx(one.held_out.distortion(bits), rel=1e-3)


def test_a_mean_costs_nothing() -> None:
    plain, shifted = (covariance_limit([gaussian_cache(mean=mean)]).held_out for mean in (0.0, 5.0))
    assert shifted.variance == pytest.approx(1 / 26, rel=0.05), "the mean holds 25 parts of 26"
    assert shifted.bits(0.001) < plain.bits(0.001) - 2.0


def test_heads_that_say_the_same_are_seen_by_the_layers_limit_alone() -> None:
    cache = gaussian_cache(heads=1)
    layer = cache.layers[0]
    twice = LayerKv(*(np.repeat(array, 2, axis=0) for array in (layer.keys, layer.values, layer.positions)),
                    np.zeros((2, 0, 32), np.float32), np.zeros((2, 0, 32), np.float32))  # fmt: skip
    caches = [KvTensors((twice,), None, 1.0, "twins")]
    single, joined = covariance_limit(caches), covariance_limit(caches, "layer")
    assert single.held_out.distortion(2.0) == pytest.approx(isotropic_distortion(2.0), rel=0.1)
    assert joined.held_out.distortion(2.0) == pytest.approx(isotropic_distortion(4.0), rel=0.2)


def test_keys_are_taken_before_rope_where_that_helps() -> None:
    plain = gaussian_cache(FALLING)
    rope = Rope.plain(32, 10_000.0)
    layer = plain.layers[0]
    turned = LayerKv(rope.rotate(layer.keys, layer.positions), layer.values, layer.positions, layer.queries,
                     layer.prompt_queries)  # fmt: skip
    unknown, known = (covariance_limit([KvTensors((turned,), which, 1.0, "turned")]) for which in (None, rope))
    assert not any(one.before_rope for one in unknown.components)
    assert {one.tensor for one in known.components if one.before_rope} == {"key"}
    assert known.only("key").held_out.distortion(2.0) < 0.9 * unknown.only("key").held_out.distortion(2.0)
    assert known.held_out.distortion(2.0) == pytest.approx(covariance_limit([plain]).held_out.distortion(2.0), rel=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_a_uniform_grid_on_isotropic_vectors_lies_above_every_limit(bits: int) -> None:
    point = place_codec(Grid(bits), [gaussian_cache()])
    assert point.applies == "isotropic"
    assert point.bits_per_value == bits + 1.0
    for gap in (point.gap_isotropic_bits, point.gap_head_bits, point.gap_layer_bits):
        assert gap is not None
        assert gap > 1.0, "the scales alone take a bit per value"


def test_low_rank_beats_the_isotropic_line_where_vectors_have_one() -> None:
    samples = [gaussian_cache(LOW_RANK, seed=seed) for seed in (1, 2)]
    point = place_codec(KeepPrincipal(8), [gaussian_cache(LOW_RANK)], samples)
    assert point.applies == "head covariance"
    assert point.gap_isotropic_bits is not None
    assert point.gap_head_bits is not None
    assert point.gap_isotropic_bits < 0 < point.gap_head_bits
    assert place_codec(KeepPrincipal(8), [gaussian_cache()], samples).applies == "isotropic"


@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_no_transform_learned_elsewhere_beats_the_covariances_limit(rank: int) -> None:
    samples = [gaussian_cache(FALLING, seed=seed) for seed in (1, 2)]
    point = place_codec(KeepPrincipal(rank), [gaussian_cache(FALLING)], samples)
    assert point.gap_head_bits is not None
    assert point.gap_head_bits > 0


def test_all_codecs_lie_above_four_to_the_minus_bits_on_rotated_gaussian_vectors() -> None:
    caches = [gaussian_cache(layers=6, head_dim=64, tokens=640)]
    samples = [gaussian_cache(layers=6, head_dim=64, tokens=640, seed=seed) for seed in (1, 2)]
    answer = find_limit(caches, samples)
    assert {point.strategy for point in answer.points} | {one.strategy for one in answer.not_measured} == set(
        default_strategies()
    )
    for point in answer.points:
        if point.relative_mse > 0:
            assert point.gap_isotropic_bits is not None
            assert point.gap_isotropic_bits > 0, point.strategy
            assert point.applies == "isotropic", point.strategy
        else:
            assert point.applies == "lossless"


def test_native_is_lossless_at_sixteen_bits_and_has_no_gap() -> None:
    (point,) = find_limit([gaussian_cache()], strategies=["native"]).points
    assert (point.bits_per_value, point.relative_mse, point.applies) == (16.0, 0.0, "lossless")
    assert point.gap_isotropic_bits is point.gap_head_bits is point.gap_layer_bits is None


def test_a_selection_gets_a_reason_instead_of_a_point() -> None:
    answer = find_limit([gaussian_cache()], strategies=["native", "snapkv", "snapkv+fp8"])
    assert [point.strategy for point in answer.points] == ["native"]
    assert [one.strategy for one in answer.not_measured] == ["snapkv", "snapkv+fp8"]
    assert all("drops or skips tokens" in one.reason for one in answer.not_measured)
    assert not {"snapkv", "quest", "streaming_llm"} & set(default_strategies())
    assert set(default_strategies()) <= set(STRATEGIES)
    assert all(parse_compression(name).keeps_all_tokens for name in default_strategies())
    assert "rdkv" not in default_strategies()


def test_curves_fall_and_lie_in_order() -> None:
    curve = find_limit([gaussian_cache(FALLING, heads=4)], strategies=[]).curve
    for name in ("isotropic", "sphere", "head", "head_plug_in", "layer", "layer_plug_in", "key", "value"):
        errors = np.array(getattr(curve, name))
        assert (np.diff(errors) < 0).all(), name
    assert (np.array(curve.head) <= np.array(curve.isotropic) * (1 + 1e-9)).all()
    assert (np.array(curve.head_plug_in) <= np.array(curve.head) * (1 + 1e-9)).all()


def test_answers_round_trip_through_json() -> None:
    from kvsim.limit import LimitAnswer

    answer = find_limit([gaussian_cache(FALLING)], strategies=["native"])
    assert LimitAnswer.model_validate_json(answer.model_dump_json()) == answer


def test_wrong_caches_are_refused_with_the_reason() -> None:
    with pytest.raises(InvalidSpec, match="at least 128 tokens"):
        find_limit([gaussian_cache(tokens=100)])
    with pytest.raises(InvalidSpec, match="of one model"):
        find_limit([gaussian_cache(), gaussian_cache(heads=3)])
    with pytest.raises(InvalidSpec, match="no KV tensors"):
        find_limit([])


def test_layers_that_a_format_exempts_are_left_out() -> None:
    caches = [gaussian_cache(layers=6, head_dim=64, tokens=640)]
    answer = find_limit(caches, strategies=["turboquant_4bit_nc"])
    if answer.points:
        assert answer.points[0].bits_per_value < 5, "four of six layers are native, and not counted"
    (refused,) = find_limit([gaussian_cache(layers=4, head_dim=64)], strategies=["turboquant_4bit_nc"]).not_measured
    assert "take more layers" in refused.reason or "does not run" in refused.reason
