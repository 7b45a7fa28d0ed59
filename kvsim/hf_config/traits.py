"""What a ``model_type`` fixes in code and its config does not say: biases, norms, gating, tied embeddings.

Source: the modelling files of Hugging Face transformers for each ``model_type``. A type not listed is taken as
llama-like: three MLP matrices, two RMSNorms per layer, no biases. That touches parameter counts only, never KV bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Traits:
    """Facts of one architecture that change its parameter count."""

    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    bias_key: str | None = "attention_bias"
    """Config key that switches the attention biases on."""
    bias_key_covers_output: bool = True
    mlp_bias: bool = False
    mlp_bias_key: str | None = "mlp_bias"
    qk_norm_per_head: bool = False
    """RMSNorm over head_dim on queries and keys."""
    qk_norm_per_layer: bool = False
    """RMSNorm over all heads at once on queries and keys."""
    qk_norm_key: str | None = None
    """Config key that switches the per-head norm on."""
    norms_per_layer: int = 2
    norm_bias: bool = False
    tied: bool = False
    """``tie_word_embeddings`` where the config leaves it out."""
    learned_positions: bool = False
    gated_attention_output: bool = False
    """q_proj carries a gate as wide as the queries (Qwen3-Next)."""
    attention_sinks: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    shared_expert_gate: bool = False
    sliding_by_default: bool = True
    """Whether ``sliding_window`` counts when ``use_sliding_window`` is absent."""
    sliding_pattern: int | None = None
    """Every n-th layer is full where the config gives neither ``layer_types`` nor ``sliding_window_pattern``."""


_LLAMA = Traits()
_QWEN2 = Traits(qkv_bias=True, bias_key=None, sliding_by_default=False)
_QWEN3 = Traits(qk_norm_per_head=True, sliding_by_default=False)
_QWEN3_NEXT = replace(_QWEN3, gated_attention_output=True, shared_expert_gate=True)
_GEMMA2 = Traits(norms_per_layer=4, tied=True, sliding_pattern=2)
_GEMMA3 = replace(_GEMMA2, qk_norm_per_head=True, sliding_pattern=6)
_DEEPSEEK_V3 = Traits(router_bias=True)
_OLD = Traits(
    gated_mlp=False, qkv_bias=True, output_bias=True, bias_key=None, mlp_bias=True, mlp_bias_key=None, norm_bias=True
)

TRAITS: dict[str, Traits] = {
    "cohere": Traits(tied=True, norms_per_layer=1),
    "cohere2": Traits(tied=True, norms_per_layer=1, sliding_pattern=4),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _DEEPSEEK_V3,
    "exaone4": Traits(qk_norm_per_head=True),
    "falcon": replace(
        _OLD,
        qkv_bias=False,
        output_bias=False,
        bias_key="bias",
        mlp_bias=False,
        mlp_bias_key="bias",
        norms_per_layer=1,
        tied=True,
    ),
    "gemma": Traits(tied=True),
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n_text": replace(_GEMMA3, sliding_pattern=5),
    "gemma4": _GEMMA3,
    "gemma4_text": _GEMMA3,
    "glm4_moe": Traits(router_bias=True, bias_key_covers_output=False, qk_norm_key="use_qk_norm"),
    "glm_moe_dsa": _DEEPSEEK_V3,
    "gpt2": replace(_OLD, tied=True, learned_positions=True),
    "gpt_bigcode": replace(_OLD, tied=True, learned_positions=True),
    "gpt_neox": _OLD,
    "gpt_oss": Traits(
        output_bias=True, qkv_bias=True, attention_sinks=True, expert_bias=True, router_bias=True, sliding_pattern=2
    ),
    "gptj": replace(_OLD, qkv_bias=False, output_bias=False, norms_per_layer=1),
    "granite": Traits(tied=True),
    "granitemoehybrid": Traits(tied=True),
    "kimi_k2": _DEEPSEEK_V3,
    "minimax_m2": Traits(qk_norm_per_layer=True, router_bias=True),
    "nemotron": Traits(gated_mlp=False, norm_bias=True),
    "nemotron_h": Traits(gated_mlp=False, norms_per_layer=1, router_bias=True),
    "olmo2": Traits(qk_norm_per_layer=True),
    "olmo3": Traits(qk_norm_per_layer=True, sliding_pattern=4),
    "opt": replace(_OLD, tied=True, learned_positions=True),
    "phi": replace(_OLD, norms_per_layer=1),
    "qwen2": _QWEN2,
    "qwen2_moe": replace(_QWEN2, shared_expert_gate=True),
    "qwen2_vl": _QWEN2,
    "qwen2_vl_text": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_vl_text": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_5_moe": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "smollm3": Traits(tied=True, sliding_by_default=False),
    "starcoder2": replace(
        _OLD, qkv_bias=False, output_bias=False, bias_key="use_bias", mlp_bias=False, mlp_bias_key="use_bias", tied=True
    ),
}


def traits_of(model_type: str) -> Traits:
    """Look up the traits of a ``model_type``; llama-like where the type is not listed."""
    return TRAITS.get(model_type, _LLAMA)
