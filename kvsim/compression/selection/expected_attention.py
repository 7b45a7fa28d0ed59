"""Expected Attention: the weight that queries still to come would give, were they Gaussian."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.prompt_attention import known_prompt_queries
from kvsim.compression.selection.scored import ScoredSelection
from kvsim.numerics.softmax import softmax
from kvsim.ops import Work, query_statistics, score_expected_attention
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.numerics.arrays import DoubleArray
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, KvTensors, LayerKv


@dataclass(frozen=True, eq=False)
class FutureQueries:
    """Queries to come as each query head's normal distribution, after RoPE.

    Attributes
    ----------
    mean : (Hq, D)
    covariance : (Hq, D, D) or None
    """

    mean: DoubleArray
    covariance: DoubleArray | None


class ExpectedAttention(ScoredSelection):
    """Keep tokens by E[exp(s q·k)] ‖v‖ over Gaussian queries of the next positions (arXiv 2510.00636, as in kvpress).

    Mean and covariance per query head are those of the prompt's queries before RoPE, turned by the rotation averaged
    over the next positions. The first ``n_sink`` tokens stay, and their queries are left out of the statistics. On
    tensors the statistics are those of the prompt queries that the file holds, the prompt's last; kvpress takes all.
    """

    names: ClassVar = {"expected_attention": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"expectedattention": "expected_attention"}
    summaries: ClassVar = {
        "expected_attention": "half of the prompt removed unless set, weight under Gaussian queries; arXiv 2510.00636"
    }

    kind: Literal["expected_attention"] = "expected_attention"
    n_future_positions: PositiveInt = 512
    """Positions after the prompt over which the rotation is averaged."""
    n_sink: NonNegativeInt = 4
    use_covariance: bool = True
    """Add s²/2 kᵀΣk to the logit of the mean query."""
    use_vnorm: bool = True
    """Multiply by the length of the value."""
    epsilon: NonNegativeFloat = 0.0
    """Added to the weight before that."""

    @property
    def observed_queries(self) -> int:
        # kvpress's DecodingPress holds hidden states of so many tokens to take statistics of.
        return 256

    @property
    def keeps_newest(self) -> bool:
        return False

    def least_tokens(self, prompt_tokens: int) -> int:
        return min(prompt_tokens, max(1, self.n_sink))

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        layer_kv = kv.layers[layer.index]
        scores = np.full(layer_kv.keys.shape[:2], np.inf)
        if layer_kv.num_tokens > self.n_sink:
            rest = np.arange(self.n_sink, layer_kv.num_tokens)
            after_sinks = layer_kv.take(np.broadcast_to(rest, (layer_kv.num_kv_heads, len(rest))))
            weights = expected_weights(after_sinks, self.future_queries(kv, layer.index), kv.attention_scale)
            if self.use_vnorm:
                weights = (weights + self.epsilon) * np.linalg.norm(after_sinks.values, axis=2)
            scores[:, self.n_sink :] = weights
        return scores.astype(np.float32)

    def future_queries(self, kv: KvTensors, index: int) -> FutureQueries:
        """Mean and covariance of the queries of the next positions; raise InvalidSpec without prompt queries."""
        layer_kv = kv.layers[index]
        queries = known_prompt_queries(layer_kv)
        end = int(layer_kv.positions.max()) + 1
        places = np.arange(end - queries.shape[1], end)
        bare = queries if kv.rope is None else kv.rope.undo(queries, places)
        bare = bare[:, places >= self.n_sink].astype(np.float64)
        dim = bare.shape[2]
        future = np.arange(end, end + self.n_future_positions)
        turn = np.eye(dim) if kv.rope is None else kv.rope.mean_rotation(dim, future)
        mean = bare.mean(axis=1)
        if not self.use_covariance:
            return FutureQueries(mean @ turn.T, None)
        apart = bare - mean[:, None]
        covariance = apart.transpose(0, 2, 1) @ apart / bare.shape[1]
        return FutureQueries(mean @ turn.T, turn @ covariance @ turn.T)

    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        group, heads = layer.group, kv_heads(layer.group)
        element_bytes, query_heads = DTYPE_BITS[model.dtype] / 8, model.num_attention_heads
        key_dim, is_full = group.k_head_dim, self.use_covariance
        return {
            "query_statistics": query_statistics(
                prompt_tokens, query_heads, key_dim, element_bytes, with_covariance=is_full
            ),
            "score_expected_attention": score_expected_attention(
                prompt_tokens, query_heads, heads, key_dim, group.v_head_dim, element_bytes, with_covariance=is_full
            ),
        }


def expected_weights(layer: LayerKv, queries: FutureQueries, attention_scale: float) -> DoubleArray:
    """Softmax over the tokens of ln E[exp(s q·k)] = s k·μ + s²/2 kᵀΣk, averaged over the queries of a group: (H, n)."""
    heads, _, dim = layer.keys.shape
    keys = layer.keys.astype(np.float64)
    logits = attention_scale * queries.mean.reshape(heads, -1, dim) @ keys.transpose(0, 2, 1)
    if queries.covariance is not None:
        covariance = queries.covariance.reshape(heads, -1, dim, dim)
        for group in range(logits.shape[1]):
            spread = (keys @ covariance[:, group] * keys).sum(axis=2)
            logits[:, group] += 0.5 * attention_scale**2 * spread
    weights: DoubleArray = softmax(logits).mean(axis=1)
    return weights
