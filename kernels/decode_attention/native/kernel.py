"""Paged split-KV decode attention over K and V in the model's own dtype.

Tile names: b request, h KV head, m query head within its group, n token within a tile, d dimension of a head,
s split. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import load_block_ids, softmax_step, split_range


@triton.jit
def decode_attention_native_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
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
    query_mask = m[:, None] < GROUP
    if HEAD_DIM < BLOCK_D:
        query_mask = query_mask & (d[None, :] < HEAD_DIM)
    query = tl.load(
        query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + d[None, :], mask=query_mask, other=0.0
    )

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = token % BLOCK_SIZE
        key_offset = block.to(tl.int64) * key_stride_block + row * key_stride_token + h * key_stride_h
        value_offset = block.to(tl.int64) * value_stride_block + row * value_stride_token + h * value_stride_h
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        kv_mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            kv_mask = kv_mask & (d[None, :] < HEAD_DIM)

        key = tl.load(key_ptr + key_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        value = tl.load(value_ptr + value_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_native_split(
    case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the split kernel.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, key, value = inputs["query"], inputs["fields"]["key"], inputs["fields"]["value"]
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError("query and caches must have one dtype")
    if not key.shape == value.shape == (len(key), case.block_size, case.num_kv_heads, case.head_dim):
        raise ValueError("key and value must be (num_blocks, block_size, num_kv_heads, head_dim)")
    if not key.stride(-1) == value.stride(-1) == 1:
        raise ValueError("key and value must be contiguous along head_dim")
    block_table, lse = inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_native_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads),
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
