"""What queries weigh of keys: second moments of calibration queries, by the head that they read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.svd import second_moment
from kvsim.tensors import FloatArray, KvTensors, LayerKv, Rope

_POSITIONS: Final = 64
"""Key positions over which a query's view of keys before RoPE is averaged."""


def averaged_over_positions(queries: FloatArray, rope: Rope, positions: int) -> FloatArray:
    """Queries (m, D) as keys before RoPE at spread positions see them, (m * p, D).

    A logit is q' R_t k for a key at position t, so the query that a bare key meets is q turned back by t. Positions
    are spread evenly over ``positions``, and a bare key is taken to be independent of where it stands.
    """
    places = np.unique(np.linspace(0, max(0, positions - 1), _POSITIONS).round().astype(np.int64))
    return np.concatenate([rope.undo(queries, np.full(len(queries), place)) for place in places])


def query_moments(samples: Sequence[KvTensors], index: int, *, pre_rope: bool) -> list[DoubleArray]:
    """Second moment of the queries that read each KV head."""
    moments: list[DoubleArray] = []
    for head in range(samples[0].layers[index].num_kv_heads):
        seen = []
        for one in samples:
            layer = one.layers[index]
            queries = queries_per_head(layer)[head]
            if pre_rope and one.rope is not None:
                queries = averaged_over_positions(queries, one.rope, int(layer.positions.max()) + 1)
            seen.append(queries)
        moments.append(second_moment(np.concatenate(seen)))
    return moments


def grouped_query_moments(
    samples: Sequence[KvTensors], index: int, groups: int, *, pre_rope: bool
) -> list[DoubleArray]:
    """Per group of heads: a query reads the channels of its own head alone, so the moment is block-diagonal."""
    per_head = query_moments(samples, index, pre_rope=pre_rope)
    heads, dim = len(per_head) // groups, len(per_head[0])
    moments = []
    for group in range(groups):
        moment = np.zeros((heads * dim, heads * dim))
        for place in range(heads):
            block = slice(place * dim, (place + 1) * dim)
            moment[block, block] = per_head[group * heads + place]
        moments.append(moment)
    return moments


def queries_per_head(layer: LayerKv) -> FloatArray:
    """All queries of a layer by the KV head that they read: (H, m, D)."""
    known = [one for one in (layer.queries, layer.prompt_queries) if one.size]
    if not known:
        msg = "a query-aware basis needs calibration caches with queries; these have none"
        raise InvalidSpec(msg)
    heads, dim = layer.num_kv_heads, layer.keys.shape[2]
    return np.concatenate([one.reshape(heads, -1, dim) for one in known], axis=1)
