"""Codecs that rotate, and KVQuant: what their maths says of any cache, and what they are for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.codec import FixedWidth, StoredLayer
from kvsim.errors import InvalidSpec
from kvsim.numerics.lloyd_max import lloyd_max
from kvsim.tensors import FloatArray, KvTensors, LayerKv, Rope

HEADS, TOKENS, DIM = 4, 96, 128
FAMILIES = {
    "turboquant_mse": ("turboquant_mse:2", "turboquant_mse:2.5", "turboquant_mse:3", "turboquant_mse:3.5",
                       "turboquant_mse:4"),
    "turboquant_prod": ("turboquant_prod:2", "turboquant_prod:3", "turboquant_prod:4", "turboquant_prod:5"),
    "vllm": ("turboquant_3bit_nc", "turboquant_4bit_nc"),
    "quarot": ("quarot-2", "quarot-3", "quarot-4"),
    "rotatekv": ("rotatekv-2", "rotatekv-3", "rotatekv-4"),
    "kvquant": ("kvquant-2", "kvquant-3", "kvquant-4"),
}  # fmt: skip
EVERY = tuple(name for names in FAMILIES.values() for name in names)
PER_HEAD = tuple(name for name in EVERY if not name.startswith("rotatekv"))


def cache(keys: FloatArray, values: FloatArray, rope: Rope | None = None) -> KvTensors:
    heads, tokens, dim = keys.shape
    positions = np.broadcast_to(np.arange(tokens), (heads, tokens)).copy()
    none = np.zeros((heads, 0, dim), dtype=np.float32)
    return KvTensors((LayerKv(keys, values, positions, none, none),), rope, dim**-0.5, "made for a test")


def noise(seed: int = 0, *, heads: int = HEADS, tokens: int = TOKENS, dim: int = DIM) -> KvTensors:
    rng = np.random.default_rng((seed, 2))
    return cache(*(rng.standard_normal((heads, tokens, dim)).astype(np.float32) for _ in range(2)))


def heavy(seed: int = 0, *, share: float = 0.125, factor: float = 8.0) -> KvTensors:
    """Some channels of each head are larger than the others by a factor."""
    plain, rng = noise(seed).layers[0], np.random.default_rng(7)
    size = np.ones((HEADS, 1, DIM), dtype=np.float32)
    for head in range(HEADS):
        size[head, 0, rng.permutation(DIM)[: int(share * DIM)]] = factor
    return cache(plain.keys * size, plain.values * size)


def store(name: str, kv: KvTensors, samples: Sequence[KvTensors] | None = None) -> StoredLayer:
    codec = parse_compression(name).encoding.codec()
    if codec.needs_calibration:
        codec = codec.fit([noise(1), noise(2)] if samples is None else samples)
    return codec.store(kv)[0]


def error(found: FloatArray, wanted: FloatArray) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_error_falls_as_bits_grow(family: str) -> None:
    kv = noise()
    stored = [store(name, kv) for name in FAMILIES[family]]
    bits = [one.payload_bits + one.metadata_bits for one in stored]
    assert bits == sorted(bits)
    for tensor in ("keys", "values"):
        errors = [error(getattr(one, tensor), getattr(kv.layers[0], tensor)) for one in stored]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", PER_HEAD)
def test_permuting_heads_permutes_what_is_stored(name: str) -> None:
    order = np.array([2, 0, 3, 1])

    def permuted(kv: KvTensors) -> KvTensors:
        return cache(kv.layers[0].keys[order], kv.layers[0].values[order])

    plain = store(name, noise())
    moved = store(name, permuted(noise()), [permuted(noise(1)), permuted(noise(2))])
    assert moved.payload_bits == plain.payload_bits
    assert moved.keys == pytest.approx(plain.keys[order], abs=2e-5)
    assert moved.values == pytest.approx(plain.values[order], abs=2e-5)


@pytest.mark.parametrize("name", EVERY)
def test_scaling_scales_what_is_stored(name: str) -> None:
    """By a power of two, so that rounding to fp16 scales as well."""

    def scaled(kv: KvTensors) -> KvTensors:
        return cache(kv.layers[0].keys * 4, kv.layers[0].values * 4)

    plain, large = store(name, noise()), store(name, scaled(noise()), [scaled(noise(1)), scaled(noise(2))])
    assert large.keys == pytest.approx(4 * plain.keys, rel=1e-4, abs=1e-4)
    assert large.values == pytest.approx(4 * plain.values, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_symbols_are_the_payload(name: str) -> None:
    stored = store(name, noise())
    for symbols in stored.symbols:
        assert symbols.codes.dtype == np.int32
        assert 0 <= symbols.codes.min() <= symbols.codes.max() < symbols.levels
        assert symbols.codes.shape[0] == HEADS
    assert {symbols.tensor for symbols in stored.symbols} == {"key", "value"}
    assert sum(FixedWidth().coded_bits(symbols) for symbols in stored.symbols) == stored.payload_bits


@pytest.mark.parametrize("name", [*EVERY, "turboquant_mse:1", "turboquant_prod:1", "turboquant_prod:1.5"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_short_and_empty_caches(name: str, tokens: int) -> None:
    kv = noise(tokens=tokens)
    stored = store(name, kv)
    assert stored.keys.shape == stored.values.shape == (HEADS, tokens, DIM)
    assert np.isfinite(stored.keys).all()


@pytest.mark.parametrize("name", EVERY)
def test_zeros_are_stored_as_zeros(name: str) -> None:
    zeros = np.zeros((HEADS, 30, DIM), dtype=np.float32)
    kv = cache(zeros, zeros)
    stored = store(name, kv, [kv])
    assert np.abs(stored.keys).max() < 1e-6
    assert np.abs(stored.values).max() < 1e-6


def test_rotation_makes_heavy_channels_as_good_as_noise() -> None:
    """TurboQuant's distortion is that of the codebook, whatever the vectors are like."""
    for kv in (noise(), heavy(factor=30.0)):
        stored = store("turboquant_mse:3", kv)
        found = error(stored.keys, kv.layers[0].keys)
        assert found == pytest.approx(lloyd_max(3, DIM).distortion, rel=0.03)


def test_outlier_channels_get_the_extra_bit() -> None:
    """2.25 bits with the energy in a quarter of the channels come close to 3 bits for all, in relative error."""
    kv = heavy(share=0.25, factor=20.0)
    split, low, high = (error(store(f"turboquant_mse:{bits}", kv).keys, kv.layers[0].keys) for bits in (2.25, 2, 3))
    assert split < 1.15 * high < 0.5 * low


def test_a_split_is_two_instances_of_their_own() -> None:
    kv = noise()
    stored = store("turboquant_mse:2.25", kv)
    assert [(symbols.codes.shape[2], symbols.levels) for symbols in stored.symbols] == 2 * [(32, 8), (96, 4)]
    mask_bits = 2 * HEADS * DIM
    assert stored.metadata_bits == 2 * HEADS * TOKENS * 2 * 16 + mask_bits


def test_key_errors_of_algorithm_2_are_larger_and_unbiased() -> None:
    """Its read-back is farther off, pi/2 D(b - 1), but its slope is 1 where Algorithm 1's is 1 - D(b)."""
    kv = noise(tokens=512)
    keys = kv.layers[0].keys
    for bits in (2, 3, 4):
        mse, prod = (store(f"turboquant_{algorithm}:{bits}", kv).keys for algorithm in ("mse", "prod"))
        assert error(prod, keys) == pytest.approx(math.pi / 2 * lloyd_max(bits - 1, DIM).distortion, rel=0.03)
        slopes = [float((found * keys).sum() / (keys * keys).sum()) for found in (mse, prod)]
        assert slopes == pytest.approx([1 - lloyd_max(bits, DIM).distortion, 1.0], abs=0.012)


@pytest.mark.parametrize("name", ["turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"])
def test_vllms_norm_correction_keeps_the_length_of_keys(name: str) -> None:
    kv = noise()
    lengths = (np.linalg.norm(keys, axis=2) for keys in (store(name, kv).keys, kv.layers[0].keys))
    assert next(lengths) == pytest.approx(next(lengths), rel=6e-4)


def test_vllms_plain_hadamard_is_no_random_rotation() -> None:
    """Keys along one of its rows all come to lie in one coordinate; random signs make that unlikely."""
    from kvsim.numerics.hadamard import hadamard_matrix

    rng = np.random.default_rng(3)
    keys = hadamard_matrix(DIM)[5] * rng.uniform(1, 2, (HEADS, TOKENS, 1)).astype(np.float32)
    kv = cache(keys, keys)
    plain, random = (error(store(name, kv).keys, keys) for name in ("turboquant_4bit_nc", "turboquant_mse:4"))
    assert random < 0.02
    assert plain > 3 * random


def roped(shift: float) -> Callable[[int], KvTensors]:
    """Caches whose keys have channels with a mean of their own before RoPE turns them."""
    rope = Rope.plain(DIM, 10_000.0)
    offset = (shift * np.random.default_rng(11).standard_normal((HEADS, 1, DIM))).astype(np.float32)

    def made(seed: int) -> KvTensors:
        layer = noise(seed).layers[0]
        keys = rope.rotate(layer.keys + offset, layer.positions)
        return cache(keys.astype(np.float32), layer.values, rope)

    return made


@pytest.mark.parametrize(("name", "gain"), [("kvquant-3", 4.0), ("rotatekv-3", 1.1)])
def test_keys_are_better_stored_before_rope(name: str, gain: float) -> None:
    """Channels of unlike mean: known before RoPE, smeared over the plane of each pair after it."""
    made = roped(6.0)
    kv, samples = made(0), [made(1), made(2)]
    before = store(name, kv, samples)
    after = store(name, replace(kv, rope=None), [replace(sample, rope=None) for sample in samples])
    keys = kv.layers[0].keys
    assert gain * error(before.keys, keys) < error(after.keys, keys)


def test_kvquants_sparse_part_is_exact_and_of_fixed_size() -> None:
    kv = noise()
    layer = kv.layers[0]
    keys, values = layer.keys.copy(), layer.values.copy()
    keys[1, 7, 3], values[2, 9, 5], values[2, 9, 6] = 500.0, 300.0, -200.0
    stored = store("kvquant-2", cache(keys, values))
    assert stored.keys[1, 7, 3] == 500.0
    assert (stored.values[2, 9, 5], stored.values[2, 9, 6]) == (300.0, -200.0)
    outliers = 2 * math.ceil(0.01 * HEADS * DIM)
    native_bits = 2 * HEADS * DIM * 16
    assert stored.metadata_bits == (TOKENS - 1) * (32 * outliers + 32 + 32) + native_bits


def test_a_token_unlike_all_others_is_not_clipped() -> None:
    """Keys' outliers are 1 % of the cache and not of each token, so that one token may have many."""
    kv = noise()
    keys = kv.layers[0].keys.copy()
    keys[:, 50, ::16] += 20.0
    stored = store("kvquant-3", cache(keys, kv.layers[0].values))
    assert error(stored.keys[:, 50], keys[:, 50]) < 0.01


def test_outliers_kept_apart_help_and_so_does_a_fitted_codebook() -> None:
    """On heavy-tailed numbers; uniform levels (KIVI's) are what k-means starts to beat at 2 bits."""
    rng = np.random.default_rng(5)

    def tailed() -> KvTensors:
        return cache(*(rng.standard_t(3, (HEADS, TOKENS, DIM)).astype(np.float32) for _ in range(2)))

    kv, samples = tailed(), [tailed() for _ in range(3)]
    with_sparse, without = (store(f"kvquant-3(outlier_share={share})", kv, samples) for share in (0.01, 0))
    for tensor in ("keys", "values"):
        wanted = getattr(kv.layers[0], tensor)
        assert error(getattr(with_sparse, tensor), wanted) < 0.5 * error(getattr(without, tensor), wanted)


def test_sinks_stay_exact() -> None:
    kv = noise()
    layer = kv.layers[0]
    values = layer.values.copy()
    values[:, [40, 77]] *= 0.001
    for name, exact in (("rotatekv-2", (0, 1, 2, 3, 40, 77)), ("kvquant-2", (0,))):
        stored = store(name, cache(layer.keys, values))
        for token in exact:
            assert np.array_equal(stored.keys[:, token], layer.keys[:, token])
            assert np.array_equal(stored.values[:, token], values[:, token])
    exact = (store("rotatekv-2", kv).keys == layer.keys).all(axis=(0, 2))
    assert exact.sum() == 20


def test_sorted_channels_share_ranges_better() -> None:
    """RotateKV's order: with calibrated sums far apart, groups of like channels span less than groups by index."""
    made = roped(0.0)(0)
    rng = np.random.default_rng(13)
    # Rows of the Hadamard matrix over all four heads: after the rotation single channels have large means.
    from kvsim.numerics.hadamard import rotate

    means = rotate((20.0 * (rng.random(HEADS * DIM) < 0.3)).astype(np.float32)).reshape(HEADS, 1, DIM)

    def shifted(seed: int) -> KvTensors:
        layer = noise(seed).layers[0]
        return cache(layer.keys + means, layer.values)

    kv = shifted(0)
    fitted = store("rotatekv-2", kv, [shifted(1), shifted(2)])
    unfitted = store("rotatekv-2", kv, [made])
    wanted = kv.layers[0].keys
    assert error(fitted.keys, wanted) < 0.5 * error(unfitted.keys, wanted)


@pytest.mark.parametrize("name", ["kvquant-3", "rotatekv-2"])
def test_calibration_is_asked_for(name: str) -> None:
    codec = parse_compression(name).encoding.codec()
    assert codec.needs_calibration
    with pytest.raises(InvalidSpec, match="calibrat"):
        codec.fit([])
    with pytest.raises(InvalidSpec, match="must be fitted"):
        codec.store(noise())
