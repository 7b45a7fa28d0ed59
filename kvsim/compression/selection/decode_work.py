"""Work of R-KV's and InfoKV's scores."""

from __future__ import annotations

from kvsim.ops import Work


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


def prompt_logits(tokens: float, hidden_size: int, vocab_size: int, element_bytes: float, share: float) -> Work:
    """A ``share`` of the LM head over ``tokens`` rows: 2·d_model·|V| FLOPs each; its weights are read once.

    Logits are written for who takes their entropy; engines do it in pieces, which read the weights more than once.
    """
    return Work(
        flops=2.0 * share * tokens * hidden_size * vocab_size,
        bytes_read=share * (tokens + vocab_size) * hidden_size * element_bytes,
        bytes_written=share * tokens * vocab_size * element_bytes,
        launches=share,
    )


def candidate_entropy(tokens: float, vocab_size: int, candidates: int, element_bytes: float, share: float) -> Work:
    """A ``share`` of the entropy over each row's largest logits: a comparison per logit, 5 FLOPs per candidate."""
    return Work(
        bytes_read=share * tokens * vocab_size * element_bytes,
        bytes_written=share * tokens * 4.0,
        vector_flops=share * tokens * (vocab_size + 5.0 * candidates),
        launches=share,
    )


def layer_distance(tokens: float, hidden_size: int, element_bytes: float) -> Work:
    """Cosine distance of one layer's output from the last layer's: a product and two norms.

    The layer's output is kept until the last layer's is there: written once, read once.
    """
    elements = tokens * hidden_size
    return Work(
        bytes_read=2.0 * elements * element_bytes,
        bytes_written=elements * element_bytes + tokens * 4.0,
        vector_flops=6.0 * elements,
    )
