"""KVzip: what a model looks at when it repeats its prompt is what it needs of it, whatever the question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.base import acts_on
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads, native_token_bytes
from kvsim.compression.selection.ragged import RaggedSelection
from kvsim.compression.selection.reconstruction import reconstruction_scores
from kvsim.compression.selector import layer_view
from kvsim.numerics.head_budgets import joint_top_k
from kvsim.numerics.ranking import mark_largest
from kvsim.ops import (
    OpCall,
    Work,
    attend_again,
    compact,
    compression_calls,
    most_attention,
    read_again,
    select_top_k,
)
from kvsim.specs.base import DTYPE_BITS
from kvsim.tensors.kv import REPEAT_CHUNK

if TYPE_CHECKING:
    from kvsim.numerics.arrays import DoubleArray
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import BoolArray, KvTensors, SignalName


class KVzip(RaggedSelection):
    """Reads the prompt a second time and keeps the tokens that it looks at most then (arXiv 2505.23416).

    Score and budgets are those of the authors' code (snu-mllab/KVzip) and of kvpress: the most attention from any query
    of the second reading, and one top-k over all layers and heads, so budgets move between both. Pricing gives every
    layer the mean; the sum is exact. The newest token always stays, which is ours; the authors keep the system prompt
    and kvpress the first ``n_sink`` tokens. Needs no question, so that one compressed cache serves many.

    The second reading is charged as done: all linear layers but the LM head for n more tokens, attention of n queries
    to the prompt and their own chunk, and scores from logits that fused attention does not hand out. Requests to
    repeat (about 20 tokens a chunk) are left out.
    """

    names: ClassVar = {"kvzip": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    summaries: ClassVar = {
        "kvzip": "half of the prompt removed unless set, scored by reading it again; KVzip, arXiv 2505.23416"
    }
    family: ClassVar = "eviction"
    masked_in: ClassVar = "NVIDIA/kvpress, kvpress/presses/kvzip_press.py and attention_patch.py"
    freed_in: ClassVar = "snu-mllab/KVzip (flattened cache, attention over heads of unequal length)"

    kind: Literal["kvzip"] = "kvzip"
    budget_over: Literal["model", "layer", "head"] = "model"
    """Who shares a budget: all layers and heads (the default of both codes), the heads of a layer (kvpress's
    ``layerwise``), or nobody, each head keeping as many (the authors' ``uniform``)."""
    n_sink: NonNegativeInt = 4
    """First tokens that always stay (kvpress's default)."""

    @property
    def granularity(self) -> str:
        return "head" if self.budget_over == "head" else "ragged"

    @property
    def moves_budgets(self) -> bool:
        return self.evicts and self.budget_over == "model"

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        return frozenset({"repeat_queries"})

    def fullest_rank(self, ranks: int) -> float:
        return 1.0 if self.budget_over == "head" else super().fullest_rank(ranks)

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        return max(self.budget(prompt_tokens), min(prompt_tokens, self.n_sink + 1))

    def prefill_scratch_tokens(self, layer: LayerView) -> int:
        return REPEAT_CHUNK if self.compression_ratio != 0.0 else 0

    def keep_mask(self, kv: KvTensors, layer: LayerView) -> BoolArray:
        return self.keep_masks(kv)[layer.index]

    def keep_masks(self, kv: KvTensors) -> list[BoolArray]:
        kept = self.kept_tokens(kv.layers[0].num_tokens, layer_view(kv, 0))
        scores = [self._scores(kv, index) for index in range(kv.num_layers)]
        if self.budget_over == "head":
            return [mark_largest(rows, kept) for rows in scores]
        if self.budget_over == "layer":
            return [joint_top_k(rows, len(rows) * kept) for rows in scores]
        rows = np.concatenate(scores)
        return np.split(joint_top_k(rows, len(rows) * kept), np.cumsum([len(one) for one in scores])[:-1])

    def _scores(self, kv: KvTensors, index: int) -> DoubleArray:
        scores = reconstruction_scores(kv, index, self.kind, self.n_sink)
        scores[:, : self.n_sink] = np.inf
        scores[:, -1] = np.inf
        return scores

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group, kept = layer.group, self.kept_tokens(prompt_tokens, layer)
        heads = kv_heads(group)
        if heads == 0 or kept >= prompt_tokens:
            return ()
        token_bytes = native_token_bytes(group, model)
        works = {
            **self._second_reading(prompt_tokens, layer, model),
            "select_across_heads": select_top_k(prompt_tokens * heads, 1),
        }
        if not self.masked:
            works["compact_kv"] = compact(kept, token_bytes)
        return compression_calls(works)

    def _second_reading(self, tokens: int, layer: LayerView, model: ModelSpec) -> dict[str, Work]:
        """The share of one layer: layers that the selection leaves alone are read again too, and shared out."""
        group, element_bytes = layer.group, DTYPE_BITS[model.dtype] / 8
        scored = sum(one.num_layers for one in model.groups if acts_on(one) and kv_heads(one))
        parameters = (model.num_active_parameters - model.num_embedding_parameters) / scored
        weights = (model.num_parameters - model.num_embedding_parameters) * model.weight_bits / 8 / scored
        token_bytes, queries = group.kv_elements_per_token * element_bytes, model.num_attention_heads
        return {
            "read_again": read_again(tokens, parameters, weights, REPEAT_CHUNK),
            "attend_again": attend_again(
                tokens, queries, token_bytes, group.k_head_dim, group.v_head_dim or group.k_head_dim, REPEAT_CHUNK
            ),
            "most_attention": most_attention(
                tokens, queries, kv_heads(group), group.k_head_dim, element_bytes, REPEAT_CHUNK, self.n_sink
            ),
        }
