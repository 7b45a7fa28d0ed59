"""Work of folding tokens into others: merging, and weighted atoms."""

from __future__ import annotations

from kvsim.ops.work import Work


def nearest_survivors(evicted: float, kept: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Find the kept key of largest cosine for each evicted one (kernels/select/merge): all pairs, per KV head.

    A product per pair on the tensor units; 3 vector FLOPs to scale, compare and keep it, 2 per channel for norms.
    Written are a place and a cosine per evicted token.
    """
    pairs = evicted * kept * num_kv_heads
    vectors = (evicted + kept) * num_kv_heads
    return Work(
        flops=2.0 * pairs * head_dim,
        bytes_read=vectors * head_dim * element_bytes,
        bytes_written=8.0 * evicted * num_kv_heads,
        vector_flops=3.0 * pairs + 2.0 * vectors * head_dim,
        launches=2.0,
    )


def fold_tokens(evicted: float, kept: float, num_kv_heads: int, channels: int, element_bytes: float) -> Work:
    """Sum evicted vectors of ``channels`` at their survivors, as a product with a matrix of weights, and divide.

    So kernels/select/merge does it: no atomics, the same bits each time, as many products as pairs.
    """
    heads = num_kv_heads
    return Work(
        flops=2.0 * evicted * kept * heads * channels,
        bytes_read=((evicted + kept) * channels * element_bytes + 8.0 * evicted) * heads,
        bytes_written=kept * heads * channels * element_bytes,
        vector_flops=2.0 * kept * heads * channels,
        launches=2.0,
    )


def spread_values(
    evicted: float, kept: float, window: int, num_kv_heads: int, value_dim: int, element_bytes: float
) -> Work:
    """Add each evicted value to the ``window`` kept ones after it (CaM, ICML 2024); scores are read as fp32.

    A banded sum: every value is read once, kept ones are written.
    """
    heads = num_kv_heads
    return Work(
        bytes_read=(evicted + kept) * heads * (value_dim * element_bytes + 4.0),
        bytes_written=kept * heads * value_dim * element_bytes,
        vector_flops=evicted * heads * window * (2.0 * value_dim + 1.0),
    )


def response_profiles(
    entries: float,
    num_queries: float,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    num_features: int,
    element_bytes: float,
) -> Work:
    """Influence of entries on a sample of queries: norms, and sketches of ``num_features`` numbers (arXiv 2607.01520).

    ``num_queries`` are those of all query heads; each meets the entries of its KV head. Products: logits, outputs, the
    values met by outputs (norms), and two sketches. About 10 vector FLOPs per query and entry (scale, subtract, exp,
    normalise, square, weigh). Shares stay on chip; values are read once more for their part of the sketch.
    """
    pairs = num_queries * entries
    rows = entries * num_kv_heads
    return Work(
        flops=2.0 * pairs * (key_dim + 2.0 * value_dim + 2.0 * num_features) + 2.0 * rows * value_dim * num_features,
        bytes_read=rows * (2.0 * key_dim + 3.0 * value_dim) * element_bytes,
        bytes_written=rows * (num_features + 2.0) * 4.0,
        vector_flops=10.0 * pairs,
        launches=3.0,
    )


def cut_clusters(entries: float, num_kv_heads: int, num_features: int, depth: float, power_steps: int) -> Work:
    """Balanced clusters by ``depth`` halvings: each finds a direction by power iteration and sorts along it.

    Per level ``power_steps`` products there and back and one projection, on fp32 sketches that are read each time, and
    a radix sort of four passes over a number and an index.
    """
    rows = entries * num_kv_heads
    products = 2.0 * power_steps + 1.0
    return Work(
        bytes_read=depth * rows * (products * num_features * 4.0 + 4.0 * 8.0),
        bytes_written=depth * rows * 4.0 * 8.0,
        vector_flops=depth * products * 2.0 * rows * num_features,
        launches=depth * (products + 4.0),
    )


def merge_clusters(
    entries: float,
    atoms: float,
    num_queries: float,
    num_kv_heads: int,
    key_dim: int,
    value_dim: int,
    element_bytes: float,
) -> Work:
    """Weighted means of clusters' keys and values, and the weights at which queries give them their members' mass."""
    channels = key_dim + value_dim
    return Work(
        flops=2.0 * num_queries * atoms * key_dim,
        bytes_read=(entries + atoms) * num_kv_heads * channels * element_bytes,
        bytes_written=atoms * num_kv_heads * (channels * element_bytes + 4.0),
        vector_flops=2.0 * entries * num_kv_heads * channels + 5.0 * num_queries * atoms,
        launches=2.0,
    )
