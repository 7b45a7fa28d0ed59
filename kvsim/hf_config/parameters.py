"""Parameter counts from shapes, term by term as the checkpoint stores them; multi-token-prediction layers left out."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.hf_config.layer_groups import LayerShape
from kvsim.hf_config.linear_state import LinearMixer
from kvsim.hf_config.quantization import WeightFormat
from kvsim.hf_config.reader import ConfigReader
from kvsim.hf_config.traits import Traits
from kvsim.specs.model import LayerKind, MlaShape, MoeShape


@dataclass(frozen=True, slots=True)
class Widths:
    """Sizes that parameter counts need beside the layer shapes."""

    hidden_size: int
    expert_input_size: int
    """Width that experts read and write: the hidden size, or Nemotron 3's smaller ``moe_latent_size``."""
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied: bool
    gated_mlp: bool


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of the whole model, by what they do."""

    embedding: int
    attention: int
    """Attention and linear-attention mixers."""
    dense: int
    """Dense and shared MLPs, routers, norms."""
    routed: int
    """All routed experts."""
    active_routed: int
    """The routed experts that one token passes."""

    @property
    def total(self) -> int:
        """Every parameter."""
        return self.embedding + self.attention + self.dense + self.routed

    @property
    def active(self) -> int:
        """Parameters that one token touches, embeddings counted whole."""
        return self.total - self.routed + self.active_routed

    def weight_bits(self, weights: WeightFormat | None) -> float:
        """Mean stored bits of a parameter outside the embeddings."""
        if weights is None:
            return 16.0
        linear = self.attention + self.dense + self.routed
        if weights.experts_only:
            quantised = float(self.routed)
        else:
            quantised = linear - self.attention * weights.skipped_attention_share
        return 16.0 + (weights.bits - 16.0) * quantised / linear


def count_parameters(
    reader: ConfigReader,
    widths: Widths,
    shapes: tuple[LayerShape, ...],
    traits: Traits,
    mla: MlaShape | None,
    moe: MoeShape | None,
    mixer: LinearMixer | None,
) -> ParameterCounts:
    """Count parameters of embeddings, mixers, MLPs and experts."""
    hidden = widths.hidden_size
    mixers = {shape: _mixer_parameters(reader, widths, shape, traits, mla, mixer) for shape in dict.fromkeys(shapes)}
    norm = hidden * (2 if traits.norm_bias else 1)
    attention = sum(mixers[shape] for shape in shapes)
    dense = norm * (traits.norms_per_layer * len(shapes) + 1)
    dense += _mlp_parameters(reader, widths, widths.intermediate_size, traits) * _num_dense_mlps(reader, shapes, moe)
    routed = active_routed = 0
    if moe is not None:
        expert = _expert_parameters(widths, moe.moe_intermediate_size, traits)
        routed = expert * moe.num_experts * len(moe.layers)
        active_routed = expert * moe.num_experts_per_tok * len(moe.layers)
        dense += _router_parameters(reader, widths, moe, traits) * len(moe.layers)
    if traits.learned_positions:
        dense += widths.max_position_embeddings * hidden
    embedding = widths.vocab_size * hidden * (1 if widths.tied else 2)
    dense += _per_layer_embedding(reader, widths, len(shapes))
    return ParameterCounts(embedding, attention, dense, routed, active_routed)


def _num_dense_mlps(reader: ConfigReader, shapes: tuple[LayerShape, ...], moe: MoeShape | None) -> int:
    """Layers with a dense MLP; where MLPs are layers of their own (Nemotron-H) the others have none."""
    expert_layers = set(moe.layers) if moe else set()
    has_mlp_layers = bool(reader.text("hybrid_override_pattern", "")) or any(s.kind is LayerKind.MLP for s in shapes)
    return sum(
        1
        for index, shape in enumerate(shapes)
        if index not in expert_layers and (not has_mlp_layers or shape.kind is LayerKind.MLP)
    )


def _mixer_parameters(
    reader: ConfigReader,
    widths: Widths,
    shape: LayerShape,
    traits: Traits,
    mla: MlaShape | None,
    mixer: LinearMixer | None,
) -> int:
    if shape.kind is LayerKind.MLP:
        return 0
    if shape.kind is LayerKind.LINEAR:
        return mixer.num_parameters if mixer else 0
    beside = mixer.num_parameters if mixer and shape.state_bytes else 0
    if mla is not None:
        return beside + _latent_parameters(reader, widths.hidden_size, shape, mla)
    return beside + _head_parameters(reader, widths.hidden_size, shape, traits)


def _head_parameters(reader: ConfigReader, hidden: int, shape: LayerShape, traits: Traits) -> int:
    query = shape.num_attention_heads * shape.k_head_dim * (2 if traits.gated_attention_output else 1)
    key = shape.num_kv_heads * shape.k_head_dim
    value = 0 if shape.keys_are_values else shape.num_kv_heads * shape.v_head_dim
    out = shape.num_attention_heads * shape.v_head_dim
    total = hidden * (query + key + value) + out * hidden
    biased = traits.bias_key is not None and reader.flag(traits.bias_key, default=False)
    if traits.qkv_bias or biased:
        total += query + key + value
    if traits.output_bias or (biased and traits.bias_key_covers_output):
        total += hidden
    keyed = traits.qk_norm_key is not None and reader.flag(traits.qk_norm_key, default=False)
    if traits.qk_norm_per_head or keyed:
        total += 2 * shape.k_head_dim
    if traits.qk_norm_per_layer:
        total += shape.num_attention_heads * shape.k_head_dim + key
    if traits.attention_sinks:
        total += shape.num_attention_heads
    return total


def _latent_parameters(reader: ConfigReader, hidden: int, shape: LayerShape, mla: MlaShape) -> int:
    """MLA's five projections and two norms; with an indexer, its query, key and head-weight projections."""
    heads = shape.num_attention_heads
    query = heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank is None:
        total = hidden * query
    else:
        total = hidden * mla.q_lora_rank + mla.q_lora_rank + mla.q_lora_rank * query
    total += hidden * (mla.kv_lora_rank + mla.qk_rope_head_dim) + mla.kv_lora_rank
    total += mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim) + heads * mla.v_head_dim * hidden
    if shape.index_head_dim:
        num_index_heads = reader.integer("index_n_heads", maximum=65536)
        rank = mla.q_lora_rank or hidden
        total += rank * num_index_heads * shape.index_head_dim
        total += hidden * (shape.index_head_dim + num_index_heads) + 2 * shape.index_head_dim
    return total


def _mlp_parameters(reader: ConfigReader, widths: Widths, intermediate: int, traits: Traits) -> int:
    hidden, num_inner = widths.hidden_size, 2 if widths.gated_mlp else 1
    total = (num_inner + 1) * hidden * intermediate
    if traits.mlp_bias or (traits.mlp_bias_key is not None and reader.flag(traits.mlp_bias_key, default=False)):
        total += num_inner * intermediate + hidden
    return total


def _expert_parameters(widths: Widths, intermediate: int, traits: Traits) -> int:
    num_inner = 2 if widths.gated_mlp else 1
    bias = num_inner * intermediate + widths.expert_input_size if traits.expert_bias else 0
    return (num_inner + 1) * widths.expert_input_size * intermediate + bias


def _router_parameters(reader: ConfigReader, widths: Widths, moe: MoeShape, traits: Traits) -> int:
    """Router, its bias, projections into and out of a latent, and the shared MLP with its gate, for one layer."""
    shared = moe.shared_intermediate_size
    latent = 2 * widths.hidden_size * widths.expert_input_size if reader.has("moe_latent_size") else 0
    total = latent + widths.hidden_size * moe.num_experts + (moe.num_experts if traits.router_bias else 0)
    if shared:
        total += _mlp_parameters(reader, widths, shared, traits)
        total += widths.hidden_size if traits.shared_expert_gate else 0
    return total


def _per_layer_embedding(reader: ConfigReader, widths: Widths, num_layers: int) -> int:
    """Per-layer input embeddings of Gemma 3n and small Gemma 4 models: a second table and its projections."""
    width = reader.integer("hidden_size_per_layer_input", default=0, minimum=0)
    if not width:
        return 0
    vocab = reader.integer("vocab_size_per_layer_input", default=widths.vocab_size)
    return num_layers * width * (vocab + 3 * widths.hidden_size)
