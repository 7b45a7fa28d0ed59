"""Formats of latents and low-rank coordinates: bytes, round trips, projections, and the integer forms of e4m3."""

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
triton = pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.append.latent.batch import LatentAppendConfig  # noqa: E402
from kernels.append.latent.cases import Fp8DsMlaAppend, LatentFp8Append  # noqa: E402
from kernels.decode_attention.batch import DecodeBatch  # noqa: E402
from kernels.decode_attention.low_rank.batch import LowRankConfig  # noqa: E402
from kernels.decode_attention.low_rank.cases import LowRankDecodeAttention  # noqa: E402
from kernels.decode_attention.low_rank.rope import rope_table, rotate  # noqa: E402
from kernels.decode_attention.mla.batch import LatentConfig  # noqa: E402
from kernels.decode_attention.mla.cases import MlaDecodeAttention, MlaFp8DecodeAttention  # noqa: E402
from kernels.decode_attention.mla.e4m3 import BITS_FACTOR, e4m3_to_fp16, fp32_to_e4m3  # noqa: E402
from kernels.decode_attention.sparse_latent.cases import (  # noqa: E402
    TopkFp8DsMlaDecodeAttention,
    TopkMlaDecodeAttention,
)
from kernels.formats.latent import E4M3_MAX, Fp8DsMla, Mla, MlaFp8, to_e4m3  # noqa: E402
from kernels.formats.low_rank import LowRank, expand, orthonormal_rows, project  # noqa: E402
from kernels.harness.check import check  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
DEEPSEEK_V3 = {"num_kv_heads": 1, "head_dim": 576, "dtype": torch.bfloat16}
LLAMA_3_8B = {"num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}


def latents(*shape, seed=0, dtype=torch.float32):
    keys = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return keys, keys


@pytest.mark.parametrize(("kv_format", "token_bytes"), [(Mla(), 1152), (MlaFp8(), 576), (Fp8DsMla(), 656)])
@pytest.mark.parametrize("block_size", [1, 16, 48, 64])
def test_bytes_of_a_deepseek_token(kv_format, token_bytes, block_size):
    layout = kv_format.layout(block_size=block_size, **DEEPSEEK_V3)
    assert layout.page_bytes == token_bytes * block_size


def test_fp8_ds_mla_lays_the_parts_of_a_token_side_by_side():
    layout = Fp8DsMla().layout(block_size=2, **DEEPSEEK_V3)
    pages = torch.zeros(3, layout.page_bytes, dtype=torch.uint8)
    views = layout.views(pages)
    views["latent"][1, 1] = 1.0
    views["latent_scale"][1, 1] = 1.0
    views["rope"][1, 1] = 1.0
    row = pages.view(3, 2, 656)[1, 1]
    assert row[:512].eq(0x38).all()
    assert row[512:528].view(torch.float32).eq(1.0).all()
    assert row[528:].view(torch.bfloat16).eq(1.0).all()
    assert pages.view(6, 656)[[0, 1, 2, 4, 5]].eq(0).all()


@pytest.mark.parametrize(("fraction", "token_bytes"), [(0.5, 2048), (0.25, 1024), (1.0, 4096)])
def test_bytes_of_low_rank_coordinates(fraction, token_bytes):
    kv_format = LowRank(fraction)
    assert kv_format.layout(block_size=16, **LLAMA_3_8B).page_bytes == 16 * token_bytes
    assert kv_format.rank(8, 128) == round(fraction * 512)


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        LowRank().rank(6, 128)
    with pytest.raises(ValueError, match="one KV head"):
        Mla().layout(num_kv_heads=2, head_dim=576, block_size=16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="do not divide"):
        Fp8DsMla().layout(num_kv_heads=1, head_dim=500, block_size=16, dtype=torch.bfloat16)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 20), exponent=st.integers(-30, 20))
def test_fp8_ds_mla_keeps_each_group_within_an_e4m3_rounding(seed, exponent):
    keys, _ = latents(2, 4, 1, 576, seed=seed)
    keys[..., :128] *= 2.0**exponent
    fields = Fp8DsMla().encode(keys.bfloat16(), keys.bfloat16())
    decoded, values = Fp8DsMla().decode(fields, 576)
    wanted = keys.bfloat16().float()
    groups = wanted[..., :512].unflatten(-1, (4, 128))
    # Half a step: 2**-4 of a normal value, 2**-10 of the scale for a subnormal one.
    allowed = (groups.abs() * 2.0**-4).maximum(fields["latent_scale"][..., None] * 2.0**-10) * (1 + 1e-5)
    assert ((values.unflatten(-1, (4, 128)) - groups).abs() <= allowed).all()
    assert torch.equal(decoded[..., :512], values)
    assert torch.equal(decoded[..., 512:], wanted[..., 512:])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 20))
def test_encoding_what_was_decoded_changes_nothing(seed):
    keys, _ = latents(1, 3, 1, 576, seed=seed)
    for kv_format in (Mla(), MlaFp8(), Fp8DsMla()):
        once, _ = kv_format.decode(kv_format.encode(keys, keys), 576)
        twice, _ = kv_format.decode(kv_format.encode(once, once), 576)
        torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_zeros_and_values_beyond_the_range():
    keys = torch.zeros(1, 1, 1, 576)
    assert not Fp8DsMla().decode(Fp8DsMla().encode(keys, keys), 576)[0].any()
    keys[..., 0] = 1e6
    kv_format = MlaFp8(scale=0.5)
    assert kv_format.decode(kv_format.encode(keys, keys), 576)[0][..., 0] == E4M3_MAX / 2


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 20), heads=st.sampled_from([1, 2, 4, 8]), head_dim=st.sampled_from([8, 12, 20]))
def test_projection_to_full_rank_is_exact(seed, heads, head_dim):
    kv_format = LowRank(retained_fraction=1.0)
    keys, values = latents(2, 3, heads, head_dim, seed=seed)
    decoded = kv_format.decode(kv_format.encode(keys, values), head_dim)
    for rebuilt in decoded:
        torch.testing.assert_close(rebuilt, keys, atol=2e-5, rtol=0)


def test_projecting_twice_equals_projecting_once():
    keys, _ = latents(2, 3, 8, 32)
    basis = LowRank().key_basis(8, 32)
    once = expand(project(keys, basis), basis, 32)
    torch.testing.assert_close(expand(project(once, basis), basis, 32), once, atol=1e-5, rtol=0)
    # Half the directions of a random basis keep about half the energy.
    assert 0.4 < (once.square().sum() / keys.square().sum()).item() < 0.6


def test_bases_are_orthonormal_and_the_same_on_every_call():
    basis = orthonormal_rows(2, 24, 40, seed=3)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(24).expand(2, -1, -1), atol=1e-6, rtol=0)
    orthonormal_rows.cache_clear()
    assert torch.equal(orthonormal_rows(2, 24, 40, seed=3), basis)


def test_rotated_scores_depend_on_the_distance_alone():
    # What the kernel uses: the query turned back by the tile's first position, the key turned by its place in the tile.
    table = rope_table(64, 32)
    query, key = torch.randn(2, 1, 1, 32)
    at = {position: rotate(key.expand(position + 1, 1, 32), table)[position] for position in (5, 37)}
    cosine, sine = table[32].chunk(2, -1)
    low, high = query.chunk(2, -1)
    turned_back = torch.cat((low * cosine + high * sine, high * cosine - low * sine), -1)
    torch.testing.assert_close((query * at[37]).sum(), (turned_back * at[5]).sum(), atol=1e-5, rtol=1e-5)


@triton.jit
def decode_codes_kernel(codes, values, BY_BITS: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(values + at, e4m3_to_fp16(tl.load(codes + at), BY_BITS))


@triton.jit
def encode_values_kernel(values, codes, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(codes + at, fp32_to_e4m3(tl.load(values + at), True))


def test_every_e4m3_code_becomes_its_value_by_bits(kernel_device):
    codes = torch.arange(256, dtype=torch.uint8, device=kernel_device)
    values = torch.empty(256, dtype=torch.float16, device=kernel_device)
    decode_codes_kernel[(1,)](codes.view(torch.int8), values, BY_BITS=True)
    wanted = codes.view(torch.float8_e4m3fn).float()
    is_number = ~wanted.isnan()
    assert is_number.sum() == 254
    assert torch.equal(values.float()[is_number] / BITS_FACTOR, wanted[is_number])


def test_rounding_to_e4m3_by_bits_equals_the_cast(kernel_device):
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    midpoints = (codes[1:] + codes[:-1]) / 2
    near = torch.cat((codes, midpoints, midpoints.nextafter(torch.tensor(0.0)), midpoints.nextafter(torch.tensor(9e9))))
    spread = torch.randn(2048 - 2 * len(near), generator=torch.Generator().manual_seed(1)).mul(3).exp2().clamp(max=448)
    values = torch.cat((near, -near, spread)).to(kernel_device)
    found = torch.empty(len(values), dtype=torch.uint8, device=kernel_device)
    encode_values_kernel[(1,)](values, found, COUNT=len(values))
    assert torch.equal(found, to_e4m3(values).view(torch.uint8))


E4M3_BY_BITS = [
    (MlaFp8DecodeAttention(), LatentConfig(16, num_warps=4, num_stages=2, e4m3_by_bits=True)),
    (TopkFp8DsMlaDecodeAttention(), LatentConfig(16, num_warps=4, num_stages=2, e4m3_by_bits=True)),
    (LatentFp8Append(), LatentAppendConfig(8, num_warps=4, num_stages=1, e4m3_by_bits=True)),
    (Fp8DsMlaAppend(), LatentAppendConfig(8, num_warps=4, num_stages=1, e4m3_by_bits=True)),
]


@pytest.mark.parametrize(("variant", "config"), E4M3_BY_BITS, ids=lambda value: getattr(value, "name", ""))
def test_the_integer_path_of_targets_without_e4m3_agrees(variant, config, kernel_device):
    check(variant, variant.correctness_cases[1], seed=11, device=kernel_device, config=config)


@pytest.mark.parametrize("heads", [1, 2])
def test_programs_of_fewer_heads_agree(heads, kernel_device):
    variant = LowRankDecodeAttention()
    config = LowRankConfig(16, num_warps=4, num_stages=2, block_k=16, heads=heads)
    case = DecodeBatch("two-groups", "float16", 16, 8, 32, 16, (37,), 1)
    check(variant, case, seed=12, device=kernel_device, config=config)


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        (MlaDecodeAttention(), lambda i: {"query": i["query"].float()}, "16 bits"),
        (MlaDecodeAttention(), lambda i: {"fields": {"latent": i["fields"]["latent"][..., :64]}}, "head_dim values"),
        (TopkMlaDecodeAttention(), lambda i: {"slots": i["slots"].long()}, "int32"),
        (LowRankDecodeAttention(), lambda i: {"rope_table": i["rope_table"][:8]}, "longest context"),
        (LowRankDecodeAttention(), lambda i: {"key_basis": i["key_basis"][:, :, :-1]}, "basis must be"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(variant, change, message):
    case = variant.correctness_cases[1]
    config = variant.configs("sm_90", case)[0]
    inputs = variant.make_inputs(case, seed=1, device="cpu")
    buffers = variant.allocate(case, inputs, config)
    with pytest.raises(ValueError, match=message):
        variant.plan(case, inputs | change(inputs), buffers, config)
