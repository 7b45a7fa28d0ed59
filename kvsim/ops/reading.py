"""Work of selections that choose what a step reads."""

from __future__ import annotations

from kvsim.ops.work import Work


def page_bounds(tokens: float, page_size: int, num_kv_heads: int, head_dim: int, element_bytes: float) -> Work:
    """Channel-wise minimum and maximum of the keys of each page (Quest, arXiv 2406.10774)."""
    keys_bytes = tokens * num_kv_heads * head_dim * element_bytes
    return Work(
        bytes_read=keys_bytes,
        bytes_written=2.0 * keys_bytes / page_size,
        vector_flops=2.0 * tokens * num_kv_heads * head_dim,
    )


def compress_blocks(
    tokens: float, block_size: int, stride: int, num_kv_heads: int, channels: int, element_bytes: float
) -> Work:
    """Make one vector of ``channels`` of each block of ``block_size`` tokens, one per ``stride`` (NSA, 2502.11089).

    The paper's map is an MLP of unstated width; one matrix of block_size x channels to channels is counted.
    """
    made = tokens / stride * num_kv_heads
    return Work(
        flops=2.0 * made * block_size * channels * channels,
        bytes_read=tokens * num_kv_heads * channels * element_bytes,
        bytes_written=made * channels * element_bytes,
    )
