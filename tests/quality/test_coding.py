"""Entropy codings over codes, and codecs that code for themselves: exact or bounded, and never below their entropy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvsim.compression import CODINGS, parse_compression
from kvsim.compression.codec import Symbols, fixed_width_bits
from kvsim.compression.coding.base import Coding
from kvsim.compression.encoding.cachegen_codec import CacheGenCodec, delta_bins
from kvsim.compression.encoding.kvtc_codec import KvtcCodec, logit_weights
from kvsim.compression.encoding.kvtc_transform import coded_bits, deflated_bits, make_transform
from kvsim.compression.encoding.lossless import coded_words, word_bits
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.numerics.entropy import empirical_entropy
from kvsim.quality.measure import compare_caches
from kvsim.quality.store import fit_strategy, store_cache
from kvsim.tensors import KvTensors, LayerKv, Rope
from kvsim.tensors.ensemble import draw, preset

Codings = [part() for part in CODINGS if part().kind != "fixed_width"]
STATIC = ("rans", "huffman")


def _symbols(seed: int = 0, levels: int = 16, tokens: int = 512, spread: float = 0.12) -> Symbols:
    codes = np.random.default_rng(seed).normal(levels / 2, spread * levels, (2, tokens, 64))
    return Symbols("key", np.clip(np.round(codes), 0, levels - 1).astype(np.int32), levels)


def smooth_cache(seed: int, *, tokens: int = 600, layers: int = 4, rank: int = 24) -> KvTensors:
    """Keys and values of few dimensions, with neighbouring tokens alike; other seeds share the model."""
    heads, dim = 2, 32
    model, rng = np.random.default_rng(99), np.random.default_rng(seed)
    positions = np.broadcast_to(np.arange(tokens), (heads, tokens)).copy()
    rope = Rope.plain(dim, 10_000.0)
    scale = np.arange(1, rank + 1) ** -0.7
    mixes = model.standard_normal((layers, 2, rank, heads * dim))
    noise = rng.standard_normal((tokens, rank))
    for token in range(1, tokens):
        noise[token] = 0.8 * noise[token - 1] + 0.6 * noise[token]
    made = []
    for layer in range(layers):
        keys, values = (
            ((noise * scale) @ mixes[layer, part] + 0.02 * rng.standard_normal((tokens, heads * dim)))
            .reshape(tokens, heads, dim).transpose(1, 0, 2).astype(np.float32)
            for part in (0, 1)
        )  # fmt: skip
        empty = np.zeros((0, 0, 0), dtype=np.float32)
        made.append(LayerKv(rope.rotate(keys, positions), values, positions, empty, empty))
    return KvTensors(tuple(made), rope, dim**-0.5, f"smooth, seed {seed}")


@pytest.fixture(scope="module")
def smooth() -> KvTensors:
    return smooth_cache(0)


@pytest.fixture(scope="module")
def smooth_samples() -> tuple[KvTensors, ...]:
    return tuple(smooth_cache(seed) for seed in (1, 2, 3))


def _error(before: KvTensors, after: KvTensors) -> float:
    pairs = list(zip(before.layers, after.layers, strict=True))
    lost = sum(float(np.sum((a.keys - b.keys) ** 2 + (a.values - b.values) ** 2)) for a, b in pairs)
    return lost / sum(float(np.sum(a.keys**2 + a.values**2)) for a, _ in pairs)


@pytest.mark.parametrize("coding", Codings, ids=lambda coding: coding.kind)
@pytest.mark.parametrize("levels", [4, 16, 256])
def test_coded_bits_lie_between_entropy_and_fixed_width(coding: Coding, levels: int) -> None:
    symbols = _symbols(levels=levels)
    bits = coding.coder().coded_bits(symbols)
    # Codes drawn independently: nobody finds more than the law of each channel, and a static table no more than its
    # head's. Tables, block offsets and lengths come on top.
    context = "head" if coding.kind in STATIC else "channel"
    entropy = empirical_entropy(symbols.codes, levels, context) * symbols.codes.size
    assert entropy < bits < fixed_width_bits(symbols) + 8
    if coding.kind != "huffman":
        assert bits < 1.16 * empirical_entropy(symbols.codes, levels) * symbols.codes.size


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_rans_is_within_two_percent_of_the_entropy_and_huffman_within_its_redundancy(levels: int) -> None:
    symbols = _symbols(levels=levels, tokens=1024)
    size, tables = symbols.codes.size, 2 * levels
    entropy = empirical_entropy(symbols.codes, levels, "head") * size
    rans, huffman = (parse_name(kind).coder().coded_bits(symbols) for kind in STATIC)
    assert entropy < rans < 1.02 * entropy + 13 * tables
    # Redundancy of a Huffman code: at most p_max + 0.0861 bits (Gallager, 1978); 32 bits for each 16 tokens of a head.
    often = np.bincount(symbols.codes.ravel()).max() / size
    assert entropy < huffman < entropy + (often + 0.0861 + 32 / (16 * 64)) * size + 4 * tables + 8


def parse_name(kind: str) -> Coding:
    return next(one for one in Codings if one.kind == kind)


@pytest.mark.parametrize("coding", Codings, ids=lambda coding: coding.kind)
def test_noise_stays_at_its_fixed_width_and_nothing_takes_nothing(coding: Coding) -> None:
    codes = np.random.default_rng(1).integers(0, 16, (2, 64, 32)).astype(np.int32)
    noise = Symbols("value", codes, 16)
    assert coding.coder().coded_bits(noise) == fixed_width_bits(noise) + 8
    assert coding.coder().coded_bits(Symbols("value", codes[:, :0], 16)) == 0.0


@pytest.mark.parametrize("coding", Codings, ids=lambda coding: coding.kind)
def test_equal_codes_take_next_to_nothing(coding: Coding) -> None:
    symbols = Symbols("key", np.full((2, 512, 32), 7, dtype=np.int32), 16)
    # Huffman's shortest code is one bit, and a block's offset is 32 bits for 512 codes.
    limit = 1.1 if coding.kind == "huffman" else 0.05
    assert coding.coder().coded_bits(symbols) < limit * symbols.codes.size


def test_channels_of_their_own_law_pay_off_for_the_coder_that_knows_them() -> None:
    codes = np.tile(np.arange(16, dtype=np.int32), (1, 2048, 1))
    codes = (codes + np.random.default_rng(0).integers(0, 2, codes.shape).astype(np.int32)) % 16
    symbols = Symbols("key", codes, 16)
    assert empirical_entropy(codes, 16, "channel") == pytest.approx(1.0, abs=0.01)
    assert parse_name("arithmetic").coder().coded_bits(symbols) < 1.15 * codes.size
    assert parse_name("rans").coder().coded_bits(symbols) > 3.9 * codes.size


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("rans", "native KV has none; lossless codes native KV"),
        ("lossless+rans", "an entropy coder of its own"),
        ("low_rank+kvtc", "published ratio of kvtc is of whole keys"),
        ("kvtc:12", "one of 8, 16, 32"),
        ("kvtc:some", "target ratio is one of"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(written: str, reason: str) -> None:
    with pytest.raises(InvalidSpec, match=reason):
        parse_compression(written)


@given(words=arrays(np.uint16, st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 6))))
@settings(max_examples=40)
def test_lossless_gives_back_every_bit(words: np.ndarray) -> None:
    for half in ("bf16", "fp16"):
        assert np.array_equal(coded_words(words, half), words)  # type: ignore[arg-type]
        # Coded exponents are decoded inside and compared; a table of few words costs more than it saves.
        assert word_bits(words, half) > 8 * words.size  # type: ignore[arg-type]


def test_lossless_takes_what_normal_numbers_leave(noise: KvTensors) -> None:
    stored = store_cache(fit_strategy(parse_compression("lossless")), noise)
    for before, after in zip(noise.layers, stored.kv.layers, strict=True):
        assert np.array_equal(before.keys.view(np.uint32), after.keys.view(np.uint32))
        assert np.array_equal(before.values.view(np.uint32), after.values.view(np.uint32))
    elements = sum(layer.keys.size + layer.values.size for layer in noise.layers)
    # The exponent of a standard normal number has 2.55 bits of entropy; sign and mantissa are 8.
    assert 10.55 < stored.total_bits / elements < 10.62


def test_lossless_refuses_what_no_sixteen_bits_hold(noise: KvTensors) -> None:
    layer = replace(noise.layers[0], keys=noise.layers[0].keys * np.float32(1 / 3))
    with pytest.raises(InvalidSpec, match="keys of layer 0 hold numbers that are neither bf16 nor fp16"):
        store_cache(fit_strategy(parse_compression("lossless")), replace(noise, layers=(layer,)))


def test_lossless_codes_fp16_too(noise: KvTensors) -> None:
    layer = noise.layers[0]
    halves = replace(
        layer,
        keys=(layer.keys * np.float32(1 / 3)).astype(np.float16).astype(np.float32),
        values=(layer.values * np.float32(1 / 3)).astype(np.float16).astype(np.float32),
    )
    stored = store_cache(fit_strategy(parse_compression("lossless")), replace(noise, layers=(halves,)))
    assert np.array_equal(stored.kv.layers[0].keys, halves.keys)
    assert 13.5 < stored.total_bits / (2 * halves.keys.size) < 13.7


def test_kvtc_keeps_its_budget_and_loses_more_with_less(
    smooth: KvTensors, smooth_samples: tuple[KvTensors, ...]
) -> None:
    errors = []
    for ratio in (8, 16, 32):
        codec = KvtcCodec(ratio, 4, 128).fit(smooth_samples)
        for run, *transforms in codec._runs:
            for transform in transforms:
                assert 0 < transform.bits_per_row <= 16 / ratio * len(run) * 64
                assert sum(group.size for group in transform.groups) == transform.down.shape[1]
                assert np.allclose(transform.up @ transform.down, np.eye(len(transform.up)), atol=1e-5)
                assert np.array_equal(transform.up, transform.down.T)
        strategy = fit_strategy(parse_compression(f"kvtc:{ratio}"), smooth_samples)
        stored = store_cache(strategy, smooth)
        coded = 2 * 2 * 32 * 4 * (600 - 132)
        native = 16 * 2 * 2 * 32 * 4 * 132
        # DEFLATE takes what the budget leaves of redundancy, never more than its frame on top.
        assert stored.total_bits - native < 1.01 * coded * 16 / ratio
        errors.append(_error(smooth, stored.kv))
    assert errors[0] < errors[1] < errors[2] < 0.5
    assert errors[0] < 0.01


def _lost(rows: np.ndarray, mean_bits: float, weights: np.ndarray | None = None) -> np.ndarray:
    transform = make_transform(rows, mean_bits, weights)
    return np.asarray(transform.decode(transform.encode(rows), len(rows)) - rows)


def test_kvtc_finds_the_rank_of_its_data_and_spends_bits_there() -> None:
    rng = np.random.default_rng(0)
    mix = np.linalg.qr(rng.standard_normal((64, 16)))[0]
    rows = (rng.standard_normal((2000, 16)) * 4 @ mix.T + 3.0).astype(np.float32)
    transform = make_transform(rows, 2.0)
    # 128 bits: one group of 16 components takes its scale and 6 bits each, and nothing is left outside of it.
    assert [(group.size, group.bits) for group in transform.groups] == [(16, 6)]
    assert transform.bits_per_row == 128
    lost = float(np.mean(_lost(rows, 2.0) ** 2)) * 64 / 16
    # Steps of a range over 63; the mean range of 16 normal numbers is 3.53 deviations (Tippett, 1925). A twelfth of its
    # square, and the variance of the range on top.
    step = 4 * 3.53 / 63
    assert step**2 / 12 * 0.8 < lost < step**2 / 12 * 1.2


def test_more_bits_never_lose_more(smooth_samples: tuple[KvTensors, ...]) -> None:
    layer = smooth_samples[0].layers[0]
    rows = layer.values.transpose(1, 0, 2).reshape(layer.num_tokens, -1)[:256]
    lost = [float(np.mean(_lost(rows, bits) ** 2)) for bits in (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
    assert all(more <= less * (1 + 1e-6) for less, more in itertools.pairwise(lost))
    assert lost[0] == pytest.approx(float(rows.var(axis=0).mean()), rel=1e-4)
    assert lost[-1] < 0.001 * lost[0]


def test_a_token_unlike_all_others_is_kept_as_well_as_they_are() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((2000, 64)) * np.linspace(4, 1, 64)).astype(np.float32)
    transform = make_transform(rows, 4.0)
    far = rows[:1] * 20
    lost = [
        float(np.sum((transform.decode(transform.encode(one), len(one)) - one) ** 2) / np.sum(one**2))
        for one in (rows, far)
    ]
    # Steps are each token's own: nothing is clipped. Three bits over the range of 64 normal numbers, 4.7 deviations,
    # lose (4.7 / 7)^2 / 12 = 0.038; the programme finds no worse.
    assert lost[0] < 0.04
    assert lost[1] < 2 * lost[0]


def test_kvtc_writes_the_bits_that_it_counts(smooth: KvTensors, smooth_samples: tuple[KvTensors, ...]) -> None:
    layer = smooth.layers[0]
    rows = layer.values.transpose(1, 0, 2).reshape(layer.num_tokens, -1)
    transform = make_transform(rows, 2.0)
    coded = transform.encode(rows)
    payload, scales = coded_bits(coded, transform.groups)
    assert scales == 32 * len(transform.groups) * len(rows)
    assert all(one.codes.min() >= 0 for one in coded)
    assert all(one.codes.max() < 1 << group.bits for one, group in zip(coded, transform.groups, strict=True))
    for one in coded:
        assert np.array_equal(one.scale, one.scale.astype(np.float16))
        assert np.array_equal(one.zero, one.zero.astype(np.float16))
    plain = transform.bits_per_row * len(rows) - scales
    assert 0.3 * plain < payload < 1.01 * plain
    stored = KvtcCodec(8, 4, 128).fit(smooth_samples).store(smooth)
    assert sum(one.metadata_bits for one in stored) == 32 * 596 * sum(
        len(transform.groups) for _, *both in KvtcCodec(8, 4, 128).fit(smooth_samples)._runs for transform in both
    )


def _with_queries(kv: KvTensors, seed: int) -> KvTensors:
    rng = np.random.default_rng(seed)
    layers = (replace(one, queries=rng.standard_normal((4, 20, 32)).astype(np.float32)) for one in kv.layers)
    return replace(kv, layers=tuple(layers))


def test_each_objective_is_the_better_one_by_its_own_measure() -> None:
    rng = np.random.default_rng(0)
    scale = np.arange(1, 65) ** -0.7
    turn = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    rows = (rng.standard_normal((2000, 64)) * scale @ turn.T).astype(np.float32)
    # What varies least is read most.
    weights = (turn * scale**-3) @ turn.T
    plain, weighted = _lost(rows, 2.0), _lost(rows, 2.0, weights)
    assert np.sum(plain**2) < np.sum(weighted**2)
    by_weight = [float(np.einsum("nc,cd,nd->", lost, weights, lost)) for lost in (plain, weighted)]
    assert by_weight[1] < 0.5 * by_weight[0]


def test_coding_keys_for_their_queries_loses_less_of_logits(smooth_samples: tuple[KvTensors, ...]) -> None:
    spec = preset("llama-like", num_layers=2, head_dim=64, num_tokens=512)
    asked, *samples = (draw(spec, 5, sequence=one) for one in range(3))
    logits = []
    for objective in ("kv", "kq"):
        stored = store_cache(fit_strategy(parse_compression(f"kvtc:16(objective={objective})"), samples), asked)
        logits.append(compare_caches(asked, stored).mean("logit_error"))
    assert logits[1] < 0.6 * logits[0]
    with pytest.raises(InvalidSpec, match="needs calibration caches with queries"):
        KvtcCodec(16, 4, 128, "kq").fit(smooth_samples)


def test_weighted_error_is_that_of_logits_without_rotation() -> None:
    cache = replace(_with_queries(smooth_cache(0), 0), rope=None)
    weights = logit_weights([cache], range(2))
    lost = np.random.default_rng(0).standard_normal((5, 2 * 64))
    by_head = lost.reshape(5, 2, 2, 32)
    direct = sum(
        float(np.sum((cache.layers[index].queries.reshape(2, 40, 32)[head] @ by_head[:, index, head].T) ** 2))
        for index in range(2)
        for head in range(2)
    )
    # One hundredth of the mean weight is added along every direction.
    assert direct < np.einsum("nc,cd,nd->", lost, weights, lost) < 1.1 * direct


def test_decorrelating_beats_quantising_channels_at_equal_bits(smooth_samples: tuple[KvTensors, ...]) -> None:
    layer = smooth_samples[0].layers[0]
    rows = layer.values.transpose(1, 0, 2).reshape(layer.num_tokens, -1)
    shuffled = np.random.default_rng(0).permuted(rows, axis=0)  # the same channels, independent of each other
    assert np.mean(_lost(rows, 2.0) ** 2) < 0.2 * np.mean(_lost(shuffled, 2.0) ** 2)


def test_kvtc_does_not_see_positions(smooth: KvTensors, smooth_samples: tuple[KvTensors, ...]) -> None:
    assert smooth.rope is not None
    codec = KvtcCodec(8, 4, 128).fit(smooth_samples)
    layers = []
    for layer in smooth.layers:
        keys = smooth.rope.rotate(smooth.rope.undo(layer.keys, layer.positions), layer.positions + 500)
        layers.append(replace(layer, keys=keys, positions=layer.positions + 500))
    moved = codec.store(replace(smooth, layers=tuple(layers)))
    for one, other, layer in zip(codec.store(smooth), moved, smooth.layers, strict=True):
        back = smooth.rope.undo(other.keys, layer.positions + 500)
        assert np.allclose(smooth.rope.undo(one.keys, layer.positions), back, atol=0.02 * np.abs(one.keys).max())
        assert np.array_equal(one.values, other.values)


def test_deflate_packs_components_of_equal_bits_together() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([8, 8, 4, 2, 2, 1])
    codes = (rng.random((1000, 6)) * (1 << bits)).astype(np.int32)
    assert bits.sum() * 1000 < deflated_bits(codes, bits) < 1.02 * bits.sum() * 1000
    assert deflated_bits(codes[:0], bits) == 0.0


def test_codecs_that_learn_offline_say_so(smooth: KvTensors, smooth_samples: tuple[KvTensors, ...]) -> None:
    for codec in (KvtcCodec(8, 4, 128), CacheGenCodec(10)):
        with pytest.raises(InvalidSpec, match="needs sample sequences"):
            codec.fit(())
        with pytest.raises(InvalidSpec, match="must be fitted"):
            codec.store(smooth)
    uneven = replace(smooth, layers=(smooth_cache(0, tokens=300).layers[0], *smooth.layers[1:]))
    with pytest.raises(NotRunnable, match="same number of tokens"):
        KvtcCodec(8, 4, 128).fit(smooth_samples).store(uneven)


def test_cachegen_is_finer_where_layers_are_early_and_at_anchors(
    smooth: KvTensors, smooth_samples: tuple[KvTensors, ...]
) -> None:
    assert [delta_bins(index, 32, "key") for index in (0, 9, 10, 31)] == [32, 32, 16, 16]
    assert [delta_bins(index, 32, "value") for index in (0, 1, 2, 31)] == [32, 32, 16, 16]
    stored = CacheGenCodec(10).fit(smooth_samples).store(smooth)
    lost = [np.abs(one.keys - layer.keys) for one, layer in zip(stored, smooth.layers, strict=True)]
    assert lost[0].mean() < 0.7 * lost[-1].mean()
    is_anchor = np.arange(600) % 10 == 0
    for one in lost:
        assert one[:, is_anchor].mean() < 0.4 * one[:, ~is_anchor].mean()


def test_cachegen_loses_little_of_tokens_like_their_anchor(smooth_samples: tuple[KvTensors, ...]) -> None:
    def repeated(kv: KvTensors) -> KvTensors:
        first = np.arange(600) // 10 * 10
        layers = (replace(one, keys=one.keys[:, first], values=one.values[:, first]) for one in kv.layers)
        return replace(kv, layers=tuple(layers))

    # A delta's step follows its largest channel, so what resembles the anchor is stored finer, not in fewer bits.
    lost = []
    for change in (lambda kv: kv, repeated):
        kv = change(smooth_cache(0))
        stored = CacheGenCodec(10).fit([change(one) for one in smooth_samples]).store(kv)
        lost.append(sum(float(np.sum((one.keys - was.keys) ** 2)) for one, was in zip(stored, kv.layers, strict=True)))
    assert lost[1] < 0.01 * lost[0]
