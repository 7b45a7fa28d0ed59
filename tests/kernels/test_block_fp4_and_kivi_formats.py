"""Round trips, rounding rules and packing of the block fp4 and KIVI formats, and KIVI's residual rule."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.append.kivi.batch import ResidualAppendBatch, append_reference, make_append_inputs  # noqa: E402
from kernels.decode_attention.batch import DecodeBatch  # noqa: E402
from kernels.decode_attention.kivi.inputs import make_kivi_inputs  # noqa: E402
from kernels.formats import block_fp4, kivi  # noqa: E402

SEEDS = st.integers(0, 2**31)
FEW = settings(max_examples=15, deadline=None)
E4M3_VALUES = torch.arange(0, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def _draw(seed, *shape, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape[-1], generator=generator))


def test_every_e2m1_code_survives():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(block_fp4.encode_e2m1(block_fp4.decode_e2m1(codes)), codes)


def test_e2m1_ties_go_to_the_even_code():
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(block_fp4.decode_e2m1(block_fp4.encode_e2m1(values)), expected)
    assert torch.equal(block_fp4.decode_e2m1(block_fp4.encode_e2m1(-values)), -expected)


@FEW
@given(SEEDS)
def test_e2m1_gives_the_nearest_value(seed):
    values = 4 * _draw(seed, 500)
    decoded = block_fp4.decode_e2m1(block_fp4.encode_e2m1(values))
    nearest = (values[:, None] - block_fp4.decode_e2m1(torch.arange(16))).abs().amin(1)
    assert torch.equal((values - decoded).abs(), nearest)


@FEW
@given(SEEDS)
def test_nibbles_unpack_to_what_was_packed(seed):
    codes = torch.randint(0, 16, (3, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = block_fp4.pack_nibbles(codes)
    assert torch.equal(block_fp4.unpack_nibbles(packed), codes)
    assert torch.equal(packed[:, 5], codes[:, 10] | codes[:, 11] << 4)


@FEW
@given(SEEDS)
def test_nvfp4_scales_are_the_nearest_e4m3_values(seed):
    kv_format = block_fp4.NvFp4()
    largest = _draw(seed, 40).abs()
    _, factor = kv_format.encode_scale("key", largest)
    wanted = (largest / (6 * kv_format.tensor_scale("key"))).clamp(max=448)
    nearest = (wanted[:, None] - E4M3_VALUES).abs().amin(1)
    torch.testing.assert_close((factor / kv_format.tensor_scale("key") - wanted).abs(), nearest, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [(1.0, -2), (1.99, -2), (2.0, -1), (6.0, 0), (8.0, 1), (0.0, -126), (3e-39, -126), (3e38, 125)],
)
def test_mxfp4_scale_is_the_power_of_two_of_the_largest_element(largest, exponent):
    stored, factor = block_fp4.MxFp4().encode_scale("key", torch.tensor([largest]))
    assert int(stored) - block_fp4.E8M0_BIAS == exponent
    assert float(factor) == 2.0**exponent


@FEW
@given(SEEDS, st.sampled_from([block_fp4.NvFp4(), block_fp4.MxFp4()]))
def test_block_fp4_errors_are_within_half_a_step_of_the_scale(seed, kv_format):
    vectors = _draw(seed, 2, 16, 2, 64, spread=0.3).half()
    fields = kv_format.encode(vectors, -vectors)
    keys, values = kv_format.decode(fields, 64)
    for decoded, exact, name in ((keys, vectors.float(), "key"), (values, -vectors.float(), "value")):
        blocks = exact.unflatten(-1, (-1, kv_format.block_elements))
        _, factor = kv_format.encode_scale(name, blocks.abs().amax(-1))
        error = (decoded.unflatten(-1, (-1, kv_format.block_elements)) - blocks).abs()
        # Between 4 and 6 steps are 2; what is above 6 is cut off: 8 of E8M0's, 6 * 17 / 16 of E4M3's scales.
        clipped = (blocks.abs() / factor[..., None] - 6).clamp(min=0)
        assert (error <= factor[..., None] * torch.maximum(torch.tensor(1.0), clipped) * 1.001).all()


def test_a_block_of_zeros_stays_zero():
    for kv_format in (block_fp4.NvFp4(), block_fp4.MxFp4()):
        zeros = torch.zeros(1, 16, 1, 32)
        keys, values = kv_format.decode(kv_format.encode(zeros, zeros), 32)
        assert not keys.any()
        assert not values.any()


@FEW
@given(SEEDS, st.sampled_from([2, 4]), st.sampled_from(["interleaved", "sequential"]))
def test_words_unpack_to_what_was_packed(seed, bits, packing):
    codes = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(kivi.unpack_words(kivi.pack_words(codes, bits, packing), bits, packing), codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_interleaved_neighbours_share_a_mask(bits):
    codes = torch.zeros(32 // bits, dtype=torch.uint8)
    codes[4] = codes[5] = 1
    assert int(kivi.pack_words(codes, bits, "interleaved")) == 0x00010001 << 2 * bits


@FEW
@given(SEEDS, st.sampled_from([2, 4]), st.sampled_from(["interleaved", "sequential"]))
def test_kivi_errors_are_within_half_a_step_of_their_group(seed, bits, packing):
    keys, values = _draw(seed, 2, 64, 2, 64).half(), _draw(seed + 1, 2, 64, 2, 64).half()
    kv_format = kivi.Kivi(bits, packing)
    fields = kv_format.encode(keys, values)
    decoded_keys, decoded_values = kv_format.decode(fields, 64)
    key_groups = keys.float().unflatten(1, (-1, 32))
    value_groups = values.float().unflatten(-1, (-1, 32))
    for exact, decoded, dim in (
        (key_groups, decoded_keys.unflatten(1, (-1, 32)), 2),
        (value_groups, decoded_values.unflatten(-1, (-1, 32)), -1),
    ):
        step = (exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True)) / (2**bits - 1)
        # fp16 rounds the scale by 2^-11, times the largest code.
        slack = step * 2**bits * 2**-11 + 1e-6
        assert ((decoded - exact).abs() <= step / 2 + slack).all()


def test_a_constant_group_is_exact():
    kv_format = kivi.Kivi(2)
    vectors = torch.full((1, 32, 1, 32), 1.5)
    keys, values = kv_format.decode(kv_format.encode(vectors, vectors), 32)
    assert torch.equal(keys, vectors)
    assert torch.equal(values, vectors)


@pytest.mark.parametrize(
    ("tokens", "packed"),
    [(0, 0), (1, 0), (31, 0), (127, 0), (128, 0), (129, 32), (160, 32), (161, 64), (255, 128), (256, 128), (257, 160)],
)
def test_residual_holds_at_most_its_length(tokens, packed):
    assert kivi.packed_tokens(tokens) == packed


@given(st.integers(0, 10_000))
def test_packed_tokens_are_the_fewest_whole_groups(tokens):
    packed = kivi.packed_tokens(tokens)
    assert packed % kivi.GROUP == 0
    assert tokens - packed <= kivi.RESIDUAL_TOKENS
    assert packed == 0 or tokens - packed > kivi.RESIDUAL_TOKENS - kivi.GROUP


@pytest.mark.parametrize("bits", [2, 4])
def test_tokens_appended_one_by_one_lie_where_a_prefill_puts_them(bits):
    kv_format, total = kivi.Kivi(bits), 165
    layout = kv_format.layout(num_kv_heads=1, head_dim=32, block_size=32, dtype=torch.float16)
    whole = ResidualAppendBatch("whole", "float16", 1, 32, 32, (0,), (total,))
    inputs = make_append_inputs(kv_format, whole, seed=3, device="cpu")
    expected = append_reference(kv_format, whole, inputs)
    state = {name: inputs[name] for name in ("pages", "residual_key", "residual_value")}
    steps = [(0, 120), *((position, 1) for position in range(120, total))]
    for before, new in steps:
        step = ResidualAppendBatch("step", "float16", 1, 32, 32, (before,), (new,))
        tokens = {name: inputs[name][before : before + new] for name in ("key", "value")}
        after = append_reference(kv_format, step, {**inputs, **state, **tokens})
        pages = state["pages"].clone()
        layout.store(pages, after)
        state = {"pages": pages, "residual_key": after["residual_key"], "residual_value": after["residual_value"]}
    assert torch.equal(state["pages"], _stored(layout, inputs["pages"], expected)), (
        "packed tokens depend on how they came"
    )
    native = torch.arange(kivi.packed_tokens(total), total) % kivi.RESIDUAL_TOKENS
    slot = int(inputs["residual_index"][0])
    for name in ("residual_key", "residual_value"):
        assert torch.equal(state[name][slot, native], expected[name][slot, native])


def _stored(layout, pages, fields):
    pages = pages.clone()
    layout.store(pages, fields)
    return pages


def test_decode_inputs_poison_what_holds_no_token():
    case = DecodeBatch("poison", "float16", 1, 1, 32, 64, (161,), 1)
    inputs = make_kivi_inputs(kivi.Kivi(4), case, seed=0, device="cpu")
    ring = inputs["residual_key"][inputs["residual_index"][0]]
    native = 161 - kivi.packed_tokens(161)
    assert int(ring.isfinite().all(-1).sum()) == native
    groups = inputs["fields"]["key_scale"][inputs["block_table"][0, 0]]
    assert groups.isfinite().all()


@pytest.mark.parametrize(("head_dim", "block_size"), [(48, 32), (64, 16)])
def test_kivi_refuses_shapes_that_do_not_hold_whole_groups(head_dim, block_size):
    with pytest.raises(ValueError, match="multiples of 32"):
        kivi.Kivi(4).layout(num_kv_heads=1, head_dim=head_dim, block_size=block_size, dtype=torch.float16)


def test_block_fp4_refuses_part_of_a_block():
    with pytest.raises(ValueError, match="multiple of 16"):
        block_fp4.NvFp4().layout(num_kv_heads=1, head_dim=40, block_size=16, dtype=torch.float16)
