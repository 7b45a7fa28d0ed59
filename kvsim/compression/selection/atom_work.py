"""Work of compressing entries to weighted atoms, for pricing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kvsim.numerics.balanced_clusters import POWER_STEPS
from kvsim.numerics.response_profiles import NUM_FEATURES
from kvsim.ops import Work, cut_clusters, merge_clusters, response_profiles, select_top_k


@dataclass(frozen=True)
class AtomShape:
    """What the work depends on beside numbers of entries; ``num_queries`` are of all KV heads of a layer together."""

    num_kv_heads: int
    num_queries: int
    key_dim: int
    value_dim: int
    element_bytes: float
    heavy_fraction: float


def compress_works(shape: AtomShape, entries: int, count: int, block_tokens: int | None) -> Mapping[str, Work]:
    """Work to make ``count`` atoms of ``entries`` in one layer, all KV heads, by name of the operation.

    In blocks, each level of the tree compresses twice ``count`` entries per pair.
    """
    depth = _depth(count, shape)
    if block_tokens is None or block_tokens >= entries:
        return _once(shape, entries, count, depth)
    leaves, left = math.ceil(entries / block_tokens), min(count, block_tokens)
    joins = _once(shape, (leaves - 1) * 2 * left, (leaves - 1) * left, depth)
    return _once(shape, entries, leaves * left, depth) | {f"join_{name}": work for name, work in joins.items()}


def _depth(count: int, shape: AtomShape) -> float:
    """Halvings from all entries to one cluster per atom."""
    return math.log2(max(2.0, count * (1.0 - shape.heavy_fraction)))


def _once(shape: AtomShape, entries: int, count: int, depth: float) -> dict[str, Work]:
    heads = shape.num_kv_heads
    return {
        "response_profiles": response_profiles(
            entries, shape.num_queries, heads, shape.key_dim, shape.value_dim, NUM_FEATURES, shape.element_bytes
        ),
        "select_top_k": select_top_k(entries, heads),
        "cut_clusters": cut_clusters(entries, heads, NUM_FEATURES, depth, POWER_STEPS),
        "merge_clusters": merge_clusters(
            entries, count, shape.num_queries, heads, shape.key_dim, shape.value_dim, shape.element_bytes
        ),
    }
