"""ChunkKV: whole chunks of tokens stay or go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from pydantic import PositiveInt, model_validator

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads, native_token_bytes
from kvsim.compression.selection.scorers import ScorerBackedSelection
from kvsim.ops import OpCall, average_chunks, compact, compression_calls, select_top_k

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, KvTensors


class ChunkKV(ScorerBackedSelection):
    """Keep the chunks of best mean score, the same in all KV heads of a layer (ChunkKV, arXiv 2502.00299).

    As in kvpress: chunks from the first token on, a shorter one at the end; their scores are added over heads; the same
    share of chunks stays as would of tokens, rounded down. Ours: the last chunk always stays, so that how many tokens
    stay does not depend on what they are (with the paper's window of newest queries it nearly always does), and a
    budget in tokens takes as many whole chunks as it holds. The paper's reuse of indices across layers is left out.
    """

    names: ClassVar = {"chunkkv": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"chunk_kv": "chunkkv"}
    summaries: ClassVar = {
        "chunkkv": "half of the prompt removed unless set, in chunks of 20, by SnapKV's scores; arXiv 2502.00299"
    }

    family: ClassVar[str] = "eviction"

    kind: Literal["chunkkv"] = "chunkkv"
    chunk_length: PositiveInt = 20
    """Tokens of a chunk."""

    @model_validator(mode="after")
    def _holds_a_chunk(self) -> Self:
        if self.budget_tokens is not None and self.budget_tokens < self.chunk_length:
            msg = f"budget_tokens {self.budget_tokens} holds no chunk of chunk_length {self.chunk_length}"
            raise ValueError(msg)
        return self

    @property
    def granularity(self) -> str:
        return "layer"

    @property
    def unit_tokens(self) -> int:
        return self.chunk_length

    def kept_chunks(self, prompt_tokens: int) -> int:
        """Chunks that stay, the last one among them."""
        chunks = -(-prompt_tokens // self.chunk_length)
        if self.budget_tokens is None:
            return min(chunks, max(1, super().budget(chunks)))
        beside_last = self.budget_tokens - self._last_chunk(prompt_tokens)
        return min(chunks, 1 + beside_last // self.chunk_length)

    def budget(self, prompt_tokens: int) -> int:
        if not prompt_tokens:
            return 0
        return (self.kept_chunks(prompt_tokens) - 1) * self.chunk_length + self._last_chunk(prompt_tokens)

    def _last_chunk(self, prompt_tokens: int) -> int:
        """Tokens of the last chunk."""
        return prompt_tokens % self.chunk_length or min(prompt_tokens, self.chunk_length)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(self.budget(prompt_tokens))

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        layer_kv = kv.layers[layer.index]
        tokens, size = layer_kv.num_tokens, self.chunk_length
        if self.budget(tokens) >= tokens:
            return None
        means = chunk_means(self.scored.scores(kv, layer), size)
        means[-1] = np.inf
        chosen = np.argsort(-means, kind="stable")[: self.kept_chunks(tokens)]
        kept = np.flatnonzero(np.isin(np.arange(tokens) // size, chosen))
        return np.broadcast_to(kept, (layer_kv.num_kv_heads, len(kept))).copy()

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group, heads, kept = layer.group, kv_heads(layer.group), self.budget(prompt_tokens)
        if heads == 0 or kept >= prompt_tokens:
            return ()
        works = {
            **self.scored.score_works(prompt_tokens, layer, model),
            "average_chunks": average_chunks(prompt_tokens, heads),
            "select_top_k": select_top_k(prompt_tokens / self.chunk_length, 1),
            "compact_kv": compact(kept, native_token_bytes(group, model)),
        }
        return compression_calls(works)


def chunk_means(scores: FloatArray, chunk_length: int) -> FloatArray:
    """Mean score of each chunk, heads added up: (chunks,).

    Tokens that a scorer always keeps, +inf, count as the best of the others (kvpress's value for them).
    """
    is_finite = np.isfinite(scores)
    best = scores[is_finite].max() if is_finite.any() else 0.0
    summed = np.where(is_finite, scores, best).astype(np.float64).sum(axis=0)
    starts = np.arange(0, len(summed), chunk_length)
    means = np.add.reduceat(summed, starts) / np.diff(np.append(starts, len(summed)))
    return means.astype(np.float32)
