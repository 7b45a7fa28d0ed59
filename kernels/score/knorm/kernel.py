"""One pass over K: minus the norm of each key.

Tile names: b request, h KV head, n token within a tile, d dimension, s split.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.batch import DecodeBatch
from ...decode_attention.softmax import load_block_ids, split_range
from ...launches import Launch, LaunchConfig
from ..batch import check_cache, check_fp32, check_splits, require
from ..pieces import fill_beyond


@triton.jit
def knorm_kernel(
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    scores_ptr,
    num_tokens,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    block_table_stride_b,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Score one split of one KV head."""
    s = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    context = tl.load(context_lens_ptr + b)
    begin, end = split_range(context, s, NUM_SPLITS, BLOCK_N)
    scores_row_ptr = scores_ptr + (b.to(tl.int64) * tl.num_programs(1) + h) * num_tokens
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        token = tile + n
        offset = block.to(tl.int64) * key_stride_block + (token % BLOCK_SIZE) * key_stride_token + h * key_stride_h
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            mask = mask & (d[None, :] < HEAD_DIM)
        key = tl.load(key_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(scores_row_ptr + token, -tl.sqrt(tl.sum(key * key, 1)), mask=token < end)
    fill_beyond(scores_row_ptr, context, num_tokens, s, NUM_SPLITS, BLOCK_N)


def plan_knorm(
    case: DecodeBatch, inputs: Mapping[str, Any], scores: torch.Tensor, config: LaunchConfig, num_splits: int
) -> tuple[Launch, ...]:
    """Lay out the norms into `scores`, (batch, num_kv_heads, tokens).

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_cache(case, inputs)
    check_fp32(scores=scores)
    check_splits(num_splits=num_splits)
    shape = (len(case.context_lens), case.num_kv_heads, max(case.context_lens))
    require({"scores must be (batch, num_kv_heads, longest context)": scores.shape == shape})
    key, block_table = inputs["fields"]["key"], inputs["block_table"]
    launch = Launch(
        kernel=knorm_kernel,
        grid=(num_splits, case.num_kv_heads, len(block_table)),
        arguments=(
            *(key, block_table, inputs["context_lens"], scores, scores.shape[-1]),
            *key.stride()[:3],
            block_table.stride(0),
        ),
        options={
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": num_splits,
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "NUM_STAGES": config.num_stages,
        },
    )
    return (launch,)
