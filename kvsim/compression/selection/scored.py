"""What selections share that score every token of a prompt once and keep the best."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import BudgetedSelection, kv_heads, native_token_bytes
from kvsim.ops import OpCall, Work, compact, compression_calls, select_top_k
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, KvTensors


class ScoredSelection(BudgetedSelection):
    """The best tokens of a prompt by a score of one's own, equally many in each KV head of a layer.

    The prompt is compressed once, after prefill; generated tokens are all kept. A wrapper (Ada-KV) may share the same
    scores out otherwise.
    """

    family: ClassVar[str] = "eviction"

    def least_tokens(self, prompt_tokens: int) -> int:
        """Tokens that always stay, whatever the budget: those that `scores` gives +inf."""
        return min(prompt_tokens, 1)

    def average_tokens(self, prompt_tokens: int) -> int:
        """Tokens kept of the prompt, averaged over layers: the budget, and at least what always stays."""
        return max(self.budget(prompt_tokens), self.least_tokens(prompt_tokens))

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        """Tokens of the prompt kept in ``layer``."""
        return self.average_tokens(prompt_tokens)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(self.kept_tokens(prompt_tokens, layer))

    @abstractmethod
    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        """Score the tokens of ``kv.layers[layer.index]``, (H, n): the more, the rather kept; +inf always stays.

        Raises
        ------
        InvalidSpec
            It needs queries or signals that the cache has not.
        """

    @abstractmethod
    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        """Work to score a prompt's tokens in one layer, by name of the operation."""

    def cut_score_works(self, held_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        """Work to score the tokens held in one layer at a cut while decoding."""
        return self.score_works(held_tokens, layer, model)

    @property
    def observed_queries(self) -> int:
        """Newest queries that score, and that a cut while decoding must find held; 0 where none do."""
        return 0

    def signal_ops(self, tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Work in one layer to take down what later cuts score ``tokens`` of a prompt by, beside K, V and queries."""
        return ()

    def step_signal_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Work in one layer and decode step to take down the same of the new token."""
        return ()

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        tokens = kv.layers[layer.index].num_tokens
        kept = self.kept_tokens(tokens, layer)
        return None if kept >= tokens else best_tokens(self.scores(kv, layer), kept)

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group, kept = layer.group, self.kept_tokens(prompt_tokens, layer)
        heads = kv_heads(group)
        if heads == 0 or self.average_tokens(prompt_tokens) >= prompt_tokens:
            return ()
        works = {
            **self.score_works(prompt_tokens, layer, model),
            "select_top_k": select_top_k(prompt_tokens, heads),
            "compact_kv": compact(kept, native_token_bytes(group, model)),
        }
        return compression_calls(works)


class KeyScoredSelection(ScoredSelection):
    """Scores that come from K and V alone: no query is needed, and none is looked at. Nothing stays by right."""

    @property
    def keeps_newest(self) -> bool:
        return False

    @abstractmethod
    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        """Work to score a prompt's tokens in one layer, by name of the operation."""

    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        return self.key_works(prompt_tokens, layer.group, DTYPE_BITS[model.dtype] / 8)


def best_tokens(scores: FloatArray, kept: int) -> IntArray:
    """Indices of the ``kept`` best tokens of each head, (H, kept), ascending; of equal scores the earlier one stays."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    return np.sort(best, axis=1).astype(np.int64)
