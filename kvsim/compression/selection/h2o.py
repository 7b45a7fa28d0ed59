"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import (
    DEFAULT_COMPRESSION_RATIO,
    BudgetedSelection,
    kv_heads,
    native_token_bytes,
)
from kvsim.compression.selection.prompt_attention import heaviest_and_newest, received_attention
from kvsim.ops import Component, OpCall, accumulate_attention, compact, compression_calls, select_top_k
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, KvTensors


class HeavyHitterSelection(BudgetedSelection):
    """Half the budget for tokens with the largest accumulated attention, half for the newest: H2O, and who merges.

    The budget is fixed when the prompt ends and holds through decode: each new token pushes out the lightest one.
    Scores need every attention probability, which fused attention never holds: prefill computes them again, and each
    step adds its own. A compression_ratio of 0 keeps everything.
    """

    def budget(self, prompt_tokens: int) -> int:
        # However small the share, the newest token stays.
        return max(super().budget(prompt_tokens), min(prompt_tokens, 1))

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        if not self.evicts:
            return growing(prompt_tokens)
        return growing(prompt_tokens, self.budget_tokens or max(1, self.budget(prompt_tokens)))

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        """Sums over all prompt queries that the tensors have: H2O's own scores only where that is all of them."""
        layer_kv = kv.layers[layer.index]
        tokens = layer_kv.num_tokens
        kept = self.resident_tokens(tokens, layer)(0)
        if kept >= tokens:
            return None
        return half_heavy_half_new(received_attention(layer_kv, kv.attention_scale), kept)

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group = layer.group
        heads = kv_heads(group)
        if heads == 0 or not self.evicts:
            return ()
        element_bytes = DTYPE_BITS[model.dtype] / 8
        score = accumulate_attention(prompt_tokens, model.num_attention_heads, heads, group.k_head_dim, element_bytes)
        works = {"accumulate_attention": score}
        kept = self.budget(prompt_tokens)
        if kept < prompt_tokens:
            works["select_top_k"] = select_top_k(prompt_tokens, heads)
            works["compact_kv"] = compact(kept, native_token_bytes(group, model))
        return compression_calls(works)

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group = layer.group
        if kv_heads(group) == 0 or not self.evicts:
            return ()
        token_bytes = native_token_bytes(group, model)
        return (OpCall("replace_lightest_token", compact(1, token_bytes), Component.COMPRESSION),)

    def decode_score_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if kv_heads(group) == 0 or not self.evicts:
            return 0.0
        # One add per query head into its KV head's score, one compare per KV head to find the lightest.
        return float(model.num_attention_heads + group.num_kv_heads)


def half_heavy_half_new(scores: FloatArray, kept: int) -> IntArray:
    """Indices of ``kept`` tokens of each head, (H, kept) ascending, by the scores of all, (H, n)."""
    heavy, newest = kept // 2, kept - kept // 2
    return heaviest_and_newest(scores[:, : scores.shape[1] - newest], heavy, newest)


class H2O(HeavyHitterSelection):
    """The method itself (arXiv 2306.14048)."""

    names: ClassVar = {"h2o": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    summaries: ClassVar = {
        "h2o": "heavy hitters and newest tokens, bounded by half of the prompt unless set; H2O, arXiv 2306.14048"
    }

    family: ClassVar = "eviction"

    kind: Literal["h2o"] = "h2o"
