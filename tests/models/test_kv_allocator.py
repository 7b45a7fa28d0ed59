"""KV bytes by engine, against figures that engines and their users published, and the errors of naive formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.allocator import (
    kv_bytes_per_token,
    kv_heads_per_rank,
    layer_token_cap,
    pool_bytes_per_token,
    resident_tokens,
    sequence_kv_bytes,
    state_bytes_per_sequence,
    window_bytes_per_sequence,
)
from kvsim.errors import IncompatibleScenario
from kvsim.model_catalog import list_models, load_model
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec

GIB = 2**30

BYTES_PER_TOKEN = {
    # Layers x 2 x KV heads x head dim x 2 B from each config; figures published elsewhere are marked.
    "llama-2-7b": 524_288,  # 0.5 MB per token (vLLM blog)
    "llama-3.1-8b": 131_072,  # methods.md, vLLM logs
    "llama-3.1-70b": 327_680,
    "llama-3.1-405b": 516_096,
    "llama-3.2-1b": 32_768,
    "llama-4-scout": 196_608,  # all 48 layers: vLLM keeps chunked layers whole
    "codellama-34b": 196_608,
    "yi-34b": 245_760,
    "mistral-7b-v0.3": 131_072,
    "mistral-nemo-12b": 163_840,  # explicit head_dim 128, not 5120 / 32
    "mixtral-8x7b": 131_072,
    "qwen2.5-7b": 57_344,
    "qwen2.5-72b": 327_680,
    "qwen3-0.6b": 114_688,  # explicit head_dim 128, not 1024 / 16
    "qwen3-14b": 163_840,
    "qwen3-30b-a3b": 98_304,
    "qwen3-32b": 262_144,
    "qwen3-next-80b-a3b": 24_576,  # 12 of 48 layers
    "qwen3.5-27b": 65_536,  # 16 of 64 layers
    "jamba-v0.1": 16_384,  # 4 GB at 256K tokens (arXiv 2403.19887, table 1)
    "falcon-7b": 8_192,  # multi-query
    "gemma-2-9b": 344_064,
    "gemma-3-27b": 507_904,
    "gpt-oss-20b": 49_152,  # 12.00 GiB at 32 x 8,192 (hf-mem pull request 70)
    "gpt-oss-120b": 73_728,  # hf-mem issue 60
    "deepseek-v2-lite": 31_104,
    "deepseek-v3": 70_272,  # arXiv 2412.19437; 70 KB per token
    "kimi-k2": 70_272,
    "deepseek-v3.2": 70_272 + 61 * 132,  # with the fp8 indexer key
    "mimo-v2-flash": 9 * 4 * 320 * 2 + 39 * 8 * 320 * 2,
}


@pytest.mark.parametrize(("name", "expected"), BYTES_PER_TOKEN.items())
def test_vllm_bytes_per_token(name: str, expected: int):
    assert kv_bytes_per_token(load_model(name), "vllm") == expected


def test_jamba_paper_kv_cache_at_256k():
    assert kv_bytes_per_token(load_model("jamba-v0.1"), "vllm") * 262_144 == 4 * GIB


@pytest.mark.parametrize(
    ("name", "available_gib", "logged_tokens"),
    [
        ("gpt-oss-120b", 5.38, 78_384),  # hf-mem issue 60
        ("gemma-4-31b-nvfp4", 24.54, 26_800),  # hf-mem pull request 61
    ],
)
def test_pool_reproduces_the_vllm_log_line(name: str, available_gib: float, logged_tokens: int):
    per_token = pool_bytes_per_token(load_model(name), "vllm")
    rounding_tokens = 0.005 * GIB / per_token
    assert available_gib * GIB / per_token == pytest.approx(logged_tokens, abs=rounding_tokens + 16)


def test_pool_counts_padding_and_the_largest_page():
    assert pool_bytes_per_token(load_model("gemma-4-31b-nvfp4"), "vllm") == 60 * 16_384
    # 52 sliding and 10 full layers: seven groups of ten.
    assert pool_bytes_per_token(load_model("gemma-3-27b"), "vllm") == 70 * 8_192
    # Linear layers take pages too: 36 of them beside 12 full ones.
    assert pool_bytes_per_token(load_model("qwen3-next-80b-a3b"), "vllm") == 4 * 24_576


def test_sliding_layers_differ_by_engine():
    model = load_model("gpt-oss-20b")
    full, batch = 8_192, 32
    reserved = kv_bytes_per_token(model, "vllm") * full * batch
    by_window = sum(
        group.num_layers * 2_048 * (full if group.window_tokens is None else group.window_tokens) * batch
        for group in model.groups
    )
    # hf-mem pull request 70: 12.00 GiB reserved, 6.09 GiB by window.
    assert reserved / GIB == pytest.approx(12.00, abs=0.005)
    assert by_window / GIB == pytest.approx(6.09, abs=0.005)
    assert sequence_kv_bytes(model, "vllm", full) * batch / GIB == pytest.approx(6.09, abs=0.005)
    assert kv_bytes_per_token(model, "llamacpp") == 12 * 2_048


def test_llamacpp_window_cache_is_window_and_micro_batch_padded_to_256():
    group = load_model("gpt-oss-20b").groups[0]
    assert group.kind is LayerKind.SLIDING
    assert layer_token_cap(group, "llamacpp", max_num_batched_tokens=8192) == 768
    assert resident_tokens(group, 131_072, "llamacpp") == 768
    assert resident_tokens(group, 131_072, "llamacpp", swa_full=True) == 131_072
    assert layer_token_cap(group, "llamacpp", max_num_batched_tokens=8192, swa_full=True) is None


def test_vllm_caps():
    sliding, full = load_model("gpt-oss-20b").groups
    assert layer_token_cap(sliding, "vllm", max_num_batched_tokens=2048) == 127 + 2048
    assert layer_token_cap(full, "vllm", max_num_batched_tokens=2048) is None
    chunked = load_model("llama-4-scout").groups[0]
    assert chunked.kind is LayerKind.CHUNKED
    assert layer_token_cap(chunked, "vllm", max_num_batched_tokens=2048) is None
    assert layer_token_cap(chunked, "llamacpp", max_num_batched_tokens=2048) == 8192 + 512
    linear = load_model("qwen3-next-80b-a3b").groups[0]
    assert layer_token_cap(linear, "vllm", max_num_batched_tokens=2048) == 0


def test_window_bytes_bound_what_is_held():
    model = load_model("gemma-3-27b")
    assert window_bytes_per_sequence(model, "vllm", max_num_batched_tokens=2048) == 52 * 8_192 * (1023 + 2048)
    assert window_bytes_per_sequence(load_model("llama-3.1-8b"), "vllm", max_num_batched_tokens=2048) == 0


NAIVE_ERRORS = {
    # conventions.md section 0 finding 3 (Unsloth pull request 4757): error of layers x 2 x KV heads x hidden / heads,
    # with the one KV head that GGUF files state for latent attention.
    "gemma-3-27b": (16, 6.82),
    "qwen3.5-27b": (4, 2.33),
    "deepseek-v3": (1, -0.81),
    "glm-5.2-fp8": (1, -0.67),
    "kimi-k2": (1, -0.61),
    "qwen3-0.6b": (8, -0.50),
}


@pytest.mark.parametrize(("name", "stated"), NAIVE_ERRORS.items())
def test_naive_formula_errs_as_reported(name: str, stated: tuple[int, float]):
    kv_heads, reported_error = stated
    model = load_model(name)
    tokens = 131_072
    naive = model.num_layers * 2 * kv_heads * (model.hidden_size / model.num_attention_heads) * 2 * tokens
    windows = sum(
        g.num_layers * g.kv_elements_per_token * 2 * min(g.window_tokens or tokens, tokens) for g in model.groups
    )
    # Attention values only, as there: DeepSeek's indexer key is left out.
    assert naive / windows - 1 == pytest.approx(reported_error, abs=0.006)
    growth = kv_bytes_per_token(model, "llamacpp") - sum(g.num_layers * g.index_key_bytes for g in model.groups)
    sliding = sum(g.num_layers * g.kv_elements_per_token * 2 * g.window_tokens for g in model.groups if g.window_tokens)
    assert growth * tokens + sliding == windows


def test_gemma3_sequence_on_llamacpp_is_far_below_the_naive_size():
    model = load_model("gemma-3-27b")
    padded = sequence_kv_bytes(model, "llamacpp", 131_072)
    assert padded == 8_192 * (10 * 131_072 + 52 * 1_536)


def test_state_bytes():
    # Nemotron-3 Nano: 23 Mamba-2 layers of 64 x 64 x 128 fp32 and 6144 channels of 3 past inputs in bf16.
    model = load_model("nemotron-3-nano-30b-a3b")
    assert state_bytes_per_sequence(model) == 23 * (64 * 64 * 128 * 4 + (64 * 64 + 2 * 8 * 128) * 3 * 2)
    assert state_bytes_per_sequence(model, tensor_parallel_size=2) * 2 == state_bytes_per_sequence(model)
    assert state_bytes_per_sequence(load_model("llama-3.1-8b")) == 0


@pytest.mark.parametrize(("tensor_parallel_size", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_kv_heads_split_then_replicate(tensor_parallel_size: int, heads: int):
    model = load_model("llama-3.1-8b")
    assert kv_heads_per_rank(model.groups[0], tensor_parallel_size) == heads
    assert kv_bytes_per_token(model, "vllm", tensor_parallel_size=tensor_parallel_size) == 32 * heads * 256 * 2


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(IncompatibleScenario, match=r"tensor_parallel_size 3 .*num_key_value_heads 8.*1, 2, 4, 8"):
        kv_heads_per_rank(load_model("llama-3.1-8b").groups[0], 3)


def test_latent_cache_is_whole_on_every_rank():
    model = load_model("deepseek-v3")
    assert kv_bytes_per_token(model, "vllm", tensor_parallel_size=8) == 70_272


def test_indexer_key_of_deepseek_v32():
    assert load_model("deepseek-v3.2").groups[0].index_key_bytes == 132


@pytest.mark.parametrize("name", list_models())
def test_laws_of_every_preset(name: str):
    model = load_model(name)
    exact = kv_bytes_per_token(model, "vllm")
    assert 0 < kv_bytes_per_token(model, "llamacpp") <= exact <= pool_bytes_per_token(model, "vllm")
    assert kv_bytes_per_token(model, "vllm", element_bytes=1.0) < exact
    assert sequence_kv_bytes(model, "vllm", 131_072) <= exact * 131_072
    if all(group.num_kv_heads % 2 == 0 for group in model.kv_groups):
        assert 2 * kv_bytes_per_token(model, "vllm", tensor_parallel_size=2) == exact


def sliding_group(window_tokens: int) -> LayerGroup:
    return LayerGroup(
        kind=LayerKind.SLIDING, layers=(0,), num_kv_heads=2, k_head_dim=64, v_head_dim=64, window_tokens=window_tokens
    )


@given(
    tokens=st.integers(1, 300_000),
    window_tokens=st.integers(1, 40_000),
    block_size=st.sampled_from([8, 16, 32, 64, 128]),
    max_num_batched_tokens=st.integers(1, 16_384),
)
def test_resident_tokens_cover_the_window_and_stay_under_the_cap(
    tokens: int, window_tokens: int, block_size: int, max_num_batched_tokens: int
):
    group = sliding_group(window_tokens)
    held = resident_tokens(group, tokens, "vllm", block_size=block_size)
    cap = layer_token_cap(group, "vllm", max_num_batched_tokens=max_num_batched_tokens)
    assert cap is not None
    assert held % block_size == 0
    assert min(tokens, window_tokens - 1) <= held <= math.ceil(tokens / block_size) * block_size
    # One more block at either end than the reserved tokens fill, as vLLM's own bound adds.
    assert held <= cap + 2 * block_size
    cells = resident_tokens(group, tokens, "llamacpp")
    assert cells % 256 == 0
    assert min(tokens, window_tokens) <= cells
    llamacpp_cap = layer_token_cap(group, "llamacpp", max_num_batched_tokens=512)
    assert llamacpp_cap is not None
    assert cells <= llamacpp_cap


@given(tokens=st.integers(1, 100_000), more=st.integers(0, 100_000))
def test_sequences_never_shrink_as_they_grow_while_no_window_is_full(tokens: int, more: int):
    model: ModelSpec = load_model("llama-3.1-8b")
    assert sequence_kv_bytes(model, "vllm", tokens) <= sequence_kv_bytes(model, "vllm", tokens + more)
    assert sequence_kv_bytes(model, "vllm", tokens) >= kv_bytes_per_token(model, "vllm") * tokens
