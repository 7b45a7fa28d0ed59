"""Multi-head latent attention as an architecture: what a model of this shape would store had it been trained so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from kvsim.compression.codec import ReductionCodec
from kvsim.compression.reduction.base import Reduction
from kvsim.errors import NotRunnable
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup, LayerKind

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class Mla(Reduction):
    """One latent of ``kv_lora_rank`` + ``qk_rope_head_dim`` numbers per token and full-attention layer.

    DeepSeek-V2's multi-head latent attention (arXiv 2405.04434) in place of K and V per head; sliding and chunked
    layers stay. The model must be trained so, or converted (TransMLA, arXiv 2502.07864), so nothing runs on tensors
    and no score carries over. Every tensor-parallel rank holds the whole latent.

    Decode is absorbed: each query head is taken to ``kv_lora_rank`` dimensions, attention runs over the latent, and the
    result is expanded per head. Prefill expands the latent to K and V per head. The down projection takes the place of
    the K and V projections and is smaller; that the model's own stay priced makes this an upper bound.
    """

    names: ClassVar = {"mla": {}}
    summaries: ClassVar = {
        "mla": "one latent of 512 + 64 per token and layer; an architecture, DeepSeek-V2, arXiv 2405.04434"
    }

    family: ClassVar = "architecture"

    kind: Literal["mla"] = "mla"
    kv_lora_rank: PositiveInt = 512
    """Numbers of the latent that keys and values are made of."""
    qk_rope_head_dim: NonNegativeInt = 64
    """Numbers of the key part that carries the position, one for all heads."""

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        if not _becomes_latent(group):
            return group
        shape = {
            "num_kv_heads": 1,
            "k_head_dim": self.kv_lora_rank + self.qk_rope_head_dim,
            "v_head_dim": 0,
            "is_latent": True,
        }
        return group.model_copy(update=shape)

    @property
    def is_replicated(self) -> bool:
        return True

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if not _becomes_latent(group) or not prompt_tokens:
            return ()
        per_head = model.num_attention_heads * (group.k_head_dim + group.v_head_dim)
        work = project_rows(prompt_tokens, self.kv_lora_rank, per_head, DTYPE_BITS[model.dtype] / 8)
        return (OpCall("expand_latent", work, Component.COMPRESSION),)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if not _becomes_latent(group):
            return ()
        heads, element_bytes = model.num_attention_heads, DTYPE_BITS[model.dtype] / 8
        absorb = project_rows(heads, group.k_head_dim, self.kv_lora_rank, element_bytes)
        expand = project_rows(heads, self.kv_lora_rank, group.v_head_dim, element_bytes)
        return (
            OpCall("absorb_query", absorb, Component.COMPRESSION),
            OpCall("expand_output", expand, Component.COMPRESSION),
        )

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if not _becomes_latent(group):
            return 0.0
        # Scores over latent and RoPE part, weighted sum over the latent, against K and V per head.
        wider = 2 * self.kv_lora_rank + self.qk_rope_head_dim - group.k_head_dim - group.v_head_dim
        return 2.0 * model.num_attention_heads * max(0, wider)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.is_latent for group in model.kv_groups):
            return (
                f"mla reshapes K and V per head, but {model.name} already keeps one latent vector for all heads (MLA)"
            )
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        for group in model.kv_groups:
            if _becomes_latent(group) and latent > group.kv_elements_per_token:
                return (
                    f"mla would keep {latent} numbers per token and layer, more than the {group.kv_elements_per_token} "
                    f"that {model.name} keeps; set kv_lora_rank and qk_rope_head_dim lower"
                )
        return None

    def codec(self) -> ReductionCodec:
        raise NotRunnable(self.kind, "an architecture: the model must be trained with it or converted to it")


def _becomes_latent(group: LayerGroup) -> bool:
    return group.kind is LayerKind.FULL and not group.is_latent and group.kv_elements_per_token > 0
