"""Work of selections that score tokens and keep the best."""

from __future__ import annotations

import math

from kvsim.ops.work import Work


def score_with_window(
    context_tokens: float,
    window_tokens: int,
    num_attention_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: float,
) -> Work:
    """Attention of the last ``window_tokens`` queries to all keys, pooled (SnapKV, arXiv 2404.14469)."""
    return Work(
        flops=2.0 * window_tokens * context_tokens * head_dim * num_attention_heads,
        bytes_read=context_tokens * num_kv_heads * head_dim * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=5.0 * window_tokens * context_tokens * num_attention_heads,
    )


def select_top_k(context_tokens: float, num_kv_heads: int) -> Work:
    """Radix-style top-k over fp32 scores: four passes over the scores."""
    scores_bytes = context_tokens * num_kv_heads * 4.0
    return Work(bytes_read=4.0 * scores_bytes, bytes_written=scores_bytes, launches=4.0)


def compact(kept_tokens: float, bytes_per_token: float) -> Work:
    """Gather kept tokens into new pages: read and write each once."""
    size_bytes = kept_tokens * bytes_per_token
    return Work(bytes_read=size_bytes, bytes_written=size_bytes)


def pool_scores(context_tokens: float, num_kv_heads: int, kernel_size: int) -> Work:
    """Smooth fp32 scores over neighbouring tokens (SnapKV's pooling): one add per kernel position."""
    scores_bytes = context_tokens * num_kv_heads * 4.0
    return Work(
        bytes_read=scores_bytes,
        bytes_written=scores_bytes,
        vector_flops=context_tokens * num_kv_heads * kernel_size,
    )


def accumulate_attention(
    context_tokens: float, num_attention_heads: int, num_kv_heads: int, head_dim: int, element_bytes: float
) -> Work:
    """Sum of the causal attention that each prompt token receives (H2O, arXiv 2306.14048).

    A fused attention kernel never holds the probabilities, so QK^T of n²/2 pairs is computed again: n²·D·Hq FLOPs
    on the tensor units and 5 vector FLOPs per pair (scale, subtract the stored maximum, exp, normalise, add).
    """
    pairs = 0.5 * context_tokens * context_tokens * num_attention_heads
    return Work(
        flops=2.0 * pairs * head_dim,
        bytes_read=context_tokens * (num_attention_heads + num_kv_heads) * head_dim * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=5.0 * pairs,
    )


def score_keys(context_tokens: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """One number per key: its norm (Knorm, arXiv 2406.11430) or a product with a fixed vector (arXiv 2503.02812)."""
    elements = context_tokens * num_kv_heads * head_dim
    return Work(
        bytes_read=elements * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=2.0 * elements,
    )


def score_key_directions(context_tokens: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Cosine of each key with the mean direction of all (KeyDiff, arXiv 2504.15364).

    Two passes over the keys, each with a norm: the first adds directions up, the second takes products with the sum.
    """
    elements = context_tokens * num_kv_heads * head_dim
    return Work(
        bytes_read=2.0 * elements * element_bytes,
        bytes_written=context_tokens * num_kv_heads * 4.0,
        vector_flops=8.0 * elements,
        launches=2.0,
    )


def query_statistics(
    prompt_tokens: float, num_attention_heads: int, head_dim: int, element_bytes: float, *, with_covariance: bool
) -> Work:
    """Mean of each query head's queries, and their covariance: a D x D product over tokens (arXiv 2510.00636)."""
    elements = prompt_tokens * num_attention_heads * head_dim
    return Work(
        flops=2.0 * elements * head_dim if with_covariance else 0.0,
        bytes_read=elements * element_bytes,
        bytes_written=num_attention_heads * head_dim * (1.0 + (head_dim if with_covariance else 0.0)) * element_bytes,
        vector_flops=elements,
    )


def score_expected_attention(
    context_tokens: float,
    num_attention_heads: int,
    num_kv_heads: int,
    k_head_dim: int,
    v_head_dim: int,
    element_bytes: float,
    *,
    with_covariance: bool,
) -> Work:
    """Mean weight of each token under Gaussian queries, times the length of its value (arXiv 2510.00636).

    Per query head and key a product with the mean and, with covariances, one with a D x D matrix and a second with the
    key; then the softmax over tokens. Logits of all query heads are written and read between the two launches.
    """
    pairs = context_tokens * num_attention_heads
    width = k_head_dim + 2.0 if with_covariance else 1.0
    key_and_value = context_tokens * num_kv_heads * (k_head_dim + v_head_dim) * element_bytes
    return Work(
        flops=2.0 * pairs * k_head_dim * width,
        bytes_read=key_and_value + 4.0 * pairs,
        bytes_written=4.0 * pairs + 4.0 * context_tokens * num_kv_heads,
        vector_flops=5.0 * pairs + 2.0 * context_tokens * num_kv_heads * v_head_dim,
        launches=2.0,
    )


def draw_scores(context_tokens: float, num_kv_heads: int) -> Work:
    """Draw a random number per token and KV head."""
    scores = context_tokens * num_kv_heads
    return Work(bytes_written=4.0 * scores, vector_flops=10.0 * scores)


def average_chunks(context_tokens: float, num_kv_heads: int) -> Work:
    """Mean of fp32 scores over the tokens of each chunk and all heads (ChunkKV, arXiv 2502.00299)."""
    scores = context_tokens * num_kv_heads
    return Work(bytes_read=4.0 * scores, vector_flops=scores)


def score_lag_relative(
    context_tokens: float, num_kv_heads: int, channels: int, lag_size: int, element_bytes: float
) -> Work:
    """Spread of each K and V within the range of the next ``lag_size`` tokens (LagKV, arXiv 2504.04704).

    Per element two comparisons for the range, a shift and a scaling into it, and a sum and a sum of squares.
    """
    scores = context_tokens * num_kv_heads
    return Work(
        bytes_read=2.0 * scores * channels * element_bytes,
        bytes_written=4.0 * scores,
        # Softmax and rank within a part, for K and for V.
        vector_flops=7.0 * scores * channels + 2.0 * scores * (5.0 + math.log2(max(2, lag_size))),
        launches=2.0,
    )


def score_leverage(context_tokens: float, num_kv_heads: int, channels: int, element_bytes: float) -> Work:
    """Squared length of each K and V as a share of its neighbours' (CurDKV, arXiv 2509.15038)."""
    scores = context_tokens * num_kv_heads
    return Work(
        bytes_read=scores * channels * element_bytes,
        bytes_written=4.0 * scores,
        vector_flops=2.0 * scores * channels + 6.0 * scores,
    )


def key_similarity(held_tokens: float, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Cosine of every key with every other, and their column means (R-KV, arXiv 2505.24133).

    As one kernel that never writes the n x n products: 2·n²·D·H FLOPs on the tensor units; per pair a threshold, a
    running maximum and an addition; per channel a square, an addition and a scaling. Keys are read once as rows and
    once as columns, further reads come from cache.
    """
    pairs = held_tokens * held_tokens * num_kv_heads
    keys = held_tokens * num_kv_heads * head_dim
    return Work(
        flops=2.0 * pairs * head_dim,
        bytes_read=2.0 * keys * element_bytes,
        bytes_written=held_tokens * num_kv_heads * 4.0,
        vector_flops=3.0 * pairs + 3.0 * keys,
    )


def joint_scores(held_tokens: float, num_kv_heads: int) -> Work:
    """A softmax over one fp32 score per token and head, and its mixture with another (5 FLOPs each)."""
    scores = held_tokens * num_kv_heads
    return Work(bytes_read=2.0 * scores * 4.0, bytes_written=scores * 4.0, vector_flops=5.0 * scores)
