"""Byte layouts: fields do not overlap, fill the page, and add up to the simulator's bytes."""

import math

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from kernels.formats.pages import ALIGNMENT_BYTES, Field, PageLayout  # noqa: E402
from kernels.formats.turboquant import TurboQuantPaper  # noqa: E402
from kernels.harness.catalog import all_variants  # noqa: E402
from kvsim.compression import ENCODINGS, parse_compression  # noqa: E402
from kvsim.model_catalog import load_model  # noqa: E402

MODELS = ("llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss-20b")
LATENT_MODELS = {"mla": "deepseek-v3", "mla_fp8_e4m3": "deepseek-v3", "fp8_ds_mla": "deepseek-v3.2"}


def formats_and_models():
    """Pair each layout that has a strategy with models that can store it."""
    seen = set()
    for variant in all_variants():
        kv_format = variant.kv_format
        if kv_format is None or kv_format.strategy is None or (type(kv_format), kv_format.name, variant.form) in seen:
            continue
        seen.add((type(kv_format), kv_format.name, variant.form))
        for model in (LATENT_MODELS[kv_format.name],) if kv_format.name in LATENT_MODELS else MODELS:
            yield pytest.param(kv_format, model, id=f"{kv_format.name}-{variant.form}-{model}")


DTYPES = st.sampled_from([torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])


@st.composite
def layouts(draw):
    arrangement = draw(st.sampled_from(["planar", "inline"]))
    block_size, heads = draw(st.sampled_from([16, 32])), draw(st.integers(1, 4))
    fields = []
    for index in range(draw(st.integers(1, 4))):
        dtype = draw(DTYPES)
        # Multiples of 4 bytes, as every format has, so that a field of an inline row can be viewed as its dtype.
        count = draw(st.integers(1, 8)) * max(1, 4 // dtype.itemsize)
        fields.append(Field(f"field_{index}", dtype, (block_size, heads, count)))
    return PageLayout(tuple(fields), arrangement)


@given(layouts(), st.integers(1, 3))
def test_fields_fill_the_page_without_overlap(layout, num_blocks):
    pages = layout.allocate(num_blocks).zero_()
    for view in layout.views(pages).values():
        assert not view.view(torch.uint8).any()
        view.view(torch.uint8)[...] = 1
    assert int(pages.sum()) == sum(field.num_bytes for field in layout.fields) * num_blocks
    assert layout.page_bytes - sum(field.num_bytes for field in layout.fields) < ALIGNMENT_BYTES * len(layout.fields)


@given(layouts(), st.integers(0, 1 << 30))
def test_what_is_stored_is_read_back(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    fields = {
        field.name: torch.randint(0, 256, (2, field.num_bytes), generator=generator, dtype=torch.uint8)
        .view(field.dtype)
        .view(2, *field.shape)
        for field in layout.fields
    }
    pages = layout.allocate(2)
    layout.store(pages, fields)
    for name, view in layout.views(pages).items():
        assert torch.equal(view.contiguous().view(torch.uint8), fields[name].view(torch.uint8))


@pytest.mark.parametrize(("kv_format", "model_name"), list(formats_and_models()))
def test_a_block_has_the_bytes_that_the_simulator_charges(kv_format, model_name):
    model = load_model(model_name)
    is_latent = kv_format.name in LATENT_MODELS
    group = next(group for group in model.kv_groups if group.num_kv_heads and group.is_latent == is_latent)
    encoding = parse_compression(kv_format.strategy).stored
    block_size = math.lcm(16, kv_format.block_size_multiple)
    shape = {"num_kv_heads": group.num_kv_heads, "head_dim": group.k_head_dim, "block_size": block_size}
    try:
        layout = kv_format.layout(**shape, dtype=torch.bfloat16)
    except ValueError as refusal:
        pytest.skip(f"{kv_format.name} has no layout for heads of {group.k_head_dim}: {refusal}")
    assert layout.page_bytes == block_size * encoding.bytes_per_token(group, model.dtype).total_bytes
    assert kv_format.residual_tokens == encoding.residual_tokens


WITHOUT_KERNEL = ("kv_adaquant", "quarot", "rotatekv", "kvquant", "rdkv")
"""Kinds of encodings that no kernel of ours reads; docs/methods says so."""
STORED_AS_STREAMS = ("cachegen", "kvtc", "lossless")
"""Kinds whose tokens have no bytes of their own, so that no page holds them and attention cannot read them."""


def test_every_encoding_of_the_simulator_has_a_layout_or_is_known_to_have_none():
    formats = [variant.kv_format for variant in all_variants() if variant.kv_format is not None]
    spelled = {parse_compression(one.strategy).encoding for one in formats if one.strategy is not None}
    paper = {parse_compression(one.name).encoding for one in formats if isinstance(one, TurboQuantPaper)}
    with_layout = {encoding.kind for encoding in spelled | paper}
    kinds = {part.model_fields["kind"].default for part in ENCODINGS}
    assert kinds - with_layout == {*WITHOUT_KERNEL, *STORED_AS_STREAMS}
