"""What SnapKV and PyramidKV share: the last queries of the prompt score every key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import PositiveInt, model_validator

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import BudgetedSelection, kv_heads
from kvsim.compression.selection.scores import heaviest_and_newest, received_attention
from kvsim.ops import Component, OpCall, compact, pool_scores, score_with_window, select_top_k
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, LayerKv


class WindowScoredSelection(BudgetedSelection):
    """Keep the tokens that the last ``window_size`` queries attend to, and that window itself.

    The prompt is compressed once, after prefill; generated tokens are all kept. The question must lie in the window,
    so what is kept serves that question.
    """

    family: ClassVar = "eviction"

    window_size: PositiveInt = 64
    """Queries that score (kvpress default; the paper's LongBench runs use 32)."""
    kernel_size: PositiveInt = 5
    """Neighbouring tokens over which scores are pooled."""

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.budget_tokens is not None and self.budget_tokens < self.window_size:
            msg = f"budget_tokens {self.budget_tokens} is smaller than window_size {self.window_size}, which is kept"
            raise ValueError(msg)
        return self

    def average_tokens(self, prompt_tokens: int) -> int:
        """Tokens kept of the prompt, averaged over layers: the budget, and at least the scoring window."""
        return max(self.budget(prompt_tokens), min(prompt_tokens, self.window_size))

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        """Tokens of the prompt kept in ``layer``."""
        return self.average_tokens(prompt_tokens)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(self.kept_tokens(prompt_tokens, layer))

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.resident_tokens(prompt_tokens, layer)

    def keep(self, layer_kv: LayerKv, layer: LayerView, attention_scale: float) -> IntArray | None:
        tokens = layer_kv.num_tokens
        kept = self.kept_tokens(tokens, layer)
        if kept >= tokens:
            return None
        scores = received_attention(layer_kv, attention_scale, self.window_size)
        newest = min(tokens, self.window_size)
        return heaviest_and_newest(self._pooled(scores[:, : tokens - newest]), kept - newest, newest)

    def _pooled(self, scores: FloatArray) -> FloatArray:
        """Mean over ``kernel_size`` neighbours, with zeros beyond the ends (kvpress's average pooling)."""
        before = self.kernel_size // 2
        padded = np.pad(scores, ((0, 0), (before, self.kernel_size - 1 - before)))
        pooled: FloatArray = sliding_window_view(padded, self.kernel_size, axis=1).mean(axis=2)
        return pooled

    @property
    def query_aware(self) -> bool:
        return True

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group, kept = layer.group, self.kept_tokens(prompt_tokens, layer)
        heads = kv_heads(group)
        if heads == 0 or self.average_tokens(prompt_tokens) >= prompt_tokens:
            return ()
        element_bytes = DTYPE_BITS[model.dtype] / 8
        works = {
            "score_with_window": score_with_window(
                prompt_tokens, self.window_size, model.num_attention_heads, heads, group.k_head_dim, element_bytes
            ),
            "pool_scores": pool_scores(prompt_tokens, heads, self.kernel_size),
            "select_top_k": select_top_k(prompt_tokens, heads),
            "compact_kv": compact(kept, group.kv_elements_per_token * element_bytes),
        }
        return tuple(OpCall(name, work, Component.COMPRESSION) for name, work in works.items())
