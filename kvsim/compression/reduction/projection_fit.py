"""Bases of one layer from calibration caches: what each objective makes of the same keys, values and queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvsim.compression.reduction.projection_codec import LayerBasis, rows_of
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.svd import Projection, principal_projection, query_aware_projection, second_moment
from kvsim.tensors import FloatArray, KvTensors, LayerKv, Rope
from kvsim.tensors.layout import bare_keys

QUERY_RIDGE: Final = 1e-6
"""Weight of directions that no calibration query reads, against the mean one: enough to order them, no more."""
_POSITIONS: Final = 64
"""Key positions over which a query's view of keys before RoPE is averaged."""


def head_group_basis(
    samples: Sequence[KvTensors],
    index: int,
    *,
    heads: int,
    ranks: tuple[int, int],
    query_aware: bool,
    pre_rope: bool,
) -> LayerBasis:
    """Give one basis per group of ``heads`` heads: keys by the objective, values by their own singular vectors.

    Raises
    ------
    InvalidSpec
        Heads do not divide into such groups, or a query-aware basis is wanted of caches without queries.
    """
    groups, rest = divmod(samples[0].layers[index].num_kv_heads, heads)
    if rest:
        msg = f"groups of {heads} heads do not divide {samples[0].layers[index].num_kv_heads} KV heads"
        raise InvalidSpec(msg)
    key_moments = _key_moments(samples, index, groups, pre_rope=pre_rope)
    values = _value_bases(samples, index, groups, ranks[1])
    if not query_aware:
        return LayerBasis(tuple(principal_projection(moment, ranks[0]) for moment in key_moments), values)
    query_moments = _grouped_query_moments(samples, index, groups, pre_rope=pre_rope)
    keys = tuple(
        query_aware_projection(key_moment, query_moment, ranks[0], ridge=QUERY_RIDGE)
        for key_moment, query_moment in zip(key_moments, query_moments, strict=True)
    )
    return LayerBasis(keys, values)


def eigen_basis(samples: Sequence[KvTensors], index: int, *, ranks: tuple[int, int]) -> LayerBasis:
    """EigenAttention's bases: V per head; K per head jointly with Q, or, before RoPE, one of K for all heads."""
    heads = samples[0].layers[index].num_kv_heads
    values = _value_bases(samples, index, heads, ranks[1])
    key_moments = _key_moments(samples, index, heads, pre_rope=True)
    if samples[0].rope is not None:
        shared = principal_projection(sum(key_moments[1:], key_moments[0]), ranks[0])
        return LayerBasis((shared,) * heads, values)
    tokens = sum(one.layers[index].num_tokens for one in samples)
    queries = _query_moments(samples, index, pre_rope=False)
    count = sum(len(_queries_per_head(one.layers[index])[0]) for one in samples)
    joint = (key / tokens + query / count for key, query in zip(key_moments, queries, strict=True))
    return LayerBasis(tuple(principal_projection(moment, ranks[0]) for moment in joint), values)


def averaged_over_positions(queries: FloatArray, rope: Rope, positions: int) -> FloatArray:
    """Queries (m, D) as keys before RoPE at spread positions see them, (m * p, D).

    A logit is q' R_t k for a key at position t, so the query that a bare key meets is q turned back by t. Positions
    are spread evenly over ``positions``, and a bare key is taken to be independent of where it stands.
    """
    places = np.unique(np.linspace(0, max(0, positions - 1), _POSITIONS).round().astype(np.int64))
    return np.concatenate([rope.undo(queries, np.full(len(queries), place)) for place in places])


def _key_moments(samples: Sequence[KvTensors], index: int, groups: int, *, pre_rope: bool) -> list[DoubleArray]:
    rows = [rows_of(bare_keys(one.layers[index], one.rope if pre_rope else None), groups) for one in samples]
    return [second_moment(np.concatenate([one[group] for one in rows])) for group in range(groups)]


def _value_bases(samples: Sequence[KvTensors], index: int, groups: int, rank: int) -> tuple[Projection, ...]:
    rows = [rows_of(one.layers[index].values, groups) for one in samples]
    moments = (second_moment(np.concatenate([one[group] for one in rows])) for group in range(groups))
    return tuple(principal_projection(moment, rank) for moment in moments)


def _query_moments(samples: Sequence[KvTensors], index: int, *, pre_rope: bool) -> list[DoubleArray]:
    """Second moment of the queries that read each KV head."""
    moments: list[DoubleArray] = []
    for head in range(samples[0].layers[index].num_kv_heads):
        seen = []
        for one in samples:
            layer = one.layers[index]
            queries = _queries_per_head(layer)[head]
            if pre_rope and one.rope is not None:
                queries = averaged_over_positions(queries, one.rope, int(layer.positions.max()) + 1)
            seen.append(queries)
        moments.append(second_moment(np.concatenate(seen)))
    return moments


def _grouped_query_moments(
    samples: Sequence[KvTensors], index: int, groups: int, *, pre_rope: bool
) -> list[DoubleArray]:
    """Per group of heads: a query reads the channels of its own head alone, so the moment is block-diagonal."""
    per_head = _query_moments(samples, index, pre_rope=pre_rope)
    heads, dim = len(per_head) // groups, len(per_head[0])
    moments = []
    for group in range(groups):
        moment = np.zeros((heads * dim, heads * dim))
        for place in range(heads):
            block = slice(place * dim, (place + 1) * dim)
            moment[block, block] = per_head[group * heads + place]
        moments.append(moment)
    return moments


def _queries_per_head(layer: LayerKv) -> FloatArray:
    """All queries of a layer by the KV head that they read: (H, m, D)."""
    known = [one for one in (layer.queries, layer.prompt_queries) if one.size]
    if not known:
        msg = "a query-aware basis needs calibration caches with queries; these have none"
        raise InvalidSpec(msg)
    heads, dim = layer.num_kv_heads, layer.keys.shape[2]
    return np.concatenate([one.reshape(heads, -1, dim) for one in known], axis=1)
