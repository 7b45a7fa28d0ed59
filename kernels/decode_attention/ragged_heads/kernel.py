"""Paged split-KV decode attention over pages of one KV head each, with an optional log-weight per entry.

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
from ..batch import MIN_DOT_ROWS, check_decode_inputs
from ..softmax import load_block_ids, softmax_step
from .batch import RaggedHeadsBatch

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def decode_attention_ragged_heads_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    log_weight_ptr,
    block_table_ptr,
    head_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    split_tokens,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    value_stride_block,
    value_stride_token,
    log_weight_stride_block,
    log_weight_stride_token,
    block_table_stride_b,
    block_table_stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from one group of query heads to one split of its KV head; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    begin = s * split_tokens
    end = tl.minimum(begin + split_tokens, tl.load(head_lens_ptr + b * tl.num_programs(1) + h))

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    query_head = h * GROUP + m
    query_mask = m[:, None] < GROUP
    if HEAD_DIM < BLOCK_D:
        query_mask = query_mask & (d[None, :] < HEAD_DIM)
    query = tl.load(
        query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + d[None, :],
        mask=query_mask & (begin < end),
        other=0.0,
    )

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b + h * block_table_stride_h
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = token % BLOCK_SIZE
        page = block.to(tl.int64)
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        kv_mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            kv_mask = kv_mask & (d[None, :] < HEAD_DIM)

        key_offset = page * key_stride_block + row * key_stride_token
        key = tl.load(key_ptr + key_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if WEIGHTED:
            weight_offset = page * log_weight_stride_block + row * log_weight_stride_token
            log_weight = tl.load(log_weight_ptr + weight_offset, mask=token < end, other=0.0)
            score += (log_weight * LOG2_E)[None, :]
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        value_offset = page * value_stride_block + row * value_stride_token
        value = tl.load(value_ptr + value_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_ragged_heads_split(
    case: RaggedHeadsBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the split kernel.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, fields = inputs["query"], inputs["fields"]
    key, value, log_weight = fields["key"], fields["value"], fields.get("log_weight")
    block_table, head_lens, lse = inputs["block_table"], inputs["context_lens"], buffers["lse"]
    heads = (len(query), case.num_kv_heads)
    requirements = {
        "query and caches must have one dtype": query.dtype == key.dtype == value.dtype,
        "key and value must be (num_blocks, block_size, 1, head_dim)": key.shape
        == value.shape
        == (len(key), case.block_size, 1, case.head_dim),
        "key and value must be contiguous along head_dim": key.stride(-1) == value.stride(-1) == 1,
        "block_table must be (batch, num_kv_heads, max_blocks)": block_table.shape[:-1] == heads,
        "head lengths must be contiguous, (batch, num_kv_heads)": head_lens.shape == heads
        and head_lens.is_contiguous(),
        "log_weight must be fp32, (num_blocks, block_size, 1, 1)": log_weight is None
        or (log_weight.dtype == torch.float32 and log_weight.shape == (*key.shape[:3], 1)),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    num_splits = lse.shape[-1]
    longest_tiles = triton.cdiv(max(1, *case.context_lens), config.block_n)
    return Launch(
        kernel=decode_attention_ragged_heads_kernel,
        grid=(*heads, num_splits),
        arguments=(
            *(query, key, value, key if log_weight is None else log_weight, block_table, head_lens),
            *(buffers["partial"], lse, inputs["scale"] * math.log2(math.e)),
            *(triton.cdiv(longest_tiles, num_splits) * config.block_n, case.num_query_heads),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *((0, 0) if log_weight is None else log_weight.stride()[:2]),
            *block_table.stride()[:2],
        ),
        options={
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": num_splits,
            "WEIGHTED": log_weight is not None,
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
