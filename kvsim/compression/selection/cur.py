"""CUR: keys and values that stand out from their neighbours by length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.scored import KeyScoredSelection
from kvsim.ops import Work, score_leverage
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.tensors import FloatArray, KvTensors

_NOTHING: Final = 1e-30
"""Energy that a window is taken to have at least."""


class Cur(KeyScoredSelection):
    """Keep tokens of large ‖k‖²‖v‖², each as a share of its window's (CurDKV, arXiv 2509.15038, as in kvpress).

    Squared lengths stand in for leverage scores of a CUR decomposition. From kvpress's CURPress with its defaults; its
    random projection (``use_random_leverage``) is left out.
    """

    names: ClassVar = {"cur": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"curdkv": "cur"}
    summaries: ClassVar = {
        "cur": "half of the prompt removed unless set, by lengths of K and V among neighbours; CurDKV, arXiv 2509.15038"
    }

    kind: Literal["cur"] = "cur"
    num_sinks: NonNegativeInt = 4
    """First tokens that stay."""
    leverage_type: Literal["key", "value", "kv_avg", "kv_product"] = "kv_product"
    """Which lengths count: of keys, of values, their mean or their product."""
    use_local_approximation: bool = True
    """Take lengths as a share of those in a window rather than in the whole prompt."""
    local_window_size: PositiveInt = 16

    def least_tokens(self, prompt_tokens: int) -> int:
        return min(prompt_tokens, max(1, self.num_sinks))

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        layer_kv = kv.layers[layer.index]
        key, value = self._leverage(layer_kv.keys), self._leverage(layer_kv.values)
        mean: FloatArray = np.stack((key, value)).mean(axis=0)
        scores = {"key": key, "value": value, "kv_avg": mean, "kv_product": key * value}[self.leverage_type]
        scores[:, : self.num_sinks] = np.inf
        return scores

    def _leverage(self, vectors: FloatArray) -> FloatArray:
        energy = (vectors**2).sum(axis=2)
        heads, tokens = energy.shape
        size = self.local_window_size if self.use_local_approximation else max(1, tokens)
        windows = np.pad(energy, ((0, 0), (0, -tokens % size))).reshape(heads, -1, size)
        shares: FloatArray = windows / np.maximum(windows.sum(axis=2, keepdims=True), _NOTHING)
        return shares.reshape(heads, -1)[:, :tokens]

    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        channels = group.k_head_dim + group.v_head_dim
        return {"score_leverage": score_leverage(prompt_tokens, kv_heads(group), channels, element_bytes)}
