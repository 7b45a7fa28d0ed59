"""A transformer as far as time, memory and KV cache depend on it. Parsed from Hugging Face configs elsewhere."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from kvsim.specs.base import Dtype, Spec
from kvsim.specs.engine import SamplingSpec

Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
INDEXER_VALUES_PER_SCALE: Final = 128
INDEXER_SCALE_BYTES: Final = 4


class LayerKind(StrEnum):
    """What a layer keeps per token; names follow Hugging Face ``layer_types``."""

    FULL = "full_attention"
    SLIDING = "sliding_attention"
    CHUNKED = "chunked_attention"
    INDEXED = "indexed_attention"
    """Latent attention that reads only an indexer's top-k tokens (DeepSeek sparse attention)."""
    LINEAR = "linear_attention"
    """Linear attention or state space: a fixed state per sequence, nothing per token."""
    MLP = "mlp"
    """No token mixing: an MLP or experts as a layer of its own (Nemotron-H). Keeps nothing."""


class LayerGroup(Spec):
    """Layers with the same attention shape.

    ``num_kv_heads`` x (``k_head_dim`` + ``v_head_dim``) elements are kept per token and layer. Multi-head latent
    attention is one "head" of ``k_head_dim = kv_lora_rank + qk_rope_head_dim`` and ``v_head_dim = 0``.
    """

    kind: LayerKind
    layers: tuple[CountOrZero, ...]
    """Indices of the layers, ascending."""
    num_kv_heads: CountOrZero = 0
    k_head_dim: CountOrZero = 0
    v_head_dim: CountOrZero = 0
    is_latent: bool = False
    """MLA: one latent vector per token, shared by all query heads and replicated on every tensor-parallel rank."""
    window_tokens: Count | None = None
    """Sliding window or chunk length."""
    index_head_dim: CountOrZero = 0
    """Indexer key elements kept per token (DSA)."""
    index_topk: Count | None = None
    state_bytes: CountOrZero = 0
    """Bytes per sequence and layer, whatever its length (linear attention, SSM), in the model's own state dtype."""
    shares_kv: bool = False
    """The layer reads an earlier layer's cache and stores nothing (Gemma 3n, CLA)."""

    @property
    def num_layers(self) -> int:
        """How many layers the group has."""
        return len(self.layers)

    @property
    def kv_elements_per_token(self) -> int:
        """K and V elements stored per token in one layer of the group; 0 where nothing is stored."""
        if self.shares_kv:
            return 0
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim)

    @property
    def index_key_bytes(self) -> int:
        """Bytes of one token's indexer key in one layer: fp8 values, an fp32 scale per 128 (DeepSeek-V3.2: 132)."""
        if self.shares_kv or not self.index_head_dim:
            return 0
        return self.index_head_dim + INDEXER_SCALE_BYTES * math.ceil(self.index_head_dim / INDEXER_VALUES_PER_SCALE)


class MlaShape(Spec):
    """Projection sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_lora_rank: Count | None
    kv_lora_rank: Count
    qk_nope_head_dim: Count
    qk_rope_head_dim: Count
    v_head_dim: Count


class MoeShape(Spec):
    """Mixture-of-experts layers of the model."""

    layers: tuple[CountOrZero, ...]
    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    shared_intermediate_size: CountOrZero = 0


class LinearShape(Spec):
    """Projection size of linear-attention or SSM layers, as parameters per layer."""

    parameters_per_layer: Count


class ModelSpec(Spec):
    """Everything the cost model needs from one Hugging Face ``config.json``."""

    name: str
    source: str
    """Where the config was read: hub id with revision, or a file."""
    architecture: str
    hidden_size: Count
    num_attention_heads: Count
    vocab_size: Count
    intermediate_size: CountOrZero
    """Dense MLP width; 0 where every layer is MoE."""
    gated_mlp: bool = True
    """Three MLP matrices (SwiGLU, GeGLU) instead of two."""
    tie_word_embeddings: bool = False
    max_position_embeddings: Count
    dtype: Dtype = Dtype.BF16
    """Activation and native KV dtype."""
    weight_dtype: Dtype = Dtype.BF16
    """Dtype of the linear layers' weights."""
    weight_bits: Annotated[float, Field(gt=0)] = 16.0
    """Stored bits per linear weight, scales included."""
    groups: tuple[LayerGroup, ...] = Field(min_length=1)
    mla: MlaShape | None = None
    moe: MoeShape | None = None
    linear: LinearShape | None = None
    num_parameters: Count
    """All parameters, embeddings included."""
    num_active_parameters: Count
    """Parameters that one token touches (equal to all for a dense model)."""
    generation: SamplingSpec | None = None
    """Default sampling parameters as the model's publisher states them; None where its source has none."""
    num_embedding_parameters: Count
    """Input embedding and LM head, kept in ``dtype``."""
    num_encoder_parameters: CountOrZero = 0
    """Encoders of other modalities beside the language model (vision), where the config describes them."""
    rotary_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of a head that rotary embedding turns (``partial_rotary_factor``)."""

    @model_validator(mode="after")
    def _every_layer_once(self) -> Self:
        seen = sorted(layer for group in self.groups for layer in group.layers)
        if seen != list(range(len(seen))):
            msg = "layer groups must cover every layer exactly once"
            raise ValueError(msg)
        if self.num_active_parameters > self.num_parameters:
            msg = "num_active_parameters exceeds num_parameters"
            raise ValueError(msg)
        return self

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return sum(group.num_layers for group in self.groups)

    @property
    def kv_groups(self) -> tuple[LayerGroup, ...]:
        """Groups that store something per token."""
        return tuple(group for group in self.groups if group.kv_elements_per_token > 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights on one copy of the model: linear layers quantised, embeddings in ``dtype``."""
        linear = self.num_parameters - self.num_embedding_parameters
        return round(linear * self.weight_bits / 8) + self.num_embedding_parameters * 2

    @property
    def layer_weight_bytes(self) -> float:
        """Bytes of the mean layer's weights."""
        return (self.num_parameters - self.num_embedding_parameters) * self.weight_bits / 8 / self.num_layers

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts' weights; 0 for a dense model."""
        if self.moe is None:
            return 0
        matrices = 3 if self.gated_mlp else 2
        each = matrices * self.hidden_size * self.moe.moe_intermediate_size
        return round(len(self.moe.layers) * self.moe.num_experts * each * self.weight_bits / 8)

    @property
    def is_hybrid(self) -> bool:
        """Whether layers differ in kind (sliding beside full, linear beside full, ...)."""
        return len({group.kind for group in self.groups}) > 1
