"""Ada-KV: heads that spread their attention keep more of a layer's budget than heads that concentrate it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads, native_token_bytes
from kvsim.compression.selection.ragged import RaggedSelection
from kvsim.compression.selection.scorers import ScorerBackedSelection
from kvsim.numerics.head_budgets import joint_top_k
from kvsim.ops import OpCall, compact, compression_calls, select_top_k

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import BoolArray, KvTensors


class AdaKV(RaggedSelection, ScorerBackedSelection):
    """The best tokens of all KV heads of a layer together, by any scorer (arXiv 2407.11550).

    ``alpha_safeguard`` of an equal share is each head's own in any case. The rule is that of kvpress's AdaKVPress.
    Layers get what the scorer gives them (PyramidKV: unequal budgets).
    """

    names: ClassVar = {"adakv": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"ada_kv": "adakv"}
    summaries: ClassVar = {
        "adakv": "a layer's budget shared over its heads by one top-k, 20 % of it equally; Ada-KV, arXiv 2407.11550"
    }
    family: ClassVar = "eviction"
    masked_in: ClassVar = "NVIDIA/kvpress, kvpress/presses/adakv_press.py and attention_patch.py"
    freed_in: ClassVar = "FFY0/AdaKV (flattened cache, attention over heads of unequal length)"

    kind: Literal["adakv"] = "adakv"
    alpha_safeguard: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share of the average budget that each head keeps whatever its scores (kvpress and paper: 0.2)."""

    @property
    def keeps_newest(self) -> bool:
        return self.scored.keeps_newest

    def layer_band(self, layer: LayerView) -> int:
        return self.scored.layer_band(layer)

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        return self.scored.kept_tokens(prompt_tokens, layer)

    def fullest_rank(self, ranks: int) -> float:
        """Most that one rank can hold over the mean: all but what the safeguard leaves the heads of the others."""
        return min(super().fullest_rank(ranks), ranks - (ranks - 1) * self.alpha_safeguard)

    def keep_mask(self, kv: KvTensors, layer: LayerView) -> BoolArray:
        scores = self.scored.scores(kv, layer)
        heads, tokens = scores.shape
        kept = self.kept_tokens(tokens, layer)
        # A head of which nothing were left would have no output at all.
        return joint_top_k(scores, heads * kept, max(1, int(kept * self.alpha_safeguard)))

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        heads, kept = kv_heads(layer.group), self.kept_tokens(prompt_tokens, layer)
        if heads == 0 or self.scored.average_tokens(prompt_tokens) >= prompt_tokens:
            return ()
        works = {**self.scored.score_works(prompt_tokens, layer, model)}
        if self.alpha_safeguard:
            works["select_safeguard"] = select_top_k(prompt_tokens, heads)
        works["select_across_heads"] = select_top_k(prompt_tokens * heads, 1)
        if not self.masked:
            works["compact_kv"] = compact(kept, native_token_bytes(layer.group, model))
        return compression_calls(works)
