"""Two passes over K: the sum of the normalised keys, then each key's cosine with it.

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

SMALLEST_NORM = tl.constexpr(1e-12)
"""What torch.nn.functional.normalize divides by at least."""


@triton.jit
def keydiff_anchor_kernel(
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    anchor_ptr,
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
    """Write the sum of one split's normalised keys."""
    s = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)
    anchor = tl.zeros([BLOCK_D], tl.float32)
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
        norm = tl.maximum(tl.sqrt(tl.sum(key * key, 1)), SMALLEST_NORM)
        anchor += tl.sum(key * (1.0 / norm)[:, None], 0)
    row = (b.to(tl.int64) * tl.num_programs(1) + h) * NUM_SPLITS + s
    tl.store(anchor_ptr + row * HEAD_DIM + d, anchor, mask=d < HEAD_DIM)


@triton.jit
def keydiff_kernel(
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    anchor_ptr,
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
    part = tl.arange(0, NUM_SPLITS)
    context = tl.load(context_lens_ptr + b)
    begin, end = split_range(context, s, NUM_SPLITS, BLOCK_N)
    row = b.to(tl.int64) * tl.num_programs(1) + h
    # Summed along the second dimension, so that the result's layout does not decide that of the tiles of keys.
    parts = tl.load(
        anchor_ptr + (row * NUM_SPLITS + part)[None, :] * HEAD_DIM + d[:, None], mask=d[:, None] < HEAD_DIM, other=0.0
    )
    # The cosine does not change with the anchor's length, so its sum is as good as its mean.
    anchor = tl.sum(parts, 1)
    anchor = anchor / tl.maximum(tl.sqrt(tl.sum(anchor * anchor, 0)), SMALLEST_NORM)

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
        norm = tl.maximum(tl.sqrt(tl.sum(key * key, 1)), SMALLEST_NORM)
        tl.store(scores_ptr + row * num_tokens + token, -tl.sum(key * anchor[None, :], 1) / norm, mask=token < end)
    fill_beyond(scores_ptr + row * num_tokens, context, num_tokens, s, NUM_SPLITS, BLOCK_N)


def plan_keydiff(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    anchor: torch.Tensor,
    scores: torch.Tensor,
    config: LaunchConfig,
) -> tuple[Launch, ...]:
    """Lay out sums into `anchor`, (batch, num_kv_heads, splits, head_dim), and cosines into `scores`.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_cache(case, inputs)
    check_fp32(scores=scores, anchor=anchor)
    batch, num_splits = len(case.context_lens), anchor.shape[2]
    check_splits(num_splits=num_splits)
    require(
        {
            "scores must be (batch, num_kv_heads, longest context)": scores.shape
            == (batch, case.num_kv_heads, max(case.context_lens)),
            "anchor must be (batch, num_kv_heads, splits, head_dim)": anchor.shape
            == (batch, case.num_kv_heads, num_splits, case.head_dim),
        }
    )
    key, block_table, context_lens = inputs["fields"]["key"], inputs["block_table"], inputs["context_lens"]
    strides = (*key.stride()[:3], block_table.stride(0))
    grid = (num_splits, case.num_kv_heads, batch)
    options = {
        "HEAD_DIM": case.head_dim,
        "BLOCK_SIZE": case.block_size,
        "NUM_SPLITS": num_splits,
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(case.head_dim),
        "num_warps": config.num_warps,
        "NUM_STAGES": config.num_stages,
    }
    return (
        Launch(keydiff_anchor_kernel, grid, (key, block_table, context_lens, anchor, *strides), options),
        Launch(
            keydiff_kernel,
            grid,
            (key, block_table, context_lens, anchor, scores, scores.shape[-1], *strides),
            options,
        ),
    )
