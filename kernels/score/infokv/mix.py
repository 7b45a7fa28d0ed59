"""InfoKV's element-wise launches: entropy weighted by the distance to the last layer, its softmax, the mixture."""

import math

import torch
import triton
import triton.language as tl

from ...decode_attention.softmax import split_range
from ...launches import Launch, LaunchConfig
from ..batch import check_fp32, check_splits, require
from ..pieces import LOWEST, combine_lse

SMALLEST_NORM = tl.constexpr(1e-8)
"""What torch.nn.functional.cosine_similarity divides by at least."""
DIMENSION_TILE = 512


@triton.jit
def weighted_entropy_kernel(
    hidden_ptr,
    last_hidden_ptr,
    entropy_ptr,
    weighted_ptr,
    tau,
    num_tokens,
    hidden_stride,
    last_hidden_stride,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write (1 - cosine + tau) * entropy of a few tokens."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = token.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)
    product = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    last_square = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(0, WIDTH, BLOCK_D, num_stages=NUM_STAGES):
        mask = (token[:, None] < num_tokens) & (first + d[None, :] < WIDTH)
        hidden = tl.load(hidden_ptr + row * hidden_stride + first + d[None, :], mask=mask, other=0.0)
        last = tl.load(last_hidden_ptr + row * last_hidden_stride + first + d[None, :], mask=mask, other=0.0)
        hidden = hidden.to(tl.float32)
        last = last.to(tl.float32)
        product += tl.sum(hidden * last, 1)
        square += tl.sum(hidden * hidden, 1)
        last_square += tl.sum(last * last, 1)
    norms = tl.maximum(tl.sqrt(square), SMALLEST_NORM) * tl.maximum(tl.sqrt(last_square), SMALLEST_NORM)
    entropy = tl.load(entropy_ptr + token, mask=token < num_tokens, other=0.0)
    tl.store(weighted_ptr + token, (1.0 - product / norms + tau) * entropy, mask=token < num_tokens)


@triton.jit
def weighted_lse_kernel(
    weighted_ptr, context_lens_ptr, lse_ptr, log2_e, num_tokens, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr
):
    """Write the log2-sum-exp2 of one split of one request's weighted entropies, in log2 units."""
    s = tl.program_id(0)
    b = tl.program_id(1)
    n = tl.arange(0, TILE)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, TILE)
    weighted_ptr += b.to(tl.int64) * num_tokens
    top = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for tile in range(begin, end, TILE):
        weighted = tl.load(weighted_ptr + tile + n, mask=tile + n < end, other=float("-inf")) * log2_e
        new_top = tl.maximum(top, weighted)
        total = total * tl.exp2(top - new_top) + tl.exp2(weighted - new_top)
        top = new_top
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - highest), 0)
    lse = tl.where(total > 0.0, highest + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + b * NUM_SPLITS + s, lse)


@triton.jit
def mixed_scores_kernel(
    attention_ptr,
    weighted_ptr,
    lse_ptr,
    context_lens_ptr,
    scores_ptr,
    alpha,
    log2_e,
    num_tokens,
    LSE_SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mix attention and the softmax of the weighted entropies for one tile of one KV head."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = b + tl.arange(0, 1)
    lse = combine_lse(lse_ptr + row * LSE_SPLITS, row >= 0, LSE_SPLITS)
    present = token < tl.load(context_lens_ptr + b)
    weighted = tl.load(weighted_ptr + b.to(tl.int64) * num_tokens + token, mask=present, other=0.0)
    head = b.to(tl.int64) * tl.num_programs(1) + h
    attention = tl.load(attention_ptr + head * num_tokens + token, mask=present, other=0.0)
    score = alpha * attention + (1.0 - alpha) * tl.exp2(weighted * log2_e - lse)
    tl.store(scores_ptr + head * num_tokens + token, tl.where(present, score, float("-inf")), mask=token < num_tokens)


def plan_weighted_entropy(
    hidden: torch.Tensor,
    last_hidden: torch.Tensor,
    entropy: torch.Tensor,
    weighted: torch.Tensor,
    tau: float,
    config: LaunchConfig,
) -> tuple[Launch, ...]:
    """Lay out (1 - cos + tau) * entropy into `weighted`, (tokens,), from two (tokens, width) hidden states.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    check_fp32(entropy=entropy, weighted=weighted)
    num_tokens, width = hidden.shape
    require(
        {
            "hidden and last_hidden must be of one shape and contiguous along the width": hidden.shape
            == last_hidden.shape
            and hidden.stride(1) == last_hidden.stride(1) == 1,
            "entropy and weighted must be (tokens,)": entropy.shape == weighted.shape == (num_tokens,),
        }
    )
    launch = Launch(
        kernel=weighted_entropy_kernel,
        grid=(triton.cdiv(num_tokens, config.block_n),),
        arguments=(hidden, last_hidden, entropy, weighted, tau, num_tokens, hidden.stride(0), last_hidden.stride(0)),
        options={
            "WIDTH": width,
            "BLOCK_N": config.block_n,
            "BLOCK_D": min(DIMENSION_TILE, triton.next_power_of_2(width)),
            "NUM_STAGES": config.num_stages,
            "num_warps": config.num_warps,
        },
    )
    return (launch,)


def plan_mixed_scores(
    attention: torch.Tensor,
    weighted: torch.Tensor,
    context_lens: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
    alpha: float,
    config: LaunchConfig,
) -> tuple[Launch, ...]:
    """Lay out the sums of `weighted`, (batch, tokens), into `lse`, (batch, splits), and the mixture into `scores`.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    check_fp32(attention=attention, weighted=weighted, lse=lse, scores=scores)
    batch, num_kv_heads, num_tokens = attention.shape
    check_splits(lse_splits=lse.shape[1])
    require(
        {
            "scores must be of the shape of attention": scores.shape == attention.shape,
            "weighted must be (batch, tokens)": weighted.shape == (batch, num_tokens),
            "lse must be (batch, splits)": len(lse) == batch,
            "context_lens must be int32, one per request": context_lens.dtype == torch.int32
            and context_lens.shape == (batch,),
        }
    )
    log2_e = math.log2(math.e)
    options = {"TILE": config.block_n, "num_warps": config.num_warps}
    return (
        Launch(
            weighted_lse_kernel,
            (lse.shape[1], batch),
            (weighted, context_lens, lse, log2_e, num_tokens),
            {**options, "NUM_SPLITS": lse.shape[1]},
        ),
        Launch(
            mixed_scores_kernel,
            (triton.cdiv(num_tokens, config.block_n), num_kv_heads, batch),
            (attention, weighted, lse, context_lens, scores, alpha, log2_e, num_tokens),
            {**options, "LSE_SPLITS": lse.shape[1]},
        ),
    )
