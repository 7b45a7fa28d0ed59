"""TOVA's second launch: average over the heads of a layer."""

import torch
import triton
import triton.language as tl

from ...launches import Launch
from ..batch import check_fp32, require

_TILE = 256


@triton.jit
def tova_average_kernel(
    received_ptr,
    context_lens_ptr,
    scores_ptr,
    num_tokens,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TILE: tl.constexpr,
):
    """Average what the query heads gave each token; +inf for the newest token, -inf beyond the context."""
    b = tl.program_id(1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    h = tl.arange(0, BLOCK_H)
    newest = tl.load(context_lens_ptr + b) - 1
    head = (b * NUM_KV_HEADS + h).to(tl.int64)
    received = tl.load(
        received_ptr + head[:, None] * num_tokens + token[None, :],
        mask=(h[:, None] < NUM_KV_HEADS) & (token[None, :] < newest),
        other=0.0,
    )
    score = tl.sum(received, 0) / NUM_QUERY_HEADS
    score = tl.where(token < newest, score, tl.where(token == newest, float("inf"), float("-inf")))
    tl.store(scores_ptr + b.to(tl.int64) * num_tokens + token, score, mask=token < num_tokens)


def plan_tova_average(
    received: torch.Tensor, context_lens: torch.Tensor, scores: torch.Tensor, num_query_heads: int
) -> Launch:
    """Lay out the average of `received`, (batch, num_kv_heads, 1, tokens), into `scores`, (batch, 1, tokens).

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    check_fp32(received=received, scores=scores)
    batch, num_kv_heads, blocks, num_tokens = received.shape
    require(
        {
            "received must have one row block": blocks == 1,
            "scores must be (batch, 1, tokens)": scores.shape == (batch, 1, num_tokens),
        }
    )
    return Launch(
        kernel=tova_average_kernel,
        grid=(triton.cdiv(num_tokens, _TILE), batch),
        arguments=(received, context_lens, scores, num_tokens),
        options={
            "NUM_QUERY_HEADS": num_query_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "BLOCK_H": triton.next_power_of_2(num_kv_heads),
            "TILE": _TILE,
            "num_warps": 4,
        },
    )
