"""Compression during decode: every so many steps the cache is cut back to a target.

Between two cuts every new token stays, so token counts are a sawtooth, exact for however long a generation is. The step
whose token completes an interval reads the whole cache and ends with the cut; the blocks that it empties go back to the
pool then.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import FullAttentionSelection, kv_heads, native_token_bytes
from kvsim.compression.selection.scored import ScoredSelection, best_tokens
from kvsim.compression.selector import Selector, layer_view
from kvsim.ops import OpCall, compact, compression_calls, select_top_k
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import KvTensors, LayerKv


def first_cut(start_tokens: int, target_tokens: int, interval: int) -> int:
    """Generated tokens at the first cut: the first whole interval after which more than the target is held."""
    return interval * max(1, (target_tokens - start_tokens) // interval + 1)


def sawtooth(start_tokens: int, target_tokens: int, interval: int) -> TokenCurve:
    """Tokens that a step has before it ends with a cut: up to target + interval, then from target + 1 again."""
    first = first_cut(start_tokens, target_tokens, interval)
    rising = (0, start_tokens, 1)
    if interval == 1:
        return TokenCurve((rising, (first + 1, target_tokens + 1, 0)))
    return TokenCurve((rising, (first + 1, target_tokens + 1, 1)), first + 1, interval)


def cut_pulses(start_tokens: int, target_tokens: int, interval: int) -> TokenCurve:
    """1 at the generated tokens whose step ends with a cut, else 0."""
    first = first_cut(start_tokens, target_tokens, interval)
    if interval == 1:
        return TokenCurve(((0, 0, 0), (first, 1, 0)))
    return TokenCurve(((0, 0, 0), (first, 1, 0), (first + 1, 0, 0)), first, interval)


class CutsWhileDecoding(FullAttentionSelection):
    """A selection that cuts the cache back to a target every ``compression_interval`` decode steps."""

    compression_interval: Annotated[int, Field(ge=1)] = 128
    """Decode steps from one cut to the next."""

    @abstractmethod
    def kept_after_prompt(self, prompt_tokens: int, layer: LayerView) -> int:
        """Tokens of the prompt that decode starts with."""

    @abstractmethod
    def decode_target(self, prompt_tokens: int) -> int:
        """Tokens that each cut leaves in a layer."""

    @property
    @abstractmethod
    def decode_scorer(self) -> ScoredSelection:
        """Whose scores decide at a cut."""

    @property
    def evicts(self) -> bool:
        return True

    @property
    def granularity(self) -> str:
        return "head"

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        if not self.evicts:
            return growing(prompt_tokens)
        return sawtooth(*self._teeth(prompt_tokens, layer))

    def decode_cuts(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        if not self.evicts or kv_heads(layer.group) == 0:
            return None
        return cut_pulses(*self._teeth(prompt_tokens, layer))

    def _teeth(self, prompt_tokens: int, layer: LayerView) -> tuple[int, int, int]:
        start = self.kept_after_prompt(prompt_tokens, layer)
        return start, self.decode_target(prompt_tokens), self.compression_interval

    def cut_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Score target + interval tokens and keep the target; the first cut of a longer cache is charged so as well."""
        group, target = layer.group, self.decode_target(prompt_tokens)
        held = target + self.compression_interval
        works = {
            **self.decode_scorer.cut_score_works(held, layer, model),
            "select_top_k": select_top_k(held, kv_heads(group)),
            "compact_kv": compact(target, native_token_bytes(group, model)),
        }
        return compression_calls(works)

    def buffer_bytes(self, layer: LayerView, model: ModelSpec) -> float:
        if not self.evicts or kv_heads(layer.group) == 0:
            return 0.0
        queries = self.decode_scorer.observed_queries * model.num_attention_heads
        return queries * layer.group.k_head_dim * DTYPE_BITS[model.dtype] / 8

    def cut_selector(self, prompt_tokens: int) -> Selector:
        return CutToTarget(self.decode_scorer, self.decode_target(prompt_tokens))


class CutToTarget(Selector):
    """Keeps the best ``target_tokens`` of each head by a scorer's scores; fewer are left alone."""

    def __init__(self, scorer: ScoredSelection, target_tokens: int) -> None:
        self.scorer, self.target_tokens = scorer, target_tokens

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays."""
        return replace(kv, layers=self.select_layers(kv, range(kv.num_layers)))

    def select_layers(self, kv: KvTensors, indices: Sequence[int]) -> tuple[LayerKv, ...]:
        """Ask for these layers only."""
        layers = []
        for index in indices:
            layer = kv.layers[index]
            if layer.num_tokens > self.target_tokens:
                scores = self.scorer.scores(kv, layer_view(kv, index))
                layer = layer.take(best_tokens(scores, self.target_tokens))
            layers.append(layer)
        return tuple(layers)


class CutScoredSelection(CutsWhileDecoding, ScoredSelection):
    """A scored selection whose budget also holds while decoding: a share is one of the prompt.

    A prompt above the budget is cut when it ends, as text generated so far would be.
    """

    @property
    def evicts(self) -> bool:
        return self.compression_ratio != 0.0

    def kept_after_prompt(self, prompt_tokens: int, layer: LayerView) -> int:
        return self.kept_tokens(prompt_tokens, layer)

    def decode_target(self, prompt_tokens: int) -> int:
        return self.budget_tokens or max(1, self.average_tokens(prompt_tokens))

    @property
    def decode_scorer(self) -> ScoredSelection:
        return self
