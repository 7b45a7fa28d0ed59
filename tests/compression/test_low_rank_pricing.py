"""What low-rank methods and latents cost, against the papers' and models' own numbers."""

from __future__ import annotations

import pytest

from kvsim.compression import parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.compression.reduction.mla import Mla
from kvsim.compression.reduction.xkv import Xkv
from kvsim.deployment import LayerClass
from kvsim.errors import InvalidSpec
from kvsim.model_catalog import load_model
from kvsim.ops import randomised_svd
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import ModelSpec


@pytest.fixture
def llama(models: dict[str, ModelSpec]) -> ModelSpec:
    return models["llama-3.1-8b"]


def _per_token(name: str, model: ModelSpec) -> float:
    """Bytes that one more token takes."""
    compression = parse_compression(name)
    return stored_bytes(compression, model, 5001, 0) - stored_bytes(compression, model, 5000, 0)


def test_xkv_stores_a_groups_coordinates_once(llama: ModelSpec) -> None:
    # 128 + 192 numbers per layer instead of 1024 + 1024: 6.4x (abdelfattah-lab/xKV, scripts/calc_kv_comp_rate.py).
    assert _per_token("xkv", llama) == 131_072 / 6.4
    assert _per_token("xkv(layer_group_size=2,rank_k=256,rank_v=384)", llama) == 131_072 / 6.4


def test_xkv_bases_are_a_debt_that_short_prompts_do_not_repay(llama: ModelSpec) -> None:
    bases = 8 * (512 + 768) * 4 * 1024 * 2
    assert stored_bytes(parse_compression("xkv"), llama, 1, 0) == 20_480 + bases
    native = parse_compression("native")
    smaller = [
        stored_bytes(parse_compression("xkv"), llama, n, 0) < stored_bytes(native, llama, n, 0) for n in (758, 759)
    ]
    assert smaller == [False, True]


def test_each_layer_reads_what_its_group_shares(llama: ModelSpec) -> None:
    encoding = parse_compression("xkv").stored
    assert encoding.bytes_per_token(llama.groups[0], llama.dtype).total_bytes == 640
    assert encoding.read_bytes_per_token(llama.groups[0], llama.dtype) == 2560


def test_metadata_of_an_encoding_is_shared_as_well(llama: ModelSpec) -> None:
    # One key and one value vector per token and group, each with an fp32 scale.
    assert _per_token("xkv+int8_per_token_head", llama) == 8 * (512 + 768 + 2 * 4)


def test_layers_left_over_form_a_smaller_group(models: dict[str, ModelSpec]) -> None:
    model, xkv = models["odd-heads"], Xkv(rank_k=40, rank_v=64)
    last = xkv.at_layer(LayerView(5, 6, model.groups[0]))
    assert (last.layer_group_size, last.rank_k, last.rank_v) == (2, 20, 32)
    assert xkv.stored_with(LayerView(5, 6, model.groups[0])) == (4, 5)
    sliding = models["sliding"].groups[1]
    assert xkv.stored_with(LayerView(2, 12, sliding)) == (0, 2, 4, 6)


def test_sketched_svd_is_a_small_part_of_a_long_prefill(llama: ModelSpec) -> None:
    calls = tuple(Xkv().prefill_ops(32_768, llama.groups[0], llama))
    flops = 32 * sum(float(call.work.flops) for call in calls)
    products = 8 * 12 * 32_768 * 4096 * (512 + 768)
    assert products < flops < 1.4 * products
    # 2 FLOPs per weight and token; attention comes on top.
    assert 0.02 < flops / (2 * 7e9 * 32_768) < 0.06


def test_full_rank_sketch_counts_no_more_directions_than_there_are() -> None:
    assert randomised_svd(10, 4096, 512, 2, 2.0) == randomised_svd(10, 4096, 10, 2, 2.0)


def test_keys_before_rope_are_rebuilt_and_keys_after_it_are_not(llama: ModelSpec) -> None:
    group = llama.groups[0]
    rebuilt, attended = (
        parse_compression(name).stored for name in ("low_rank(group_size=1)", "low_rank(group_size=1,keys=post_rope)")
    )
    assert rebuilt.attention_flops_per_token(group, llama) == 2 * 64 * 8 * 128
    assert attended.attention_flops_per_token(group, llama) == 0.0
    assert [call.name for call in attended.decode_ops(group, llama)] == ["project_query", "expand_output"]
    assert rebuilt.bytes_per_token(group, llama.dtype) == attended.bytes_per_token(group, llama.dtype)


def test_eigen_attention_rebuilds_keys_only_where_rope_turns_them(llama: ModelSpec) -> None:
    encoding = parse_compression("eigen_attention(retained_fraction=0.5)").stored
    assert encoding.attention_flops_per_token(llama.groups[0], llama) == 2 * 64 * 8 * 128
    without = llama.model_copy(update={"rotary_fraction": 0.0})
    assert encoding.attention_flops_per_token(llama.groups[0], without) == 0.0
    assert _per_token("eigen_attention", llama) == 32 * 8 * 2 * 77 * 2


def test_latents_of_deepseek_take_the_bytes_that_it_publishes() -> None:
    # DeepSeek-V3: 61 layers of 512 + 64 bf16; vLLM's fp8_ds_mla: 656 B per layer (vLLM blog 2025-09-29).
    assert _per_token("native", load_model("deepseek-v3")) == 70_272
    assert _per_token("fp8", load_model("deepseek-v3.2")) == 40_016


def test_a_model_reshaped_to_mla_takes_the_bytes_of_one_that_has_it(llama: ModelSpec) -> None:
    assert _per_token("mla", llama) == 32 * 576 * 2
    assert _per_token("mla(kv_lora_rank=256,qk_rope_head_dim=32)", llama) == 32 * 288 * 2
    assert _per_token("mla+fp8", llama) == 32 * 576


def test_absorbed_attention_runs_over_the_latent(llama: ModelSpec) -> None:
    group = llama.groups[0]
    # (576 + 512) multiply-adds per head and token instead of (128 + 128).
    assert Mla().attention_flops_per_token(group, llama) == 2 * 32 * (576 + 512 - 256)
    absorbed = {call.name: float(call.work.flops) for call in Mla().decode_ops(group, llama)}
    assert absorbed == {"absorb_query": 2 * 32 * 128 * 512, "expand_output": 2 * 32 * 512 * 128}
    (expand,) = Mla().prefill_ops(1000, group, llama)
    assert float(expand.work.flops) == 2 * 1000 * 512 * 32 * 256


def test_latents_are_neither_made_twice_nor_larger_than_what_they_replace(
    models: dict[str, ModelSpec], fp8_device: DeviceSpec
) -> None:
    for name in ("mla", "xkv", "eigen_attention", "kq_svd"):
        reason = parse_compression(name).check(models["mla"], fp8_device)
        assert reason is not None
        assert "MLA" in reason
    narrow = parse_compression("mla(kv_lora_rank=4096)").check(models["llama-3.1-8b"], fp8_device)
    assert narrow is not None
    assert "more than the 2048" in narrow
    per_head = parse_compression("mla+kivi-4").check(models["llama-3.1-8b"], fp8_device)
    assert per_head is not None
    assert "one latent vector" in per_head


@pytest.mark.parametrize(
    ("name", "reason"),
    [("snapkv+xkv", "several layers together"), ("pyramidkv+xkv", "other tokens"),
     ("h2o+xkv", "other tokens"), ("snapkv+mla", "one latent vector"), ("quest+mla", "one latent vector")],
)  # fmt: skip
def test_selections_that_part_what_is_stored_together_are_refused(name: str, reason: str) -> None:
    with pytest.raises(InvalidSpec, match=reason):
        parse_compression(name)


@pytest.mark.parametrize(
    "name", ["streaming_llm+xkv", "quest+xkv", "snapkv+xkv(layer_group_size=1)", "snapkv+low_rank"]
)
def test_selections_that_leave_them_together_are_not(name: str) -> None:
    parse_compression(name)


def test_bases_found_in_a_prompt_bar_other_requests_from_its_prefix() -> None:
    assert parse_compression("low_rank").bars_prefix_reuse is None
    assert parse_compression("xkv").bars_prefix_reuse == "stores tokens by what the whole prompt holds"
    assert parse_compression("snapkv").bars_prefix_reuse == "evicts tokens"


def test_every_tensor_parallel_rank_holds_the_whole_latent(llama: ModelSpec) -> None:
    shares = []
    for name in ("native", "low_rank", "mla", "mla+fp8"):
        encoding = parse_compression(name).stored
        shares.append(LayerClass(llama.groups[0], encoding, (), None, None, None, kv_heads_per_rank=2).rank_share)
    assert shares == [0.25, 0.25, 1.0, 1.0]
