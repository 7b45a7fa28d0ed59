"""LagKV: tokens that spread widely within the range of those that follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal

import numpy as np
from pydantic import Field, NonNegativeInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.scored import KeyScoredSelection
from kvsim.numerics.softmax import softmax
from kvsim.ops import Work, score_lag_relative
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.numerics.arrays import DoubleArray
    from kvsim.tensors import FloatArray, KvTensors

_NARROWEST: Final = 1e-9
"""Width that a channel's range has at least; kvpress divides by what it finds, which may be nothing."""
_SINK, _RECENT = 2.0, 1.0
"""Above all ranks, which lie below 1."""


class LagKv(KeyScoredSelection):
    """Rank tokens of each ``lag_size`` by their spread over channels, scaled by the next part (arXiv 2504.04704).

    From kvpress's LagKVPress, without its experimental ``cross_scoring``: sinks and the last part with what follows it
    score highest, and a prompt of less than ``n_sink + 2 lag_size`` tokens keeps its newest. kvpress leaves open which
    of the highest go where the budget is smaller than they are; here the newest stay, after the sinks.
    """

    names: ClassVar = {"lagkv": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"lag_kv": "lagkv"}
    summaries: ClassVar = {
        "lagkv": "half of the prompt removed unless set, spread of K and V in parts of 128; LagKV, arXiv 2504.04704"
    }

    kind: Literal["lagkv"] = "lagkv"
    n_sink: NonNegativeInt = 4
    lag_size: Annotated[int, Field(ge=2)] = 128
    """Tokens of a part."""

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        layer_kv = kv.layers[layer.index]
        heads, tokens, _ = layer_kv.keys.shape
        scores = _RECENT + np.broadcast_to(np.arange(tokens) / (tokens + 1), (heads, tokens))
        parts = (tokens - self.n_sink) // self.lag_size
        if parts >= 2:
            ranked = slice(self.n_sink, self.n_sink + (parts - 1) * self.lag_size)
            scores[:, ranked] = self._ranks(layer_kv.keys, parts, layer_kv.values)
        scores[:, : self.n_sink] = _SINK
        return scores.astype(np.float32)

    def _ranks(self, keys: FloatArray, parts: int, values: FloatArray) -> DoubleArray:
        """Rank of each token within its part, as a share, (H, tokens of all parts but the last)."""
        spread = (self._spread(keys, parts) + self._spread(values, parts)) / 2
        order = np.argsort(np.argsort(spread, axis=2, kind="stable"), axis=2, kind="stable")
        ranks: DoubleArray = (order / self.lag_size).reshape(len(keys), -1)
        return ranks

    def _spread(self, vectors: FloatArray, parts: int) -> DoubleArray:
        """Softmax over a part of the deviation over channels, (H, parts - 1, lag_size)."""
        heads, _, dim = vectors.shape
        held = vectors[:, self.n_sink : self.n_sink + parts * self.lag_size].astype(np.float64)
        held = held.reshape(heads, parts, self.lag_size, dim)
        low, high = held[:, 1:].min(axis=2, keepdims=True), held[:, 1:].max(axis=2, keepdims=True)
        scaled = (held[:, :-1] - low) / np.maximum(high - low, _NARROWEST)
        return softmax(scaled.std(axis=3, ddof=1))

    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        channels = group.k_head_dim + group.v_head_dim
        work = score_lag_relative(prompt_tokens, kv_heads(group), channels, self.lag_size, element_bytes)
        return {"score_lag_relative": work}
