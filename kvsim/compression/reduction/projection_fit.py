"""Bases of one layer from calibration caches: what each objective makes of the same keys, values and queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kvsim.compression.query_moments import grouped_query_moments, queries_per_head, query_moments
from kvsim.compression.reduction.projection_codec import LayerBasis, rows_of
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.svd import Projection, principal_projection, query_aware_projection, second_moment
from kvsim.tensors import KvTensors
from kvsim.tensors.layout import bare_keys

QUERY_RIDGE: Final = 1e-6
"""Weight of directions that no calibration query reads, against the mean one: enough to order them, no more."""


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
    reads = grouped_query_moments(samples, index, groups, pre_rope=pre_rope)
    keys = tuple(
        query_aware_projection(key_moment, query_moment, ranks[0], ridge=QUERY_RIDGE)
        for key_moment, query_moment in zip(key_moments, reads, strict=True)
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
    queries = query_moments(samples, index, pre_rope=False)
    count = sum(len(queries_per_head(one.layers[index])[0]) for one in samples)
    joint = (key / tokens + query / count for key, query in zip(key_moments, queries, strict=True))
    return LayerBasis(tuple(principal_projection(moment, ranks[0]) for moment in joint), values)


def _key_moments(samples: Sequence[KvTensors], index: int, groups: int, *, pre_rope: bool) -> list[DoubleArray]:
    rows = [rows_of(bare_keys(one.layers[index], one.rope if pre_rope else None), groups) for one in samples]
    return [second_moment(np.concatenate([one[group] for one in rows])) for group in range(groups)]


def _value_bases(samples: Sequence[KvTensors], index: int, groups: int, rank: int) -> tuple[Projection, ...]:
    rows = [rows_of(one.layers[index].values, groups) for one in samples]
    moments = (second_moment(np.concatenate([one[group] for one in rows])) for group in range(groups))
    return tuple(principal_projection(moment, rank) for moment in moments)
