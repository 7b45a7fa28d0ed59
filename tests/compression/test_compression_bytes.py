"""Exact bytes against published figures."""

from __future__ import annotations

import pytest

from kvsim.compression import Compression, parse_compression, stored_bytes
from kvsim.compression.base import LayerView
from kvsim.compression.encoding.native import Native
from kvsim.specs.base import Dtype
from kvsim.specs.model import ModelSpec
from kvsim.units import GIBI


def _bytes_per_token(name: str, model: ModelSpec) -> float:
    encoding = parse_compression(name).stored
    return sum(group.num_layers * encoding.bytes_per_token(group, model.dtype).total_bytes for group in model.groups)


@pytest.mark.parametrize(
    ("name", "expected"),
    # Llama-3.1-8B, all 32 layers encoded. TurboQuant: vLLM slot bytes 196/134/118/102 x 8 heads x 32 layers.
    [
        ("native", 131_072), ("fp8", 65_536), ("fp8_e5m2", 65_536), ("fp8_per_token_head", 67_584),
        ("int8_per_token_head", 67_584), ("int4_per_token_head", 34_816), ("fp8_per_head", 65_536),
        # ggml-common.h: 34, 24, 22, 20 and 18 B per block of 32.
        ("q8_0", 69_632), ("q5_1", 49_152), ("q4_0", 36_864), ("q8_0/q4_0", 53_248),
        ("q8_0(key_type=q5_0,value_type=q4_1)", 43_008), ("q8_0(value_type=f16)", 100_352),
        # Groups of 64 with 4 B: 64 + 8 B and 32 + 8 B per vector of 128.
        ("kv_adaquant", 28_672), ("kv_adaquant:2/4", 28_672), ("kv_adaquant:8/4", 53_248),
        ("nvfp4", 36_864), ("mxfp4", 34_816),
        ("kivi-4", 40_960), ("kivi-2", 24_576), ("turboquant_k8v4", 50_176), ("turboquant_4bit_nc", 34_304),
        ("turboquant_k3v4_nc", 30_208), ("turboquant_3bit_nc", 26_112), ("low_rank", 65_536),
    ],
)  # fmt: skip
def test_bytes_per_token_of_llama_8b(name: str, expected: int, models: dict[str, ModelSpec]) -> None:
    assert _bytes_per_token(name, models["llama-3.1-8b"]) == expected


@pytest.mark.parametrize(
    ("model_name", "folds"),
    # vLLM blog 2026-05-11 publishes 2.4/3.4/3.7/4.2 and 2.3/3.1/3.4/3.7; two decimals follow from the slot bytes of
    # vllm/model_executor/layers/quantization/turboquant/config.py and two native layers at either end.
    [("llama-3.3-70b", (2.42, 3.35, 3.72, 4.18)), ("qwen3-30b-a3b", (2.30, 3.09, 3.39, 3.76))],
)
def test_turboquant_capacity_gain(model_name: str, folds: tuple[float, ...], models: dict[str, ModelSpec]) -> None:
    model = models[model_name]
    native = stored_bytes(Compression(), model, 4096, 512)
    presets = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc")
    computed = [round(native / stored_bytes(parse_compression(name), model, 4096, 512), 2) for name in presets]
    assert computed == list(folds)


def test_turboquant_boundary_layers(models: dict[str, ModelSpec]) -> None:
    compression = parse_compression("turboquant_4bit_nc")
    model = models["llama-3.1-8b"]
    native = [i for i in range(32) if compression.encoding_for_layer(i, model) == Native()]
    assert native == [0, 1, 30, 31]
    # vLLM counts a sliding model as dense, and one with linear layers as hybrid.
    assert compression.encoding_for_layer(0, models["sliding"]) == Native()
    assert compression.encoding_for_layer(11, models["linear"]) == compression.encoding


@pytest.mark.parametrize(
    ("name", "expected_gib"),
    # Llama-3-8B at 131,072 tokens. KIVI keeps 128 tokens native; Quest holds page bounds in 30 layers (+6.25 %).
    [("native", 16.0), ("snapkv:0.5", 8.0), ("kivi-2", 3.0), ("snapkv:0.5+kivi-2", 1.5), ("quest", 16.0)],
)
def test_long_context_totals(name: str, expected_gib: float, models: dict[str, ModelSpec]) -> None:
    size_bytes = stored_bytes(parse_compression(name), models["llama-3.1-8b"], 131_072, 0)
    residual_bytes = 128 * (131_072 - 24_576) if "kivi" in name else 0
    page_bounds_bytes = 30 * 131_072 * 2 * 8 * 128 * 2 / 16 if name == "quest" else 0
    assert size_bytes == expected_gib * GIBI + residual_bytes + page_bounds_bytes


def test_quest_reads_its_budget(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    selection = parse_compression("quest:1024").selection
    layer = LayerView(5, 32, model.groups[0])
    assert selection.attended_tokens(131_072, layer)(10) == 1024
    assert selection.scan_bytes_per_token(layer.group, 2.0) == 0.0625 * 8 * 128 * 2 * 2


def test_latent_caches(models: dict[str, ModelSpec]) -> None:
    mla, sparse = models["mla"].groups[0], models["sparse-mla"].groups[0]
    fp8 = parse_compression("fp8").encoding
    assert fp8.bytes_per_token(mla, Dtype.BF16).total_bytes == 576
    # DeepSeek-V3.2 in vLLM (fp8_ds_mla): 512 fp8 + 4 fp32 scales + 64 bf16.
    assert fp8.bytes_per_token(sparse, Dtype.BF16).total_bytes == 656
    assert fp8.bytes_per_token(sparse, Dtype.BF16).metadata_bytes == 16
    assert parse_compression("nvfp4").stored.bytes_per_token(mla, Dtype.BF16).total_bytes == 288 + 36


def test_odd_head_dim_rounds_up_and_turboquant_slots_are_even(models: dict[str, ModelSpec]) -> None:
    group = models["odd-heads"].groups[0]
    assert parse_compression("turboquant_k8v4").stored.bytes_per_token(group, Dtype.BF16).total_bytes == 6 * 124
    narrow = group.model_copy(update={"k_head_dim": 7, "v_head_dim": 7, "num_kv_heads": 1})
    # key 7 + value ceil(3.5) + 4 = 15, rounded up to 16
    assert parse_compression("turboquant_k8v4").stored.bytes_per_token(narrow, Dtype.BF16).total_bytes == 16


def test_engine_skip_layers_cost_native_bytes(models: dict[str, ModelSpec]) -> None:
    model, fp8 = models["llama-3.1-8b"], parse_compression("fp8")
    native_layer = 100 * 4096
    assert stored_bytes(fp8, model, 100, 0, (3,)) == stored_bytes(fp8, model, 100, 0) + native_layer / 2
    sliding = models["sliding"]
    all_native_but_full = stored_bytes(fp8, sliding, 500, 0, ("sliding_window",))
    assert all_native_but_full == 6 * 500 * 1024 + 6 * 128 * 2048


def test_low_rank_ranks_scale_bytes(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    assert _bytes_per_token("low_rank(retained_fraction=0.25)", model) == 131_072 / 4
    split = _bytes_per_token("low_rank(retained_fraction=0.25,value_retained_fraction=0.75)", model)
    assert split == 131_072 / 2
