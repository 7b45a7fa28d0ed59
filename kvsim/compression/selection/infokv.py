"""InfoKV: tokens after which the model was uncertain matter far ahead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.base import acts_on
from kvsim.compression.selection.cuts import CutScoredSelection
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.window_scored import WindowScoredSelection
from kvsim.errors import InvalidSpec
from kvsim.numerics.softmax import softmax
from kvsim.ops import (
    OpCall,
    Work,
    candidate_entropy,
    compression_calls,
    joint_scores,
    layer_distance,
    prompt_logits,
)
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.numerics.arrays import DoubleArray
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, KvTensors, LayerKv, SignalName

SIGNAL_BYTES = 8.0
"""fp32 entropy and distance of a token in one layer."""


class InfoKV(CutScoredSelection, WindowScoredSelection):
    """S = alpha · A + (1 - alpha) · softmax(E), E = (D + tau) · H (arXiv 2606.26875, read in a note about it).

    H: entropy of the next token over the likeliest ``candidates``; D: cosine distance of the layer's output from the
    last layer's. The note gives S, alpha, 256 candidates, "a bias tau (= 1) so that the last layer is not zero" and
    cuts every 1,024 decoded tokens. Ours: tau is added to D; A is SnapKV's mean attention of the last ``window_size``
    queries, pooled, and that window stays.

    Its price: the LM head on every prompt token (once per sequence, shared out here over the layers acted on), outputs
    of all layers kept until the last one's is there, and no smaller peak while the prompt is processed.
    """

    names: ClassVar = {"infokv": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"info_kv": "infokv"}
    summaries: ClassVar = {
        "infokv": "half of the prompt unless set, by attention and next-token entropy, cut back every 1,024 decoded "
        "tokens; InfoKV, arXiv 2606.26875"
    }

    kind: Literal["infokv"] = "infokv"
    compression_interval: Annotated[int, Field(ge=1)] = 1024
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of attention; 1 is attention alone."""
    tau: Annotated[float, Field(ge=0)] = 1.0
    candidates: PositiveInt = 256
    """Likeliest next tokens over which entropy is taken."""

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        return frozenset() if self.alpha == 1.0 else frozenset({"entropy", "distance"})

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        layer_kv = kv.layers[layer.index]
        queries = min(self.window_size, layer_kv.prompt_queries.shape[1], layer_kv.num_tokens)
        attention = WindowScoredSelection.scores(self, kv, layer) / np.float32(queries)
        if self.alpha == 1.0:
            return attention
        share = softmax(self._weighted_entropy(kv, layer.index))
        by_right = np.isposinf(attention)
        mixed = self.alpha * np.where(by_right, 0.0, attention) + (1.0 - self.alpha) * share
        return np.where(by_right, np.inf, mixed).astype(np.float32)

    def _weighted_entropy(self, kv: KvTensors, index: int) -> DoubleArray:
        """E of each held token, (H, n); signals lie by position in the sequence."""
        entropy, distance = kv.signals.entropy, kv.signals.distance
        if entropy is None or distance is None:
            msg = "infokv needs the signals entropy and distance, which the KV tensors do not have; alpha=1 needs none"
            raise InvalidSpec(msg)
        positions = kv.layers[index].positions
        weighted: DoubleArray = (distance[index][positions] + self.tau) * entropy[positions].astype(np.float64)
        return weighted

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        # A token's entropy is known only while its hidden state is: it is taken also where no token leaves yet.
        return tuple(super().prefill_ops(prompt_tokens, layer, model)) or self.signal_ops(prompt_tokens, layer, model)

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self.step_signal_ops(layer, model)

    def step_signal_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        # The token's logits are made in any case.
        return [call for call in self.signal_ops(1, layer, model) if call.name != "prompt_logits"]

    def signal_ops(self, tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        if kv_heads(layer.group) == 0 or not self.evicts:
            return ()
        works = self._signal_works(tokens, model)
        return compression_calls(works)

    def _signal_works(self, tokens: int, model: ModelSpec) -> dict[str, Work]:
        if self.alpha == 1.0:
            return {}
        share, element_bytes = 1.0 / num_acted_layers(model), DTYPE_BITS[model.dtype] / 8
        width, vocabulary = model.hidden_size, model.vocab_size
        return {
            # The last token's logits are made in any case.
            "prompt_logits": prompt_logits(max(0, tokens - 1), width, vocabulary, element_bytes, share),
            "candidate_entropy": candidate_entropy(tokens, vocabulary, self.candidates, element_bytes, share),
            "layer_distance": layer_distance(tokens, width, element_bytes),
        }

    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        signals = self._signal_works(prompt_tokens, model)
        return {**signals, **self.cut_score_works(prompt_tokens, layer, model)}

    def cut_score_works(self, held_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        works = dict(WindowScoredSelection.score_works(self, held_tokens, layer, model))
        if self.alpha != 1.0:
            works["joint_scores"] = joint_scores(held_tokens, kv_heads(layer.group))
        return works

    def held_bytes_per_token(self, layer: LayerView) -> float:
        holds = kv_heads(layer.group) and self.evicts and self.alpha != 1.0
        return SIGNAL_BYTES if holds else 0.0

    def index_bits(self, layer_kv: LayerKv, layer: LayerView, native_bits: int) -> float:
        return 8.0 * layer_kv.num_tokens * self.held_bytes_per_token(layer)


def num_acted_layers(model: ModelSpec) -> int:
    """Layers that store tokens of their own which a selection acts on, at least 1."""
    return max(1, sum(len(group.layers) for group in model.groups if acts_on(group) and kv_heads(group)))
