"""TOVA: what the newest query looks at least is dropped, in every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads, native_token_bytes
from kvsim.compression.selection.prompt_attention import received_attention
from kvsim.compression.selection.scored import ScoredSelection
from kvsim.ops import Component, OpCall, Work, compact, score_with_window
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, KvTensors


class Tova(ScoredSelection):
    """Keep what the newest query attends to, averaged over all heads of a layer (arXiv 2401.06104).

    The bound is set when the prompt ends and holds through decode, as in the paper: each step scores all tokens anew by
    its own query and drops the lightest. Heads of a layer keep the same tokens. The newest token stays by right
    (kvpress; the paper lets its weight decide). Fused attention keeps its weights to itself, so each step multiplies
    the query with all keys once more, which is charged. A compression_ratio of 0 keeps everything.
    """

    names: ClassVar = {"tova": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    summaries: ClassVar = {
        "tova": "half of the prompt unless set, bounded through decode, by the newest query; TOVA, arXiv 2401.06104"
    }

    kind: Literal["tova"] = "tova"

    @property
    def granularity(self) -> str:
        return "layer"

    @property
    def observed_queries(self) -> int:
        return 1

    @property
    def query_aware(self) -> bool:
        return True

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        if not self.evicts:
            return growing(prompt_tokens)
        return growing(prompt_tokens, self.budget_tokens or max(1, self.budget(prompt_tokens)))

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        found = received_attention(kv.layers[layer.index], kv.attention_scale, 1)
        scores = np.broadcast_to(found.mean(axis=0), found.shape).copy()
        scores[:, -1] = np.inf
        return scores

    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        return {"score_with_newest_query": _newest_query(prompt_tokens, layer.group, model)}

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        if kv_heads(layer.group) == 0 or not self.evicts:
            return ()
        token_bytes = native_token_bytes(layer.group, model)
        return (OpCall("replace_lightest_token", compact(1, token_bytes), Component.COMPRESSION),)

    def decode_score_work(self, group: LayerGroup, model: ModelSpec) -> Work | None:
        return _newest_query(1.0, group, model) if kv_heads(group) and self.evicts else None


def _newest_query(tokens: float, group: LayerGroup, model: ModelSpec) -> Work:
    heads, element_bytes = kv_heads(group), DTYPE_BITS[model.dtype] / 8
    return score_with_window(tokens, 1, model.num_attention_heads, heads, group.k_head_dim, element_bytes)
