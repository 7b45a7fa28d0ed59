"""Quest: everything is kept, only the pages that the query needs are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, model_validator

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import FullAttentionSelection, kv_heads, whole_tokens
from kvsim.ops import Component, OpCall, page_bounds, select_top_k
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import BoolArray, FloatArray, IntArray, KvTensors, LayerKv

DEFAULT_TOKEN_BUDGET = 1024


class Quest(FullAttentionSelection):
    """Score each page by bounds of its keys, attend the best pages (arXiv 2406.10774).

    The channel-wise minimum and maximum of a page's keys are held and read: 2·D·e·H / page_size bytes per token.
    Each step's own query chooses, so no question decides what later ones can see.
    The first ``num_dense_layers`` layers read everything and hold no bounds, as in the paper.
    """

    names: ClassVar = {"quest": {}}
    summaries: ClassVar = {
        "quest": "all tokens held, the best 1,024 unless set read in pages of 16; Quest, arXiv 2406.10774"
    }
    inline_fields: ClassVar = ("token_budget",)

    family: ClassVar = "sparse reading"

    kind: Literal["quest"] = "quest"
    page_size: PositiveInt = 16
    token_budget: PositiveInt = DEFAULT_TOKEN_BUDGET
    """Tokens attended per step and layer, whole pages."""
    num_dense_layers: NonNegativeInt = 2

    @model_validator(mode="after")
    def _whole_pages(self) -> Self:
        below, rest = divmod(self.token_budget, self.page_size)
        if rest:
            near = f"{max(1, below) * self.page_size} or {(below + 1) * self.page_size}"
            msg = f"token_budget {self.token_budget} is not a multiple of page_size {self.page_size}; use {near}"
            raise ValueError(msg)
        return self

    def _is_dense(self, layer: LayerView) -> bool:
        return layer.index < self.num_dense_layers

    def layer_band(self, layer: LayerView) -> int:
        return 0 if self._is_dense(layer) else 1

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens)

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens, None if self._is_dense(layer) else self.token_budget)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        return None

    def read_mask(self, layer_kv: LayerKv, layer: LayerView) -> BoolArray | None:
        """Pages by the largest product that any key within their bounds could have with the query."""
        tokens = layer_kv.num_tokens
        if self._is_dense(layer) or tokens <= self.token_budget:
            return None
        low, high = page_extremes(layer_kv.keys, self.page_size)
        heads, pages, dim = low.shape
        queries = layer_kv.queries.reshape(heads, -1, dim)
        # max(q·low, q·high) channel by channel: the negative part of q meets the minimum, the positive the maximum.
        bounds = np.minimum(queries, 0) @ low.transpose(0, 2, 1) + np.maximum(queries, 0) @ high.transpose(0, 2, 1)
        chosen = np.argsort(-bounds, axis=2, kind="stable")[:, :, : self.token_budget // self.page_size]
        reads = np.zeros((*bounds.shape[:2], pages), dtype=bool)
        np.put_along_axis(reads, chosen, True, axis=2)
        return np.repeat(reads, self.page_size, axis=2)[:, :, :tokens].reshape(*layer_kv.queries.shape[:2], tokens)

    def index_bits(self, layer_kv: LayerKv, layer: LayerView, native_bits: int) -> float:
        if self._is_dense(layer):
            return 0.0
        low, high = page_extremes(layer_kv.keys, self.page_size)
        return float((low.size + high.size) * native_bits)

    def scanned_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        return None if self._is_dense(layer) or kv_heads(layer.group) == 0 else growing(prompt_tokens)

    def scan_bytes_per_token(self, group: LayerGroup, element_bytes: float) -> float:
        return 2.0 * kv_heads(group) * group.k_head_dim * element_bytes / self.page_size

    def scan_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        # Per query head and channel of a page: two products, their maximum, and its addition.
        return 4.0 * model.num_attention_heads * group.k_head_dim / self.page_size

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self._bounds("page_bounds", prompt_tokens, layer, model)

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        bounds = self._bounds("update_page_bounds", 1, layer, model)
        if not bounds:
            return ()
        # At least the budget's pages are ranked; scoring all pages grows with context and is the scan's work.
        rank = select_top_k(self.token_budget / self.page_size, layer.group.num_kv_heads)
        return (*bounds, OpCall("select_pages", rank, Component.COMPRESSION))

    def _bounds(self, name: str, tokens: int, layer: LayerView, model: ModelSpec) -> tuple[OpCall, ...]:
        heads = kv_heads(layer.group)
        if self._is_dense(layer) or heads == 0:
            return ()
        work = page_bounds(tokens, self.page_size, heads, layer.group.k_head_dim, DTYPE_BITS[model.dtype] / 8)
        return (OpCall(name, work, Component.COMPRESSION),)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        return {"token_budget": whole_tokens("quest", text)}

    def inline_text(self) -> str | None:
        return str(self.token_budget)


def page_extremes(keys: FloatArray, page_size: int) -> tuple[FloatArray, FloatArray]:
    """Channel-wise minimum and maximum of each page of keys, (H, pages, D) each; the last page may be short."""
    starts = np.arange(0, keys.shape[1], page_size)
    return np.minimum.reduceat(keys, starts, axis=1), np.maximum.reduceat(keys, starts, axis=1)
