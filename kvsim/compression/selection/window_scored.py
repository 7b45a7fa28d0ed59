"""What SnapKV and its like share: the last queries of the prompt score every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import PositiveInt, model_validator

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import kv_heads
from kvsim.compression.selection.prompt_attention import neighbourhoods, received_attention
from kvsim.compression.selection.scored import ScoredSelection
from kvsim.ops import Work, pool_scores, score_with_window
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, KvTensors


class WindowScoredSelection(ScoredSelection):
    """Keep the tokens that the last ``window_size`` queries attend to, and that window itself.

    The question must lie in the window, so what is kept serves that question.
    """

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

    def least_tokens(self, prompt_tokens: int) -> int:
        return min(prompt_tokens, self.window_size)

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        found = received_attention(kv.layers[layer.index], kv.attention_scale, self.window_size)
        older = found.shape[1] - self.least_tokens(found.shape[1])
        if older:
            found[:, :older] = self._pooled(found[:, :older])
        found[:, older:] = np.inf
        return found

    def _pooled(self, scores: FloatArray) -> FloatArray:
        """Mean over ``kernel_size`` neighbours, with zeros beyond the ends (kvpress's average pooling)."""
        pooled: FloatArray = neighbourhoods(scores, self.kernel_size).mean(axis=2)
        return pooled

    @property
    def observed_queries(self) -> int:
        return self.window_size

    @property
    def query_aware(self) -> bool:
        return True

    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        group, heads = layer.group, kv_heads(layer.group)
        element_bytes = DTYPE_BITS[model.dtype] / 8
        return {
            "score_with_window": score_with_window(
                prompt_tokens, self.window_size, model.num_attention_heads, heads, group.k_head_dim, element_bytes
            ),
            "pool_scores": pool_scores(prompt_tokens, heads, self.kernel_size),
        }
