"""Q-Filters: one direction per KV head, learnt from queries, says which keys matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.scored import KeyScoredSelection, best_tokens
from kvsim.compression.selector import Selector, layer_view
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.numerics.svd import principal_projection, second_moment
from kvsim.ops import Work, score_keys
from kvsim.specs.model import LayerGroup
from kvsim.tensors import KvTensors, LayerKv

if TYPE_CHECKING:
    from kvsim.numerics.arrays import DoubleArray, FloatArray


class QFilter(KeyScoredSelection):
    """Keep the keys that reach farthest along the main direction of the queries (Q-Filters, arXiv 2503.02812).

    Per query head the first right singular vector of calibration queries after RoPE (not centred), signed so that most
    of them lie on its positive side; a KV head takes the mean over the query heads that read it (authors' code). The
    filters belong to a model: they are fitted on other sequences than those that are compressed.
    """

    names: ClassVar = {"qfilter": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"q_filter": "qfilter", "q_filters": "qfilter", "qfilters": "qfilter"}
    summaries: ClassVar = {
        "qfilter": "half of the prompt removed unless set, by a calibrated direction; Q-Filters, arXiv 2503.02812"
    }

    kind: Literal["qfilter"] = "qfilter"

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        raise NotRunnable(self.kind, "it scores with filters that its selector fits on other sequences")

    def selector(self) -> Selector:
        """Give the algorithm."""
        return KeepFiltered(self)

    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        return {"score_keys": score_keys(prompt_tokens, kv_heads(group), group.k_head_dim, element_bytes)}


@dataclass(frozen=True, eq=False)
class KeepFiltered(Selector):
    """Keeps by products with filters, (H, D) per layer."""

    selection: QFilter
    filters: tuple[DoubleArray, ...] | None = None
    needs_calibration: bool = True

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Find a filter per layer and KV head."""
        if not samples:
            msg = "qfilter needs calibration caches with queries, other sequences of the same model; none are given"
            raise InvalidSpec(msg)
        by_layer = zip(*(one.layers for one in samples), strict=True)
        return replace(self, filters=tuple(query_filters(layers) for layers in by_layer))

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays."""
        if self.filters is None:
            msg = "qfilter is not fitted; give calibration caches"
            raise InvalidSpec(msg)
        layers = []
        for index, (layer, filters) in enumerate(zip(kv.layers, self.filters, strict=True)):
            kept = self.selection.kept_tokens(layer.num_tokens, layer_view(kv, index))
            scores = np.einsum("hnd,hd->hn", layer.keys.astype(np.float64), filters).astype(np.float32)
            layers.append(layer if kept >= layer.num_tokens else layer.take(best_tokens(scores, kept)))
        return replace(kv, layers=tuple(layers))


def query_filters(layers: Sequence[LayerKv]) -> DoubleArray:
    """Filters of one layer from its caches of several sequences, (H, D); raise InvalidSpec without queries."""
    seen = [queries for layer in layers for queries in (layer.queries, layer.prompt_queries) if queries.size]
    if not seen:
        msg = "qfilter finds its filters in the queries of calibration caches, and these have none"
        raise InvalidSpec(msg)
    filters = np.stack([_main_direction(queries) for queries in np.concatenate(seen, axis=1)])
    mean: DoubleArray = filters.reshape(layers[0].num_kv_heads, -1, filters.shape[1]).mean(axis=1)
    return mean


def _main_direction(queries: FloatArray) -> DoubleArray:
    """First right singular vector of queries (m, D), signed so that most queries lie on its positive side."""
    direction: DoubleArray = principal_projection(second_moment(queries), 1).up[0]
    is_positive = (queries @ direction > 0).mean() > 0.5
    return direction if is_positive else -direction
