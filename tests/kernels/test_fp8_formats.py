"""Encoding and decoding of fp8 and per-token-head formats: error bounds, extremes, packing, layouts; and their kernels
in the form that the default target does not run."""

import math
import random

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.formats.fp8 import FP8_DTYPES, Fp8, to_fp8  # noqa: E402
from kernels.formats.per_token_head import (  # noqa: E402
    LARGEST_CODE,
    SMALLEST_FP16_SCALE,
    SMALLEST_SCALE,
    Int4PerTokenHead,
    PerTokenHead8,
    VllmInt4PerTokenHead,
    pack_half_split,
    unpack_half_split,
)
from kernels.harness.catalog import all_variants  # noqa: E402
from kernels.harness.check import check  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

FEW = settings(max_examples=25, deadline=None)
HEAD_DIMS = st.sampled_from([8, 64, 80])
MAGNITUDES = st.sampled_from([1e-9, 1e-3, 1.0, 300.0])
FORMATS = [
    Fp8("e4m3", key_scale=0.5, value_scale=2.0),
    Fp8("e5m2", key_scale=0.5, value_scale=2.0),
    *(PerTokenHead8(dtype, arrangement) for dtype in ("int8", "fp8") for arrangement in ("planar", "inline")),
    Int4PerTokenHead(),
    VllmInt4PerTokenHead(),
]


def vectors(seed, head_dim, magnitude, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 2, head_dim)
    return tuple((torch.randn(shape, generator=generator) + shift) * magnitude for _ in range(2))


def through_pages(kv_format, keys, values):
    """Encode, store to poisoned pages, read the views back and decode."""
    _, block_size, num_kv_heads, head_dim = keys.shape
    layout = kv_format.layout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16)
    pages = layout.allocate(len(keys)).fill_(0xFF)
    layout.store(pages, kv_format.encode(keys, values))
    return kv_format.decode(layout.views(pages), head_dim)


def fp8_step(values, code):
    """Distance between neighbouring codes at a value's magnitude."""
    mantissa_bits, least_exponent = (3, -6) if code == "e4m3" else (2, -14)
    exponent = torch.frexp(values.abs())[1] - 1
    return torch.ldexp(torch.ones_like(values), exponent.clamp_min(least_exponent) - mantissa_bits)


@FEW
@given(st.integers(0, 1 << 30), HEAD_DIMS, st.sampled_from([1e-6, 1e-3, 1.0, 100.0]), st.sampled_from(["e4m3", "e5m2"]))
def test_fp8_errs_by_half_a_step(seed, head_dim, magnitude, code):
    kv_format = Fp8(code, key_scale=0.5, value_scale=2.0)
    keys, values = vectors(seed, head_dim, magnitude)
    limit = torch.finfo(FP8_DTYPES[code]).max
    for original, decoded, scale in zip(
        (keys, values), through_pages(kv_format, keys, values), (0.5, 2.0), strict=True
    ):
        clamped = original.clamp(-limit * scale, limit * scale)
        assert ((decoded - clamped).abs() <= fp8_step(clamped / scale, code) * scale / 2).all()


@pytest.mark.parametrize("code", ["e4m3", "e5m2"])
def test_fp8_keeps_every_finite_code_and_clamps_beyond(code):
    codes = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPES[code])
    finite = codes.float()[codes.float().isfinite()]
    assert torch.equal(to_fp8(finite, code).float(), finite)
    limit = torch.finfo(FP8_DTYPES[code]).max
    beyond = to_fp8(torch.tensor([1e9, -1e9, math.inf, -math.inf, math.nan]), code).float()
    assert beyond[:4].tolist() == [limit, -limit, limit, -limit]
    assert beyond[4].isnan()


@FEW
@given(st.integers(0, 1 << 30), HEAD_DIMS, MAGNITUDES, st.sampled_from(["planar", "inline"]))
def test_int8_errs_by_half_a_step(seed, head_dim, magnitude, arrangement):
    keys, values = vectors(seed, head_dim, magnitude)
    for original, decoded in zip(
        (keys, values), through_pages(PerTokenHead8("int8", arrangement), keys, values), strict=True
    ):
        step = (original.abs().amax(-1, keepdim=True) / LARGEST_CODE["int8"]).clamp_min(SMALLEST_SCALE)
        assert ((decoded - original).abs() <= step * 0.5001).all()


@FEW
@given(st.integers(0, 1 << 30), HEAD_DIMS, MAGNITUDES, st.sampled_from(["planar", "inline"]))
def test_fp8_per_token_head_errs_by_half_a_step(seed, head_dim, magnitude, arrangement):
    keys, values = vectors(seed, head_dim, magnitude)
    for original, decoded in zip(
        (keys, values), through_pages(PerTokenHead8("fp8", arrangement), keys, values), strict=True
    ):
        scale = (original.abs().amax(-1, keepdim=True) / LARGEST_CODE["fp8"]).clamp_min(SMALLEST_SCALE)
        assert ((decoded - original).abs() <= fp8_step(original / scale, "e4m3") * scale * 0.5001).all()


@FEW
@given(st.integers(0, 1 << 30), HEAD_DIMS, MAGNITUDES, st.sampled_from([0.0, -3.0, 5.0]))
def test_int4_errs_by_half_a_step_and_the_rounding_of_scale_and_zero(seed, head_dim, magnitude, shift):
    keys, values = vectors(seed, head_dim, magnitude, shift)
    for original, decoded in zip((keys, values), through_pages(Int4PerTokenHead(), keys, values), strict=True):
        low, high = original.aminmax(dim=-1, keepdim=True)
        step = ((high - low) / 15).clamp_min(SMALLEST_FP16_SCALE)
        half_unit = 2.0**-11
        rounding = 15 * step * half_unit + low.abs() * half_unit + 2.0**-25
        assert ((decoded - original).abs() <= step * 0.5005 + rounding).all()


@FEW
@given(st.integers(0, 1 << 30), HEAD_DIMS, st.sampled_from([1e-3, 1.0, 300.0]))
def test_vllm_int4_errs_by_a_step_where_zero_lies_inside(seed, head_dim, magnitude):
    keys, values = vectors(seed, head_dim, magnitude)
    keys, values = (torch.cat((vector, -vector), -1) for vector in (keys, values))
    for original, decoded in zip((keys, values), through_pages(VllmInt4PerTokenHead(), keys, values), strict=True):
        low, high = original.aminmax(dim=-1, keepdim=True)
        # Half a step of the codes, half of the zero point where an end is clamped, and 2^-19 of the scale's mantissa.
        assert ((decoded - original).abs() <= (high - low) / 15 * 1.001).all()


@pytest.mark.parametrize("kv_format", FORMATS, ids=repr)
def test_zero_stays_zero_and_encoding_is_stable(kv_format):
    zeros = torch.zeros(1, 4, 2, 16)
    assert all((decoded == 0).all() for decoded in through_pages(kv_format, zeros, zeros))
    once = through_pages(kv_format, *vectors(3, 16, 1.0))
    twice = through_pages(kv_format, *once)
    for first, second in zip(once, twice, strict=True):
        assert torch.allclose(first, second, rtol=2e-3, atol=5e-3)


@FEW
@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda codes: len(codes) % 2 == 0))
def test_half_split_packing_is_bijective(codes):
    unpacked = torch.tensor(codes, dtype=torch.uint8)
    packed = pack_half_split(unpacked)
    assert packed.shape[-1] * 2 == len(codes)
    assert torch.equal(unpack_half_split(packed), unpacked)
    assert int(packed[0]) == codes[0] + 16 * codes[len(codes) // 2]


@FEW
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([1, 8, 17]),
    st.sampled_from([32, 80, 128]),
    st.sampled_from([1, 16, 48]),
)
def test_fields_fill_a_page_without_overlap(kv_format, num_kv_heads, head_dim, block_size):
    layout = kv_format.layout(num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16)
    pages = torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    for view in layout.views(pages).values():
        view.view(torch.uint8).add_(1)
    written = sum(field.num_bytes for field in layout.fields)
    assert int((pages == 1).sum()) == written
    assert int((pages > 1).sum()) == 0
    assert layout.page_bytes - written < 16 * len(layout.fields)


@pytest.mark.parametrize(
    ("kv_format", "head_dim", "rule"),
    [(PerTokenHead8("int8", "inline"), 6, "multiple of 4"), (VllmInt4PerTokenHead(), 12, "multiple of 4"),
     (Int4PerTokenHead(), 7, "even")],
)  # fmt: skip
def test_a_head_dim_that_does_not_fit_is_named(kv_format, head_dim, rule):
    with pytest.raises(ValueError, match=rule):
        kv_format.layout(num_kv_heads=2, head_dim=head_dim, block_size=16, dtype=torch.bfloat16)


def test_metadata_of_one_head_is_contiguous():
    layout = PerTokenHead8("int8").layout(num_kv_heads=4, head_dim=32, block_size=16, dtype=torch.bfloat16)
    assert layout.views(layout.allocate(2))["key_scale"].stride()[1:3] == (1, 16)


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        ("decode_attention/fp8/best", "multi-head"),
        ("decode_attention/fp8_per_token_head/best", "multi-head"),
        ("append/fp8/best", "odd-bf16"),
        ("append/fp8_e5m2/best", "odd-bf16"),
        ("append/fp8_per_token_head/best", "odd-bf16"),
    ],
)
def test_integer_forms_equal_the_reference(variant, case, kernel_device):
    (found,) = all_variants(variant)
    shape = next(shape for shape in found.correctness_cases if shape.name == case)
    seed = random.SystemRandom().randrange(1 << 30)
    check(found, shape, seed=seed, device=kernel_device, config=found.configs("sm_80", shape)[0])
