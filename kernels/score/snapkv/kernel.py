"""SnapKV's last launch: average over rows, pool over neighbouring tokens, keep the window."""

import torch
import triton
import triton.language as tl

from ...launches import Launch
from ..batch import check_fp32, require

_TILE = 512


@triton.jit
def snapkv_pool_kernel(
    received_ptr,
    context_lens_ptr,
    scores_ptr,
    num_tokens,
    NUM_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    TAKE_MAXIMUM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pool one tile of one KV head; +inf for the window's tokens, -inf beyond the context."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    context = tl.load(context_lens_ptr + b)
    scored = context - WINDOW
    head = b.to(tl.int64) * tl.num_programs(1) + h
    received_ptr += head * ROW_BLOCKS * num_tokens
    pooled = tl.zeros([TILE], tl.float32)
    for step in tl.static_range(KERNEL_SIZE):
        neighbour = token + (step - KERNEL_SIZE // 2)
        mask = (neighbour >= 0) & (neighbour < scored)
        received = tl.zeros([TILE], tl.float32)
        for row_block in tl.static_range(ROW_BLOCKS):
            received += tl.load(received_ptr + row_block * num_tokens + neighbour, mask=mask, other=0.0)
        # Probabilities are at least 0, so neither pooling notices the zeros beyond the ends.
        pooled = tl.maximum(pooled, received) if TAKE_MAXIMUM else pooled + received
    score = pooled / NUM_ROWS if TAKE_MAXIMUM else pooled / (NUM_ROWS * KERNEL_SIZE)
    score = tl.where(token < scored, score, tl.where(token < context, float("inf"), float("-inf")))
    tl.store(scores_ptr + head * num_tokens + token, score, mask=token < num_tokens)


def plan_snapkv_pool(
    received: torch.Tensor,
    context_lens: torch.Tensor,
    scores: torch.Tensor,
    *,
    window: int,
    group: int,
    kernel_size: int,
    pooling: str,
) -> Launch:
    """Lay out the pooling of `received`, (batch, num_kv_heads, row blocks, tokens), into `scores`.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit, or the pooling is not defined.
    """
    check_fp32(received=received, scores=scores)
    batch, num_kv_heads, row_blocks, num_tokens = received.shape
    require(
        {
            "scores must be (batch, num_kv_heads, tokens)": scores.shape == (batch, num_kv_heads, num_tokens),
            "kernel_size must be odd": kernel_size % 2 == 1,
            "pooling must be 'average' or 'maximum'": pooling in {"average", "maximum"},
        }
    )
    return Launch(
        kernel=snapkv_pool_kernel,
        grid=(triton.cdiv(num_tokens, _TILE), num_kv_heads, batch),
        arguments=(received, context_lens, scores, num_tokens),
        options={
            "NUM_ROWS": window * group,
            "WINDOW": window,
            "ROW_BLOCKS": row_blocks,
            "KERNEL_SIZE": kernel_size,
            "TAKE_MAXIMUM": pooling == "maximum",
            "TILE": _TILE,
            "num_warps": 4,
        },
    )
