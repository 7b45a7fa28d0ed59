"""Laws of the integer and floating-point formats, each stored whole, without selection or residual window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.compression.codec import FixedWidth, StoredLayer
from kvsim.errors import InvalidSpec
from kvsim.numerics.hadamard import rotate
from kvsim.numerics.uniform import pack_codes, unpack_codes
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.tensors import KvTensors, LayerKv

PLAIN_GGML = tuple(f"{form}(hadamard=false)" for form in ("q8_0", "q5_1", "q4_0"))
FORMATS = (
    "fp8", "fp8_e5m2", "fp8_per_head", "fp8(scale=calibrated)", "fp8_per_token_head", "int8_per_token_head",
    "int4_per_token_head", "q8_0", "q5_1", "q4_0", "q8_0/q4_0", "q8_0(key_type=q5_0,value_type=q4_1)", *PLAIN_GGML,
    "nvfp4", "mxfp4", "kivi-4", "kivi-2", "kv_adaquant", "kv_adaquant:2/4", "kv_adaquant:8/3",
    "kv_adaquant(key_groups=channel)",
)  # fmt: skip


def _draw(seed: int, heads: int = 2, tokens: int = 64, dim: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((heads, tokens, dim)).astype(np.float32)


def _cache(keys: np.ndarray, values: np.ndarray) -> KvTensors:
    heads, tokens, dim = keys.shape
    nothing = np.zeros((heads, 0, dim), dtype=np.float32)
    positions = np.broadcast_to(np.arange(tokens), (heads, tokens)).copy()
    layer = LayerKv(keys.astype(np.float32), values.astype(np.float32), positions, nothing, nothing)
    return KvTensors((layer,), None, dim**-0.5, "drawn")


def _store(name: str, kv: KvTensors, samples: Sequence[KvTensors] = ()) -> StoredLayer:
    codec = parse_compression(name).encoding.codec()
    return (codec.fit(samples or [kv]) if codec.needs_calibration else codec).store(kv)[0]


def _error(name: str, kv: KvTensors, samples: Sequence[KvTensors] = ()) -> tuple[float, float]:
    """Mean squared errors of K and of V over their mean squares."""
    stored, layer = _store(name, kv, samples), kv.layers[0]
    pairs = ((stored.keys, layer.keys), (stored.values, layer.values))
    return tuple(float(np.sum((read - true) ** 2) / np.sum(true**2)) for read, true in pairs)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def normal() -> KvTensors:
    return _cache(_draw(1, 4, 512), _draw(2, 4, 512))


@pytest.mark.parametrize("name", FORMATS)
@given(
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    dims=st.sampled_from([(128, 128), (64, 64), (96, 64), (192, 128), (20, 7), (40, 33), (64, 0)]),
)
@settings(max_examples=6, deadline=None)
def test_bits_are_what_pricing_says_for_any_shape(name: str, heads: int, groups: int, dims: tuple[int, int]) -> None:
    tokens = 64 * groups
    kv = _cache(_draw(0, heads, tokens, dims[0]), _draw(1, heads, tokens, dims[1]))
    stored = _store(name, kv)
    encoding = parse_compression(name).encoding
    group = LayerGroup(
        kind=LayerKind.FULL, layers=(0,), num_kv_heads=heads, k_head_dim=dims[0], v_head_dim=dims[1]
    )  # fmt: skip
    priced = encoding.bytes_per_token(group, Dtype.BF16)
    assert stored.payload_bits == pytest.approx(8 * tokens * priced.payload_bytes, rel=1e-12)
    assert stored.metadata_bits == pytest.approx(8 * tokens * priced.metadata_bytes, rel=1e-12)
    assert stored.keys.shape == kv.layers[0].keys.shape
    assert stored.values.shape == kv.layers[0].values.shape


@pytest.mark.parametrize("name", ["kivi-2", "kv_adaquant(key_groups=channel)"])
def test_tokens_beyond_the_last_whole_group_have_a_group_of_their_own(name: str) -> None:
    whole, more = (_cache(_draw(1, 2, tokens), _draw(2, 2, tokens)) for tokens in (64, 65))
    part = _cache(more.layers[0].keys[:, 64:], more.layers[0].values[:, 64:])
    one, two, both = (_store(name, kv) for kv in (whole, part, more))
    whole_again = _store(name, _cache(more.layers[0].keys[:, :64], more.layers[0].values[:, :64]))
    assert np.array_equal(both.keys, np.concatenate((whole_again.keys, two.keys), axis=1))
    assert both.metadata_bits == one.metadata_bits + two.metadata_bits


@pytest.mark.parametrize("name", FORMATS)
def test_heads_are_stored_alike_in_any_order(name: str) -> None:
    kv, order = _cache(_draw(1, 4), _draw(2, 4)), [2, 0, 3, 1]
    turned = _cache(kv.layers[0].keys[order], kv.layers[0].values[order])
    stored, permuted = _store(name, kv), _store(name, turned)
    assert np.array_equal(permuted.keys, stored.keys[order])
    assert np.array_equal(permuted.values, stored.values[order])
    assert (permuted.payload_bits, permuted.metadata_bits) == (stored.payload_bits, stored.metadata_bits)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("factor", [0.125, 4.0])
def test_a_power_of_two_goes_through_every_format(name: str, factor: float) -> None:
    """Steps are floats, so nothing changes but their exponent, as long as none of them is subnormal."""
    kv = _cache(1 + np.abs(_draw(1)), 1 + np.abs(_draw(2)))
    scaled = _cache(factor * kv.layers[0].keys, factor * kv.layers[0].values)
    stored, after = _store(name, kv), _store(name, scaled)
    assert np.array_equal(after.keys, np.float32(factor) * stored.keys)
    assert np.array_equal(after.values, np.float32(factor) * stored.values)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    zeros = _cache(np.zeros((2, 64, 64)), np.zeros((2, 64, 64)))
    stored = _store(name, zeros)
    assert not stored.keys.any()
    assert not stored.values.any()


@pytest.mark.parametrize("name", ["fp8", "kivi-2", "kv_adaquant", "q5_1(hadamard=false)", "q4_0(hadamard=false)"])
@pytest.mark.parametrize("constant", [1.5, -0.75, 3.25])
def test_constant_vectors_are_exact_where_the_format_holds_the_constant(name: str, constant: float) -> None:
    kv = _cache(np.full((1, 64, 64), constant), np.full((1, 64, 64), constant))
    stored = _store(name, kv)
    assert np.array_equal(stored.keys, kv.layers[0].keys)
    assert np.array_equal(stored.values, kv.layers[0].values)


@pytest.mark.parametrize(
    "ladder",
    [
        ("kivi-2", "kivi-4"),
        ("kv_adaquant:2/2", "kv_adaquant:3/3", "kv_adaquant:4/4", "kv_adaquant:8/8"),
        ("q4_0", "q8_0(key_type=q5_0,value_type=q5_0)", "q8_0"),
        ("q8_0(key_type=q4_1,value_type=q4_1)", "q5_1", "q8_0"),
        ("fp8_e5m2", "fp8"),
        ("mxfp4", "nvfp4", "fp8", "int8_per_token_head"),
        ("int4_per_token_head", "int8_per_token_head"),
    ],
    ids=" < ".join,
)  # fmt: skip
def test_more_bits_mean_less_error(ladder: tuple[str, ...], normal: KvTensors) -> None:
    errors = [_error(name, normal) for name in ladder]
    for worse, better in pairwise(errors):
        assert better[0] < worse[0]
        assert better[1] < worse[1]


@pytest.mark.parametrize(("name", "mantissa_bits"), [("fp8", 3), ("fp8_e5m2", 2)])
def test_float_error_has_its_bound_and_its_mean(name: str, mantissa_bits: int) -> None:
    """At most half a unit in the last place; in the mean of logarithmically even numbers, step^2 / 12 over x^2."""
    magnitudes = 2.0 ** np.random.default_rng(0).uniform(-5, 5, (2, 500, 64))
    stored = _store(name, _cache(magnitudes, -magnitudes))
    relative = stored.keys / magnitudes - 1
    assert np.abs(relative).max() <= 2.0 ** -(mantissa_bits + 1)
    mean = 4.0**-mantissa_bits / 12 * (3 / 8) / np.log(2)
    assert np.mean(relative**2) == pytest.approx(mean, rel=0.02)
    assert np.array_equal(stored.values, -stored.keys)


@pytest.mark.parametrize(("name", "levels"), [("int8_per_token_head", 127), ("q8_0(hadamard=false)", 127)])
def test_eight_bit_error_is_a_twelfth_of_the_squared_step(name: str, levels: int, normal: KvTensors) -> None:
    keys = normal.layers[0].keys
    blocks = keys if "head" in name else keys.reshape(*keys.shape[:2], -1, 32)
    step = np.abs(blocks).max(axis=-1) / levels
    error = np.mean((_store(name, normal).keys - keys) ** 2)
    assert error == pytest.approx(np.mean(step**2) / 12, rel=0.03)


def test_four_bit_floats_are_off_by_at_most_a_step_of_their_block(normal: KvTensors) -> None:
    for name, block, reach in (("nvfp4", 16, 1 / 6), ("mxfp4", 32, 1 / 4)):
        keys = normal.layers[0].keys
        largest = np.abs(keys.reshape(*keys.shape[:2], -1, block)).max(axis=-1)
        off = np.abs(_store(name, normal).keys - keys).reshape(*keys.shape[:2], -1, block).max(axis=-1)
        # Half of the widest gap, 4 to 6, in units of a scale that lies near largest / 6 (E4M3 rounds it by 1/16) or,
        # for powers of two, between largest / 8 and largest / 4; there what lies beyond 6 is cut to 6.
        assert (off <= largest * reach * (1 + 2**-4)).all()


def _with_heavy_channels(seed: int) -> KvTensors:
    """Keys with a few channels of large mean, as RoPE leaves them in most models."""
    offset = np.zeros(128, dtype=np.float32)
    offset[[3, 40, 41, 99]] = 16.0
    return _cache(_draw(seed, 4, 512) + offset, _draw(seed + 1, 4, 512))


@pytest.fixture(scope="module")
def heavy() -> KvTensors:
    return _with_heavy_channels(5)


@pytest.mark.parametrize("row", ["normal", "heavy channels"])
def test_the_errors_in_the_documentation_are_these(row: str, normal: KvTensors, heavy: KvTensors) -> None:
    text = (Path(__file__).parents[2] / "docs/methods/quantisation.md").read_text(encoding="utf-8")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    (names,) = [cells[1:] for cells in table if cells[0] == "Mean squared error"]
    (shown,) = [cells[1:] for cells in table if cells[0] == row]
    assert len(names) >= 12
    kv = normal if row == "normal" else heavy
    for name, figure in zip(names, shown, strict=True):
        squares = (_store(name.strip("`"), kv).keys.astype(np.float64) - kv.layers[0].keys) ** 2
        assert f"{np.mean(squares):.2g}" == figure, name


def test_keys_per_channel_beat_keys_per_token_on_heavy_channels(normal: KvTensors, heavy: KvTensors) -> None:
    ratio = {
        kind: _error("kv_adaquant:2/2(key_groups=token)", kv)[0] / _error("kv_adaquant:2/2(key_groups=channel)", kv)[0]
        for kind, kv in (("normal", normal), ("heavy", heavy))
    }
    assert 0.8 < ratio["normal"] < 1.25
    assert ratio["heavy"] > 10
    assert _error("kivi-2", heavy)[0] < 0.1 * _error("kv_adaquant:2/2", heavy)[0]


def test_a_rotation_helps_keys_with_heavy_channels_and_leaves_others_alone(normal: KvTensors, heavy: KvTensors) -> None:
    turned, plain = (_error(name, heavy)[0] for name in ("q4_0", "q4_0(hadamard=false)"))
    assert turned < plain / 3
    assert _error("q4_0", normal) == pytest.approx(_error("q4_0(hadamard=false)", normal), rel=0.05)
    assert _error("int4_per_token_head", heavy)[0] < 1.1 * _error("int4_per_token_head", normal)[0]


def test_llama_cpp_turns_keys_by_whole_heads_and_values_by_sixty_fours() -> None:
    kv = _cache(_draw(1), _draw(2))
    turned = _cache(rotate(kv.layers[0].keys, 128), rotate(kv.layers[0].values, 64))
    inside, outside = _store("q8_0", kv), _store("q8_0(hadamard=false)", turned)
    assert np.allclose(inside.keys, rotate(outside.keys, 128), atol=1e-5)
    assert np.allclose(inside.values, rotate(outside.values, 64), atol=1e-5)
    odd = _cache(_draw(1, dim=96), _draw(2, dim=96))
    assert np.array_equal(_store("q8_0", odd).keys, _store("q8_0(hadamard=false)", odd).keys)


def test_calibrated_scales_come_from_samples_alone_and_saturate() -> None:
    sample, other = _cache(_draw(1), _draw(2)), _cache(10 * _draw(3), 10 * _draw(4))
    largest = np.abs(sample.layers[0].keys).max()
    stored = _store("fp8(scale=calibrated)", other, [sample])
    assert np.abs(stored.keys).max() == pytest.approx(largest, rel=1e-6)
    by_head = _store("fp8_per_head", other, [sample])
    for head in range(2):
        expected = np.abs(sample.layers[0].keys[head]).max()
        assert np.abs(by_head.keys[head]).max() == pytest.approx(expected, rel=1e-6)
    assert np.array_equal(_store("fp8", other, [sample]).keys, _store("fp8", other).keys)
    with pytest.raises(InvalidSpec, match="at least one"):
        parse_compression("fp8_per_head").encoding.codec().fit([])


def test_a_scale_per_head_saves_a_small_head_from_subnormal_codes() -> None:
    """A float's relative precision does not depend on its scale, until numbers are subnormal: then steps are equal."""
    size = np.float32(3e-5)
    sizes = np.array([1.0, size], dtype=np.float32)[:, None, None]
    kv, sample = (_cache(sizes * _draw(seed), sizes * _draw(seed + 1)) for seed in (1, 3))
    true = kv.layers[0].keys[1]
    errors = {
        name: np.mean((_store(name, kv, [sample]).keys[1] - true) ** 2)
        for name in ("fp8(scale=calibrated)", "fp8_per_head")
    }
    step = np.abs(sample.layers[0].keys).max() / 448 * 2.0**-9
    assert errors["fp8(scale=calibrated)"] == pytest.approx(step**2 / 12, rel=0.05)
    assert errors["fp8_per_head"] < 1e-3 * np.mean(true**2)


def test_nvfp4_gains_from_calibration_where_numbers_are_small() -> None:
    kv, sample = (_cache(2e-3 * _draw(seed), 2e-3 * _draw(seed + 1)) for seed in (1, 3))
    codec = parse_compression("nvfp4").encoding.codec()
    fitted, bare = codec.fit([sample]).store(kv)[0], codec.fit([]).store(kv)[0]
    true = kv.layers[0].keys
    assert np.sum((fitted.keys - true) ** 2) < 0.02 * np.sum(true**2)
    assert np.sum((fitted.keys - true) ** 2) < np.sum((bare.keys - true) ** 2)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_fit_their_levels_and_their_payload(name: str) -> None:
    kv = _cache(_draw(1), _draw(2))
    stored = _store(name, kv)
    assert [one.tensor for one in stored.symbols] == ["key", "value"]
    for one in stored.symbols:
        assert one.codes.shape == (2, 64, 128)
        assert one.codes.dtype == np.int32
        assert one.codes.min() >= 0
        assert one.codes.max() < one.levels
    assert sum(FixedWidth().coded_bits(one) for one in stored.symbols) == stored.payload_bits


@pytest.mark.parametrize("name", FORMATS)
def test_packed_codes_take_the_payload_and_come_back(name: str) -> None:
    stored = _store(name, _cache(_draw(1, dim=96), _draw(2, dim=96)))
    taken = 0
    for one in stored.symbols:
        bits = (one.levels - 1).bit_length()
        packed = pack_codes(one.codes, bits)
        taken += 8 * packed.size
        assert np.array_equal(unpack_codes(packed, bits, 96), one.codes)
    assert taken == stored.payload_bits


def test_a_tensor_that_is_not_coded_leaves_no_codes_to_a_coder() -> None:
    kv = _cache(_draw(1), _draw(2))
    mixed = _store("q8_0(value_type=f16)", kv)
    assert mixed.symbols == ()
    assert mixed.payload_bits == kv.layers[0].keys.size * 8 + kv.layers[0].values.size * 16
    assert np.array_equal(mixed.values, kv.layers[0].values.astype(np.float16).astype(np.float32))
    latent = _store("kivi-4", _cache(_draw(1), np.zeros((2, 64, 0))))
    assert [one.tensor for one in latent.symbols] == ["key"]


def test_storing_what_was_read_back_changes_little() -> None:
    """A second pass finds nearly the same range, so it moves numbers by less than the first."""
    for name in FORMATS:
        kv = _cache(_draw(1), _draw(2))
        once = _store(name, kv)
        again = _store(name, replace(kv, layers=(replace(kv.layers[0], keys=once.keys, values=once.values),)), [kv])
        assert np.sum((again.keys - once.keys) ** 2) <= 0.5 * np.sum((once.keys - kv.layers[0].keys) ** 2), name
