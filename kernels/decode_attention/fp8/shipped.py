"""Decode attention over fp8 K and V as engines ship it: SGLang's grouped kernel, written again over a block table.

``_fwd_grouped_kernel_stage1`` of python/sglang/srt/layers/attention/triton_ops/decode_attention.py: tiles of 32 tokens,
the slot of each token loaded where it is used, K converted to the query's dtype, weights rounded to V's fp8.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import split_range
from .kernel import check_codes


@triton.jit
def decode_attention_fp8_shipped_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    score_factor,
    output_factor,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    value_stride_block,
    value_stride_token,
    value_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    query_head = h * GROUP + m
    query_mask = (m[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    query = tl.load(
        query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + d[None, :], mask=query_mask, other=0.0
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        token_mask = token < end
        block_row_ptr = block_table_ptr + b * block_table_stride_b
        block = tl.load(block_row_ptr + token // BLOCK_SIZE, mask=token_mask, other=0).to(tl.int64)
        row = token % BLOCK_SIZE
        key_offset = block * key_stride_block + row * key_stride_token + h * key_stride_h
        key = tl.load(
            key_ptr + key_offset[None, :] + d[:, None], mask=token_mask[None, :] & (d[:, None] < HEAD_DIM), other=0.0
        )
        score = tl.dot(query, key.to(query.dtype)) * score_factor
        score = tl.where(token_mask[None, :], score, float("-inf"))
        value_offset = block * value_stride_block + row * value_stride_token + h * value_stride_h
        value = tl.load(
            value_ptr + value_offset[:, None] + d[None, :],
            mask=token_mask[:, None] & (d[None, :] < HEAD_DIM),
            other=0.0,
        )
        new_top = tl.maximum(tl.max(score, 1), top)
        decay = tl.exp(top - new_top)
        weight = tl.exp(score - new_top[:, None])
        accumulator = accumulator * decay[:, None]
        accumulator += tl.dot(weight.to(value.dtype), value)
        total = total * decay + tl.sum(weight, 1)
        top = new_top

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None] * output_factor
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    log2_e = 1.4426950408889634
    tl.store(lse_ptr + partial_row, top * log2_e + tl.log2(divisor), mask=m < GROUP)


def plan_shipped_split(
    case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the split kernel; raise ValueError where a shape, dtype or stride does not fit."""
    check_decode_inputs(case, inputs, buffers)
    query, key, value = inputs["query"], inputs["fields"]["key"], inputs["fields"]["value"]
    check_codes(case, key, value, codes_per_word=1)
    block_table, lse = inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_fp8_shipped_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * float(inputs["key_scale"]), float(inputs["value_scale"]), case.num_query_heads),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            block_table.stride(0),
        ),
        options={
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
