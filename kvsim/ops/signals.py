"""Work of what some scores need beside K, V and Q: a second reading, a surrogate, entropy, distance."""

from __future__ import annotations

import math

from kvsim.ops.work import Work


def read_again(tokens: float, parameters: float, weight_bytes: float, chunk: int) -> Work:
    """Linear layers of ``tokens`` more tokens; each ``chunk`` reads the weights (KVzip, arXiv 2505.23416)."""
    chunks = math.ceil(tokens / chunk)
    return Work(flops=2.0 * tokens * parameters, bytes_read=chunks * weight_bytes, launches=float(chunks))


def attend_again(
    tokens: float, num_attention_heads: int, token_bytes: float, k_head_dim: int, v_head_dim: int, chunk: int
) -> Work:
    """Attention of a second reading in one layer: each chunk sees the whole prompt, and itself up to each token."""
    chunks = math.ceil(tokens / chunk)
    pairs = tokens * tokens + _pairs_within(tokens, chunk)
    return Work(
        flops=2.0 * num_attention_heads * (k_head_dim + v_head_dim) * pairs,
        bytes_read=chunks * tokens * token_bytes,
        vector_flops=4.0 * num_attention_heads * pairs,
        launches=float(chunks),
    )


def most_attention(
    tokens: float,
    num_attention_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: float,
    chunk: int,
    sinks: int,
) -> Work:
    """Largest softmax weight per prompt token from the queries of its chunk's second reading (KVzip's scores).

    Queries meet the keys of the sinks, of their chunk, and of the chunk as read again, all of which are multiplied
    before later ones are masked: 2·D FLOPs per pair, and five vector FLOPs (scale, subtract, exp, normalise, maximum).
    """
    chunks = math.ceil(tokens / chunk)
    whole, rest = divmod(tokens, chunk)
    pairs = num_attention_heads * sum(
        count * size * (sinks + 2.0 * size) for count, size in ((whole, chunk), (1, rest))
    )
    keys = (2.0 * tokens + chunks * sinks) * num_kv_heads
    return Work(
        flops=2.0 * head_dim * pairs,
        bytes_read=(keys + tokens * num_attention_heads) * head_dim * element_bytes,
        bytes_written=tokens * num_kv_heads * 4.0,
        vector_flops=5.0 * pairs,
        launches=float(chunks),
    )


def _pairs_within(tokens: float, chunk: int) -> float:
    """Causal pairs within chunks."""
    whole, rest = divmod(tokens, chunk)
    return whole * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2


def predict_scores(tokens: float, hidden_size: int, num_kv_heads: int, width: int | None, element_bytes: float) -> Work:
    """Scores of ``tokens`` hidden states, one per KV head: an affine map, or through ``width`` GELU units (KVzap).

    The maps lie with the model's weights and every row of a launch shares them: their bytes are left out.
    """
    flops = 2.0 * hidden_size * num_kv_heads if width is None else 2.0 * width * (hidden_size + num_kv_heads)
    return Work(
        flops=tokens * flops,
        bytes_read=tokens * hidden_size * element_bytes,
        bytes_written=tokens * num_kv_heads * 4.0,
        vector_flops=tokens * ((8.0 * width if width else 0.0) + num_kv_heads),
        launches=1.0 if width is None else 2.0,
    )


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
