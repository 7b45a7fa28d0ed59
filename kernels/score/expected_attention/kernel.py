"""A pass over K for the expected logits and their sums, a pass over V for the scores.

Tile names: b request, q query head, h KV head, g query head of its group, n token within a tile, d and e dimensions,
s split.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.batch import DecodeBatch
from ...decode_attention.softmax import load_block_ids, split_range
from ...launches import Launch, LaunchConfig
from ..batch import check_cache, check_fp32, check_splits, require
from ..pieces import LOWEST, combine_lse, fill_beyond


@triton.jit
def expected_logits_kernel(
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    mean_ptr,
    covariance_ptr,
    logits_ptr,
    lse_ptr,
    linear_log2,
    quadratic_log2,
    num_tokens,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one query head's logits (log2 units) for one split, and their log2-sum-exp2 without the sinks."""
    # Query heads of a group run side by side: the second to read a key finds it in the L2 cache.
    q = tl.program_id(0)
    s = tl.program_id(1)
    b = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)
    row = b.to(tl.int64) * tl.num_programs(0) + q
    square = (d[:, None] < HEAD_DIM) & (d[None, :] < HEAD_DIM)
    covariance = tl.load(covariance_ptr + (row * HEAD_DIM + d[:, None]) * HEAD_DIM + d[None, :], mask=square, other=0.0)
    mean = tl.load(mean_ptr + row * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32) * linear_log2

    # Each lane sums its own tokens; lanes meet once, after the loop.
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        offset = block.to(tl.int64) * key_stride_block + (token % BLOCK_SIZE) * key_stride_token
        offset += (q // GROUP) * key_stride_h
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            mask = mask & (d[None, :] < HEAD_DIM)
        key = tl.load(key_ptr + offset[:, None] + d[None, :], mask=mask, other=0.0)
        spread = tl.dot(key, covariance, input_precision="ieee") * quadratic_log2
        logit = tl.sum((spread + mean[None, :]) * key.to(tl.float32), 1)
        logit = tl.where((token >= SINKS) & (token < end), logit, float("-inf"))
        tl.store(logits_ptr + row * num_tokens + token, logit, mask=token < end)
        new_top = tl.maximum(top, logit)
        total = total * tl.exp2(top - new_top) + tl.exp2(logit - new_top)
        top = new_top
    highest = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - highest), 0)
    lse = tl.where(total > 0.0, highest + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + row * NUM_SPLITS + s, lse)


@triton.jit
def expected_attention_kernel(
    value_ptr,
    block_table_ptr,
    context_lens_ptr,
    logits_ptr,
    lse_ptr,
    scores_ptr,
    num_tokens,
    value_stride_block,
    value_stride_token,
    value_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LSE_SPLITS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Average one group's probabilities and scale them by the norms of the values; +inf for the sinks."""
    s = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    g = tl.arange(0, BLOCK_G)
    context = tl.load(context_lens_ptr + b)
    begin, end = split_range(context, s, NUM_SPLITS, BLOCK_N)
    head = b.to(tl.int64) * tl.num_programs(1) + h
    query_row = head * GROUP + g
    lse = combine_lse(lse_ptr + query_row * LSE_SPLITS, g < GROUP, LSE_SPLITS)

    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in tl.range(begin, end, BLOCK_N, num_stages=NUM_STAGES):
        token = tile + n
        offset = block.to(tl.int64) * value_stride_block + (token % BLOCK_SIZE) * value_stride_token
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            mask = mask & (d[None, :] < HEAD_DIM)
        value = tl.load(value_ptr + offset[:, None] + h * value_stride_h + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        logit = tl.load(
            logits_ptr + query_row[:, None] * num_tokens + token[None, :],
            mask=(g[:, None] < GROUP) & (token[None, :] < end),
            other=float("-inf"),
        )
        weight = tl.sum(tl.exp2(logit - lse[:, None]), 0) / GROUP
        score = weight * tl.sqrt(tl.sum(value * value, 1))
        score = tl.where(token < SINKS, float("inf"), score)
        tl.store(scores_ptr + head * num_tokens + token, score, mask=token < end)
    fill_beyond(scores_ptr + head * num_tokens, context, num_tokens, s, NUM_SPLITS, BLOCK_N)


def plan_expected_attention(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
    *,
    num_sinks: int,
    num_splits: int,
) -> tuple[Launch, ...]:
    """Lay out logits and their sums into ``logits`` and ``lse``, then ``scores``.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_cache(case, inputs)
    check_cache(case, inputs, field="value")
    mean, covariance = inputs["query_mean"], inputs["query_covariance"]
    scores, logits, lse = buffers["scores"], buffers["logits"], buffers["lse"]
    check_fp32(scores=scores, logits=logits, lse=lse)
    check_splits(num_splits=num_splits, lse_splits=lse.shape[-1])
    key, value = inputs["fields"]["key"], inputs["fields"]["value"]
    batch, num_tokens = len(case.context_lens), max(case.context_lens)
    heads = (batch, case.num_query_heads, case.head_dim)
    require(
        {
            "the number of query heads must be a multiple of that of KV heads": case.num_query_heads % case.num_kv_heads
            == 0,
            "query_mean must be (batch, num_query_heads, head_dim)": mean.shape == heads,
            "query_covariance must be (batch, num_query_heads, head_dim, head_dim)": covariance.shape
            == (*heads, case.head_dim),
            "query_mean and query_covariance must be contiguous": mean.is_contiguous() and covariance.is_contiguous(),
            "query_covariance and key must have one dtype": covariance.dtype == key.dtype,
            "logits must be (batch, num_query_heads, tokens)": logits.shape == (*heads[:2], num_tokens),
            "lse must be (batch, num_query_heads, splits)": lse.shape[:2] == heads[:2],
            "scores must be (batch, num_kv_heads, tokens)": scores.shape == (batch, case.num_kv_heads, num_tokens),
        }
    )
    block_table, context_lens = inputs["block_table"], inputs["context_lens"]
    options = {
        "GROUP": case.group,
        "SINKS": num_sinks,
        "HEAD_DIM": case.head_dim,
        "BLOCK_SIZE": case.block_size,
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(case.head_dim),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    scale = inputs["scale"]
    expected = Launch(
        kernel=expected_logits_kernel,
        grid=(case.num_query_heads, lse.shape[-1], batch),
        arguments=(
            *(key, block_table, context_lens, mean, covariance, logits, lse),
            *(scale * math.log2(math.e), 0.5 * scale**2 * math.log2(math.e), num_tokens),
            *key.stride()[:3],
            block_table.stride(0),
        ),
        options={**options, "NUM_SPLITS": lse.shape[-1]},
    )
    average = Launch(
        kernel=expected_attention_kernel,
        grid=(num_splits, case.num_kv_heads, batch),
        arguments=(
            *(value, block_table, context_lens, logits, lse, scores, num_tokens),
            *value.stride()[:3],
            block_table.stride(0),
        ),
        options={
            **options,
            "LSE_SPLITS": lse.shape[-1],
            "NUM_SPLITS": num_splits,
            "BLOCK_G": triton.next_power_of_2(case.group),
            "NUM_STAGES": config.num_stages,
        },
    )
    return expected, average
