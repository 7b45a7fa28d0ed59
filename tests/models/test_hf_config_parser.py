"""The parser against every shape of config: what it reads, what it refuses, and that it never fails otherwise."""

import copy
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.data_files import preset_dir
from kvsim.errors import InvalidSpec
from kvsim.hf_config import parse_hf_config
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerKind, ModelSpec

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 32,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
GATED_DELTA_NET: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}


def parse(config: Any, **changes: Any) -> ModelSpec:
    return parse_hf_config({**config, **changes}, name="tiny", source="test")


def kinds(model: ModelSpec) -> str:
    letters = {"full_attention": "F", "sliding_attention": "S", "chunked_attention": "C", "indexed_attention": "I",
               "linear_attention": "L", "mlp": "-"}  # fmt: skip
    by_layer = {layer: letters[group.kind] for group in model.groups for layer in group.layers}
    return "".join(by_layer[layer] for layer in range(model.num_layers))


def refused(config: Any, **changes: Any) -> str:
    with pytest.raises(InvalidSpec) as caught:
        parse(config, **changes)
    return str(caught.value)


def test_grouped_query_attention():
    (group,) = parse(LLAMA).groups
    assert (group.kind, group.num_kv_heads, group.k_head_dim, group.v_head_dim) == (LayerKind.FULL, 2, 16, 16)


def test_kv_heads_default_to_query_heads():
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert parse(config).groups[0].num_kv_heads == 4


def test_explicit_head_dim_wins_and_null_counts_as_absent():
    assert parse(LLAMA, head_dim=32).groups[0].k_head_dim == 32
    assert parse(LLAMA, head_dim=None).groups[0].k_head_dim == 16


def test_value_heads_may_differ_in_width():
    (group,) = parse(LLAMA, head_dim=24, v_head_dim=8).groups
    assert (group.k_head_dim, group.v_head_dim, group.kv_elements_per_token) == (24, 8, 64)


def test_multimodal_config_counts_only_its_language_model():
    wrapped = {
        "model_type": "some_vl",
        "text_config": LLAMA,
        "vision_config": {"hidden_size": 9999},
        "torch_dtype": "float16",
        "tie_word_embeddings": True,
    }
    model = parse(wrapped)
    assert model.groups == parse(LLAMA).groups
    assert (model.dtype, model.tie_word_embeddings) == (Dtype.FP16, True)
    assert model.num_embedding_parameters == 100 * 64
    assert model.num_parameters == parse(LLAMA).num_parameters - 100 * 64


def test_latent_attention_is_one_replicated_head():
    (group,) = parse(LLAMA, **LATENT).groups
    assert (group.num_kv_heads, group.k_head_dim, group.v_head_dim, group.is_latent) == (1, 36, 0, True)
    assert group.kind is LayerKind.FULL


def test_indexer_makes_latent_attention_sparse():
    (group,) = parse(LLAMA, **LATENT, index_head_dim=8, index_n_heads=2, index_topk=64).groups
    assert (group.kind, group.is_latent, group.index_head_dim, group.index_topk) == (LayerKind.INDEXED, True, 8, 64)


def test_shared_indexers_store_no_key():
    types = ["full", "shared", "shared", "shared"] * 2
    model = parse(LLAMA, **LATENT, index_head_dim=8, index_n_heads=2, index_topk=64, indexer_types=types)
    assert {group.index_head_dim: group.num_layers for group in model.groups} == {8: 2, 0: 6}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "mistral", "sliding_window": 256}, "SSSSSSSS"),
        ({"model_type": "mistral", "sliding_window": None}, "FFFFFFFF"),
        ({"model_type": "mistral", "sliding_window": 4096}, "FFFFFFFF"),
        ({"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": False}, "FFFFFFFF"),
        ({"model_type": "qwen2", "sliding_window": 256, "max_window_layers": 6}, "FFFFFFFF"),
        (
            {"model_type": "qwen2", "sliding_window": 256, "use_sliding_window": True, "max_window_layers": 6},
            "FFFFFFSS",
        ),
        ({"model_type": "gemma2", "sliding_window": 256}, "SFSFSFSF"),
        ({"model_type": "gemma3_text", "sliding_window": 256}, "SSSSSFSS"),
        ({"model_type": "gemma3_text", "sliding_window": 256, "sliding_window_pattern": 4}, "SSSFSSSF"),
        ({"model_type": "exaone4", "sliding_window": 256, "sliding_window_pattern": "LLLG"}, "SSSFSSSF"),
        (
            {"model_type": "qwen3", "sliding_window": 256, "use_sliding_window": False,
             "layer_types": ["sliding_attention", "full_attention"] * 4},
            "SFSFSFSF",
        ),
        ({"model_type": "llama4_text", "attention_chunk_size": 128}, "CCCFCCCF"),
        ({"model_type": "llama4_text", "attention_chunk_size": 128, "no_rope_layers": [1, 0] * 4}, "CFCFCFCF"),
        ({"model_type": "mimo_v2_flash", "attention_chunk_size": 128, "sliding_window": 128,
          "hybrid_layer_pattern": [0, 1, 1, 1, 0, 1, 1, 1]}, "FSSSFSSS"),
        ({"full_attention_interval": 4, **GATED_DELTA_NET}, "LLLFLLLF"),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*M-ME", "num_local_experts": 4,
             "num_experts_per_tok": 1, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
             "ssm_state_size": 16, "conv_kernel": 4},
            "L-LFL-L-",
        ),
        (
            {"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 2, "mamba_d_state": 4,
             "mamba_d_conv": 4},
            "LLFLLLFL",
        ),
        (
            {"layers_block_type": ["mamba", "attention"] * 4, "mamba_n_heads": 4, "mamba_d_head": 8,
             "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4},
            "LFLFLFLF",
        ),
        ({**LATENT, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64,
          "layer_types": ["deepseek_sparse_attention"] * 8}, "IIIIIIII"),
    ],
)  # fmt: skip
def test_layer_kinds(changes: dict[str, Any], expected: str):
    assert kinds(parse(LLAMA, **changes)) == expected


def test_gated_delta_net_state_is_matrix_and_convolution():
    model = parse(LLAMA, full_attention_interval=4, **GATED_DELTA_NET)
    state = next(group for group in model.groups if group.kind is LayerKind.LINEAR)
    assert state.state_bytes == 4 * 8 * 16 * 2 + (2 * 16 + 64) * 3 * 2
    assert state.kv_elements_per_token == 0
    wide = parse(LLAMA, full_attention_interval=4, mamba_ssm_dtype="float32", **GATED_DELTA_NET)
    assert wide.groups[0].state_bytes - state.state_bytes == 4 * 8 * 16 * 2


def test_falcon_h1_runs_attention_and_state_space_in_every_layer():
    (group,) = parse(
        LLAMA, model_type="falcon_h1", mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_n_groups=1,
        mamba_d_state=16, mamba_d_conv=4,
    ).groups  # fmt: skip
    assert group.kind is LayerKind.FULL
    assert group.state_bytes == 32 * 16 * 2 + (32 + 32) * 3 * 2
    assert group.kv_elements_per_token > 0


def test_last_layers_share_an_earlier_cache():
    model = parse(LLAMA, num_kv_shared_layers=3)
    sharing = [group for group in model.groups if group.shares_kv]
    assert [group.layers for group in sharing] == [(5, 6, 7)]
    assert sum(group.num_layers for group in model.kv_groups) == 5


def test_gemma4_global_layers_have_their_own_heads():
    model = parse(
        LLAMA, model_type="gemma4_text", sliding_window=256, head_dim=16, global_head_dim=32,
        layer_types=["sliding_attention"] * 7 + ["full_attention"], attention_k_eq_v=True,
        num_global_key_value_heads=1,
    )  # fmt: skip
    sliding, full = model.groups
    assert (sliding.num_kv_heads, sliding.k_head_dim, sliding.v_head_dim) == (2, 16, 16)
    assert (full.num_kv_heads, full.k_head_dim, full.v_head_dim) == (1, 32, 32)


@pytest.mark.parametrize(
    ("changes", "layers", "shared"),
    [
        ({"num_local_experts": 4, "num_experts_per_tok": 2}, tuple(range(8)), 0),
        ({"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1, 5, 7), 0),
        ({"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 3, "n_shared_experts": 2,
          "moe_intermediate_size": 16}, (3, 4, 5, 6, 7), 32),
        ({"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_layer_freq": [0, 1] * 4}, (1, 3, 5, 7), 0),
        ({"model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1,
          "interleave_moe_layer_step": 2, "intermediate_size_mlp": 256}, (1, 3, 5, 7), 128),
        ({"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 4, "expert_layer_offset": 1}, (1, 5), 0),
        ({"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48}, tuple(range(8)), 48),
        ({"num_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense"] * 6 + ["sparse"] * 2}, (6, 7), 0),
    ],
)  # fmt: skip
def test_expert_layers(changes: dict[str, Any], layers: tuple[int, ...], shared: int):
    model = parse(LLAMA, **changes)
    assert model.moe is not None
    assert (model.moe.layers, model.moe.shared_intermediate_size) == (layers, shared)
    expert = 3 * 64 * model.moe.moe_intermediate_size
    idle = model.moe.num_experts - model.moe.num_experts_per_tok
    assert model.num_parameters - model.num_active_parameters == idle * expert * len(layers)
    assert (model.intermediate_size == 0) == (len(layers) == 8)


def test_nemotron_lists_its_layers_and_narrows_its_experts():
    config = {key: value for key, value in LLAMA.items() if key != "num_hidden_layers"}
    model = parse(
        config, model_type="nemotron_h", layers_block_type=["mamba", "moe", "attention", "moe"], n_routed_experts=4,
        num_experts_per_tok=1, moe_intermediate_size=32, moe_latent_size=16, mamba_num_heads=4, mamba_head_dim=8,
        n_groups=1, ssm_state_size=16, conv_kernel=4,
    )  # fmt: skip
    assert kinds(model) == "L-F-"
    assert model.moe is not None
    assert model.moe.layers == (1, 3)
    assert model.num_parameters - model.num_active_parameters == 2 * 3 * (2 * 16 * 32)


def test_null_experts_mean_a_dense_model():
    assert parse(LLAMA, num_experts=None, top_k_experts=None).moe is None


@pytest.mark.parametrize(
    ("quantization", "dtype", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Dtype.FP8, 8 + 32 / 16384),
        ({"quant_method": "fp8"}, Dtype.FP8, 8.0),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, Dtype.INT4, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, Dtype.INT8, 8 + 24 / 128),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, Dtype.INT4, 4.0),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Dtype.INT4, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Dtype.INT8, 8.0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Dtype.FP4, 4.5),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Dtype.FP8, 8.0),
        ({"quant_algo": "FP8", "ignore": ["lm_head"]}, Dtype.FP8, 8.0),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}},
         Dtype.FP8, 8.0),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}}},
         Dtype.INT4, 4 + 16 / 128),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}}, Dtype.FP4, 4.5),
    ],
)  # fmt: skip
def test_weight_quantization(quantization: dict[str, Any], dtype: Dtype, bits: float):
    model = parse(LLAMA, quantization_config=quantization)
    assert model.weight_dtype is dtype
    assert model.weight_bits == pytest.approx(bits)


def test_mxfp4_covers_experts_only_and_kept_attention_stays_wide():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixed = parse(LLAMA, **experts, quantization_config={"quant_method": "mxfp4"})
    assert 4.25 < mixed.weight_bits < 16
    kept = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    half = {"quant_method": "fp8", "ignore": [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]}
    bits = [parse(LLAMA, quantization_config=q).weight_bits for q in (kept, half, {"quant_method": "fp8"})]
    assert bits[0] > bits[1] > bits[2] == 8.0
    assert bits[0] - 8 == pytest.approx(2 * (bits[1] - 8))


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        (
            {"layer_types": ["full_attention"] * 7 + ["wavelet_attention"]},
            ["layer_types", "wavelet_attention", "known"],
        ),
        ({"layer_types": ["full_attention"]}, ["layer_types", "1 entries", "8"]),
        ({"hybrid_override_pattern": "MM*MMMMZ"}, ["hybrid_override_pattern", "'Z'", "known"]),
        ({"layer_types": ["sliding_attention"] * 8}, ["sliding_window"]),
        ({"layer_types": ["linear_attention"] * 8}, ["linear_num_value_heads", "mamba"]),
        ({"compress_ratios": [0, 4]}, ["compress_ratios", "DeepSeek-V4"]),
        ({"block_configs": [{}]}, ["block_configs"]),
        ({"attn_type_list": [1, 0]}, ["attn_type_list", "lightning"]),
        ({"attention_chunk_size": 128}, ["attention_chunk_size", "layer_types"]),
        ({"num_attention_heads": None}, ["num_attention_heads", "missing"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ({"num_experts": 4, "num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "4"]),
        ({"torch_dtype": "float3"}, ["torch_dtype", "float3", "bfloat16"]),
        ({"quantization_config": {"quant_method": "magic"}}, ["quant_method", "magic", "awq"]),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "X"}}, ["quant_algo", "NVFP4"]),
        ({"num_kv_shared_layers": 8}, ["num_kv_shared_layers", "8"]),
        ({"is_encoder_decoder": True}, ["is_encoder_decoder"]),
        ({"kv_lora_rank": 32}, ["qk_rope_head_dim", "missing"]),
        ({"text_config": 3}, ["text_config"]),
    ],
)
def test_refusals_name_the_key_the_value_and_what_is_known(changes: dict[str, Any], mentions: list[str]):
    message = refused(LLAMA, **changes)
    assert message.startswith("tiny: ")
    for mention in mentions:
        assert mention in message


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_that_is_no_object_is_refused(config: Any):
    with pytest.raises(InvalidSpec, match="must be an object"):
        parse_hf_config(config, name="tiny", source="test")


PRESET_CONFIGS = [json.loads(path.read_text())["config"] for path in sorted(preset_dir("models").glob("*.json"))]
ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.integers(-2, 70),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["MM*-E", "float32", "auto", "nope", "full_attention"]),
    st.lists(st.one_of(st.integers(-1, 3), st.sampled_from(["full_attention", "sparse", "shared", ""])), max_size=70),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=3),
)


@st.composite
def broken_configs(draw: st.DrawFn) -> dict[str, Any]:
    config = copy.deepcopy(draw(st.sampled_from(PRESET_CONFIGS)))
    for _ in range(draw(st.integers(1, 4))):
        inner = [config] + [value for value in config.values() if isinstance(value, dict)]
        target = draw(st.sampled_from(inner))
        other = draw(st.sampled_from(PRESET_CONFIGS))
        key = draw(st.sampled_from(sorted(set(target) | set(other))))
        if draw(st.booleans()):
            target[key] = draw(ODD_VALUES)
        elif key in other:
            target[key] = copy.deepcopy(other[key])
        else:
            target.pop(key, None)
    return config


@settings(max_examples=600, deadline=None)
@given(broken_configs())
def test_any_damage_either_parses_or_is_refused_by_key(config: dict[str, Any]):
    try:
        model = parse(config)
    except InvalidSpec as error:
        message = str(error)
    else:
        assert model.num_layers > 0
        assert 0 < model.num_active_parameters <= model.num_parameters
        assert model.weight_bytes > 0
        return
    assert re.match(r"tiny: (?:[\w.:]+: )*\w+(?:\.\w+)*: ", message), message
