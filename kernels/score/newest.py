"""Attention of the newest queries of each request to all its keys, without the values.

One pass gives the row sums, one the probabilities that each key receives.

Tile names: b request, h KV head, m row, n token within a tile, d dimension, s split. A row is one query of one head of
the KV head's group: row ``m`` of a window of queries is query ``m // GROUP`` and query head ``h * GROUP + m % GROUP``.
Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ..decode_attention.batch import MIN_DOT_ROWS, DecodeBatch
from ..decode_attention.softmax import load_block_ids, split_range
from ..launches import Launch, LaunchConfig
from .batch import check_cache, check_fp32, check_splits, require
from .pieces import LOWEST, combine_lse


@dataclass(frozen=True)
class RowConfig(LaunchConfig):
    """A tiling over rows (query times head of the group) as well as tokens."""

    block_m: int = MIN_DOT_ROWS


@triton.jit
def load_rows(
    query_ptr, h, m, d, stride_w, stride_h, WINDOW: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Load rows of one request's window of queries, 0 where there is none."""
    mask = (m[:, None] < WINDOW * GROUP) & (d[None, :] < HEAD_DIM)
    offset = (m // GROUP) * stride_w + (h * GROUP + m % GROUP) * stride_h
    return tl.load(query_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(
    key_ptr,
    block,
    token,
    end,
    stride_block,
    stride_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load one KV head's keys of a tile of tokens, 0 beyond the end."""
    d = tl.arange(0, BLOCK_D)
    offset = block.to(tl.int64) * stride_block + (token % BLOCK_SIZE) * stride_token
    mask = token[:, None] < end
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d[None, :] < HEAD_DIM)
    return tl.load(key_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _sums_step(score, scale_log2, top, total):
    """Fold a tile of unscaled scores into each row's maximum (unscaled, too) and sum of exponentials."""
    new_top = tl.maximum(top, tl.max(score, 1))
    # Scaling and subtracting in one multiply-add per score is why the scores come unscaled.
    weight = tl.exp2(score * scale_log2 - (new_top * scale_log2)[:, None])
    return new_top, total * tl.exp2((top - new_top) * scale_log2) + tl.sum(weight, 1)


@triton.jit
def newest_lse_kernel(
    query_ptr,
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    lse_ptr,
    scale_log2,
    num_kv_heads,
    query_stride_b,
    query_stride_w,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the log2-sum-exp2 of each row's causal scores over one split."""
    s = tl.program_id(0) // ROW_BLOCKS
    h = tl.program_id(1)
    b = tl.program_id(2)
    m = (tl.program_id(0) % ROW_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    context = tl.load(context_lens_ptr + b)
    begin, end = split_range(context, s, NUM_SPLITS, BLOCK_N)
    query = load_rows(query_ptr + b * query_stride_b, h, m, d, query_stride_w, query_stride_h, WINDOW, GROUP, HEAD_DIM)
    position = context - WINDOW + m // GROUP

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    key_ptr += h * key_stride_h
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    # Whole tiles that the window's first query sees need no mask.
    seen_by_all = tl.maximum(tl.minimum(end, context - WINDOW + 1), 0) // BLOCK_N * BLOCK_N
    for tile in range(begin, seen_by_all, BLOCK_N):
        key = load_keys(
            key_ptr, block, tile + n, end, key_stride_block, key_stride_token, HEAD_DIM, BLOCK_SIZE, BLOCK_D
        )
        block = load_block_ids(block_table_row_ptr, tile + n + BLOCK_N, end, BLOCK_SIZE)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        top, total = _sums_step(score, scale_log2, top, total)
    for tile in range(tl.maximum(begin, seen_by_all), end, BLOCK_N):
        token = tile + n
        key = load_keys(key_ptr, block, token, end, key_stride_block, key_stride_token, HEAD_DIM, BLOCK_SIZE, BLOCK_D)
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
        score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
        top, total = _sums_step(score, scale_log2, top, total)

    row = ((b * num_kv_heads + h).to(tl.int64) * (WINDOW * GROUP) + m) * NUM_SPLITS + s
    lse = tl.where(total > 0.0, top * scale_log2 + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + row, lse, mask=m < WINDOW * GROUP)


@triton.jit
def newest_score_kernel(
    query_ptr,
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    lse_ptr,
    scores_ptr,
    scale_log2,
    num_kv_heads,
    num_tokens,
    query_stride_b,
    query_stride_w,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    UNSCORED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LSE_SPLITS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over a block of rows the probability that each key of one split receives; write it or add it.

    Keys of the newest ``UNSCORED`` tokens are left out, so every row sees every key and no causal mask is needed.
    """
    s = tl.program_id(0) // ROW_BLOCKS
    row_block = tl.program_id(0) % ROW_BLOCKS
    h = tl.program_id(1)
    b = tl.program_id(2)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    begin, end = split_range(tl.maximum(tl.load(context_lens_ptr + b) - UNSCORED, 0), s, NUM_SPLITS, BLOCK_N)
    query = load_rows(query_ptr + b * query_stride_b, h, m, d, query_stride_w, query_stride_h, WINDOW, GROUP, HEAD_DIM)
    head = (b * num_kv_heads + h).to(tl.int64)
    lse = combine_lse(lse_ptr + (head * (WINDOW * GROUP) + m) * LSE_SPLITS, m < WINDOW * GROUP, LSE_SPLITS)

    scores_row_ptr = scores_ptr + (head * ROW_BLOCKS + row_block) * num_tokens
    key_ptr += h * key_stride_h
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        key = load_keys(key_ptr, block, token, end, key_stride_block, key_stride_token, HEAD_DIM, BLOCK_SIZE, BLOCK_D)
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        # Keys are the rows of the product: a sum along its columns stays almost within a thread.
        score = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
        received = tl.sum(tl.exp2(score - lse[None, :]), 1)
        if ACCUMULATE:
            received += tl.load(scores_row_ptr + token, mask=token < end, other=0.0)
        tl.store(scores_row_ptr + token, received, mask=token < end)


def row_blocks(rows: int, config: LaunchConfig) -> tuple[int, int]:
    """Rows of a block and the number of blocks: all rows in one, unless the tiling says fewer."""
    block_m = max(MIN_DOT_ROWS, triton.next_power_of_2(rows))
    if isinstance(config, RowConfig):
        block_m = min(block_m, config.block_m)
    return block_m, triton.cdiv(rows, block_m)


def check_newest(case: DecodeBatch, inputs: Mapping[str, Any], window: int, lse: torch.Tensor) -> None:
    """Raise ValueError, naming the first rule broken, unless queries, cache and sums fit each other."""
    check_cache(case, inputs)
    query, key = inputs["query"], inputs["fields"]["key"]
    rows = window * case.group
    require(
        {
            "the number of query heads must be a multiple of that of KV heads": case.num_query_heads % case.num_kv_heads
            == 0,
            "query must be (batch, window, num_query_heads, head_dim)": query.shape
            == (len(case.context_lens), window, case.num_query_heads, case.head_dim),
            "query must be contiguous along head_dim": query.stride(-1) == 1,
            "query and key must have one dtype": query.dtype == key.dtype,
            "scale must be positive": inputs["scale"] > 0,
            "lse must hold a row per request, KV head, query and head of its group": lse.numel()
            == len(query) * case.num_kv_heads * rows * lse.shape[-1],
        }
    )
    check_fp32(lse=lse)
    check_splits(lse_splits=lse.shape[-1])


def _shared_options(case: DecodeBatch, window: int, config: LaunchConfig) -> dict[str, Any]:
    block_m, blocks = row_blocks(window * case.group, config)
    return {
        "GROUP": case.group,
        "WINDOW": window,
        "HEAD_DIM": case.head_dim,
        "BLOCK_SIZE": case.block_size,
        "ROW_BLOCKS": blocks,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(case.head_dim),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def plan_newest_lse(
    case: DecodeBatch, inputs: Mapping[str, Any], window: int, lse: torch.Tensor, config: LaunchConfig
) -> Launch:
    """Lay out the sums of the newest `window` queries into `lse`, (batch, num_kv_heads, window * group, splits).

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_newest(case, inputs, window, lse)
    query, key, block_table = inputs["query"], inputs["fields"]["key"], inputs["block_table"]
    options = _shared_options(case, window, config)
    return Launch(
        kernel=newest_lse_kernel,
        grid=(lse.shape[-1] * options["ROW_BLOCKS"], case.num_kv_heads, len(query)),
        arguments=(
            *(query, key, block_table, inputs["context_lens"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_kv_heads),
            *query.stride()[:3],
            *key.stride()[:3],
            block_table.stride(0),
        ),
        options={**options, "NUM_SPLITS": lse.shape[-1]},
    )


def plan_newest_scores(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    window: int,
    lse: torch.Tensor,
    scores: torch.Tensor,
    config: LaunchConfig,
    *,
    num_splits: int,
    unscored: int,
    accumulate: bool,
) -> Launch:
    """Lay out the probabilities that keys receive, into `scores`, (batch, num_kv_heads, row blocks, tokens).

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit, or there are unmasked keys after the first query of the window.
    """
    check_newest(case, inputs, window, lse)
    check_fp32(scores=scores)
    check_splits(num_splits=num_splits)
    query, key, block_table = inputs["query"], inputs["fields"]["key"], inputs["block_table"]
    options = _shared_options(case, window, config)
    require(
        {
            "every query must see every scored key: leave out at least window - 1 tokens": unscored >= window - 1,
            "scores must be (batch, num_kv_heads, row blocks, tokens)": scores.shape
            == (len(query), case.num_kv_heads, options["ROW_BLOCKS"], max(case.context_lens)),
        }
    )
    return Launch(
        kernel=newest_score_kernel,
        grid=(num_splits * options["ROW_BLOCKS"], case.num_kv_heads, len(query)),
        arguments=(
            *(query, key, block_table, inputs["context_lens"], lse, scores),
            *(inputs["scale"] * math.log2(math.e), case.num_kv_heads, scores.shape[-1]),
            *query.stride()[:3],
            *key.stride()[:3],
            block_table.stride(0),
        ),
        options={
            **options,
            "UNSCORED": unscored,
            "ACCUMULATE": accumulate,
            "LSE_SPLITS": lse.shape[-1],
            "NUM_SPLITS": num_splits,
        },
    )
