"""Page criticality from bounds of the keys, and the bounds' update when tokens are appended.

Tile names: b request, h KV head, m query head within its group, p page within a tile, n token within a page,
d dimension, s split.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.batch import MIN_DOT_ROWS, DecodeBatch
from ...decode_attention.softmax import load_block_ids, split_range
from ...launches import Launch, LaunchConfig
from ..batch import check_cache, check_fp32, check_splits, require
from ..pieces import fill_beyond


@triton.jit
def quest_score_kernel(
    query_ptr,
    key_min_ptr,
    key_max_ptr,
    block_table_ptr,
    context_lens_ptr,
    scores_ptr,
    scale,
    num_pages,
    query_stride_b,
    query_stride_h,
    bound_stride_block,
    bound_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Score one split of the pages of one KV head.

    The larger of q * min and q * max is q * max where q is positive and q * min where it is negative, so the bound is
    the sum of two matrix products.
    """
    s = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    pages = tl.cdiv(tl.load(context_lens_ptr + b), PAGE_SIZE)
    begin, end = split_range(pages, s, NUM_SPLITS, BLOCK_P)
    query_offset = b * query_stride_b + (h * GROUP + m) * query_stride_h
    query_mask = (m[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    query = tl.load(query_ptr + query_offset[:, None] + d[None, :], mask=query_mask, other=0.0)
    wide = query.to(tl.float32)
    positive = tl.maximum(wide, 0.0).to(query.dtype)
    negative = tl.minimum(wide, 0.0).to(query.dtype)

    scores_row_ptr = scores_ptr + (b.to(tl.int64) * tl.num_programs(1) + h) * num_pages
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + p, end, 1)
    for tile in range(begin, end, BLOCK_P):
        page = tile + p
        offset = block.to(tl.int64) * bound_stride_block + h * bound_stride_h
        block = load_block_ids(block_table_row_ptr, page + BLOCK_P, end, 1)
        mask = page[:, None] < end
        if HEAD_DIM < BLOCK_D:
            mask = mask & (d[None, :] < HEAD_DIM)
        highest = tl.load(key_max_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)
        lowest = tl.load(key_min_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)
        bound = tl.dot(positive, tl.trans(highest), input_precision="ieee")
        bound = tl.dot(negative, tl.trans(lowest), bound, input_precision="ieee")
        score = tl.max(tl.where(m[:, None] < GROUP, bound, float("-inf")), 0) * scale
        # The newest page is always attended.
        score = tl.where(page == pages - 1, float("inf"), score)
        tl.store(scores_row_ptr + page, score, mask=page < end)
    fill_beyond(scores_row_ptr, pages, num_pages, s, NUM_SPLITS, BLOCK_P)


@triton.jit
def quest_bounds_kernel(
    key_ptr,
    key_min_ptr,
    key_max_ptr,
    block_table_ptr,
    context_lens_ptr,
    new_lens_ptr,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    bound_stride_block,
    bound_stride_h,
    block_table_stride_b,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fold the newest tokens' keys into the bounds of a few pages of one KV head; read no older key."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    context = tl.load(context_lens_ptr + b)
    first = context - tl.load(new_lens_ptr + b)
    p = first // PAGE_SIZE + tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, PAGE_SIZE)
    d = tl.arange(0, BLOCK_D)
    touched = (p * PAGE_SIZE < context) & (first < context)
    block = tl.load(block_table_ptr + b.to(tl.int64) * block_table_stride_b + p, mask=touched, other=0).to(tl.int64)
    # A row without a new token stands for its page's first or last new one: a bound does not change by a repetition.
    token = p[:, None] * PAGE_SIZE + n[None, :]
    row = tl.minimum(tl.maximum(token, first), context - 1) - p[:, None] * PAGE_SIZE
    offset = block[:, None] * key_stride_block + row * key_stride_token + h * key_stride_h
    mask = touched[:, None, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d[None, None, :] < HEAD_DIM)
    key = tl.load(key_ptr + offset[:, :, None] + d[None, None, :], mask=mask, other=0.0).to(tl.float32)
    lowest = tl.min(key, 1)
    highest = tl.max(key, 1)

    bound_offset = block[:, None] * bound_stride_block + h * bound_stride_h + d[None, :]
    written = touched[:, None] & (d[None, :] < HEAD_DIM)
    started = written & (p[:, None] * PAGE_SIZE < first)
    before = tl.load(key_min_ptr + bound_offset, mask=started, other=float("inf"))
    lowest = tl.minimum(lowest, before.to(tl.float32))
    before = tl.load(key_max_ptr + bound_offset, mask=started, other=float("-inf"))
    highest = tl.maximum(highest, before.to(tl.float32))
    tl.store(key_min_ptr + bound_offset, lowest.to(key_min_ptr.dtype.element_ty), mask=written)
    tl.store(key_max_ptr + bound_offset, highest.to(key_max_ptr.dtype.element_ty), mask=written)


def _check_bounds(case: DecodeBatch, key_min: torch.Tensor, key_max: torch.Tensor, dtype: torch.dtype) -> None:
    require(
        {
            "bounds must be (num_blocks, num_kv_heads, head_dim)": key_min.shape
            == key_max.shape
            == (len(key_min), case.num_kv_heads, case.head_dim),
            "bounds must be contiguous along head_dim": key_min.stride(-1) == key_max.stride(-1) == 1,
            "both bounds must have the same strides": key_min.stride() == key_max.stride(),
            "bounds and keys must have one dtype": key_min.dtype == key_max.dtype == dtype,
        }
    )


def plan_quest_scores(
    case: DecodeBatch, inputs: Mapping[str, Any], scores: torch.Tensor, config: LaunchConfig, num_splits: int
) -> tuple[Launch, ...]:
    """Lay out the criticality of pages of ``case.block_size`` tokens into `scores`, (batch, num_kv_heads, pages).

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    query, bounds, block_table = inputs["query"], inputs["bounds"], inputs["block_table"]
    key_min, key_max = bounds["key_min"], bounds["key_max"]
    _check_bounds(case, key_min, key_max, query.dtype)
    check_fp32(scores=scores)
    check_splits(num_splits=num_splits)
    batch = len(case.context_lens)
    require(
        {
            "the number of query heads must be a multiple of that of KV heads": case.num_query_heads % case.num_kv_heads
            == 0,
            "query must be (batch, num_query_heads, head_dim)": query.shape
            == (batch, case.num_query_heads, case.head_dim),
            "query must be contiguous along head_dim": query.stride(-1) == 1,
            "scores must be (batch, num_kv_heads, pages of the longest context)": scores.shape
            == (batch, case.num_kv_heads, triton.cdiv(max(case.context_lens), case.block_size)),
        }
    )
    launch = Launch(
        kernel=quest_score_kernel,
        grid=(num_splits, case.num_kv_heads, batch),
        arguments=(
            *(query, key_min, key_max, block_table, inputs["context_lens"], scores),
            *(inputs["scale"], scores.shape[-1]),
            *query.stride()[:2],
            *key_min.stride()[:2],
            block_table.stride(0),
        ),
        options={
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "PAGE_SIZE": case.block_size,
            "NUM_SPLITS": num_splits,
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_P": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    return (launch,)


def plan_quest_bounds(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    key_min: torch.Tensor,
    key_max: torch.Tensor,
    config: LaunchConfig,
    *,
    most_new: int,
) -> tuple[Launch, ...]:
    """Lay out the update of bounds, in place, for the newest ``new_lens`` tokens, at most `most_new` per request.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit, or a page is not a power of two of tokens.
    """
    check_cache(case, inputs)
    key, block_table, new_lens = inputs["fields"]["key"], inputs["block_table"], inputs["new_lens"]
    _check_bounds(case, key_min, key_max, key.dtype)
    require(
        {
            "a page must hold a power of two of tokens": case.block_size & (case.block_size - 1) == 0,
            "new_lens must be int32, one per request": new_lens.dtype == torch.int32
            and new_lens.shape == (len(block_table),),
            "there must be a bound per block": len(key_min) == len(key),
        }
    )
    block_p = max(1, config.block_n // case.block_size)
    # New tokens may start in the middle of a page.
    most_pages = triton.cdiv(most_new - 1, case.block_size) + 1
    launch = Launch(
        kernel=quest_bounds_kernel,
        grid=(triton.cdiv(most_pages, block_p), case.num_kv_heads, len(block_table)),
        arguments=(
            *(key, key_min, key_max, block_table, inputs["context_lens"], new_lens),
            *key.stride()[:3],
            *key_min.stride()[:2],
            block_table.stride(0),
        ),
        options={
            "HEAD_DIM": case.head_dim,
            "PAGE_SIZE": case.block_size,
            "BLOCK_P": block_p,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
        },
    )
    return (launch,)
