"""Paged split-KV decode attention over a list of selected pages per request and KV head.

Tile names: b request, h KV head, m query head within its group, n slot within a tile (a slot is a row of a listed
page), d dimension of a head, s split. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper
case: compile-time.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import softmax_step, split_range

LOWEST_SCORE = tl.constexpr(-1e30)
"""Running maximum before any token: below all scores, yet finite, so that a tile without tokens gives weight 0."""


@triton.jit
def load_pages(selected_row_ptr, slot, end, BLOCK_SIZE: tl.constexpr):
    """Load the logical page of each slot, -1 beyond the end."""
    return tl.load(selected_row_ptr + slot // BLOCK_SIZE, mask=slot < end, other=-1)


@triton.jit
def resolve_pages(block_table_row_ptr, page, num_pages):
    """Load the block id of each logical page; 0 where there is no page, or where it lies past the context."""
    return tl.load(block_table_row_ptr + page, mask=(page >= 0) & (page < num_pages), other=0)


@triton.jit
def position_of(page, slot, BLOCK_SIZE: tl.constexpr):
    """Give the position in the context of each slot's token, negative where there is no page."""
    return page * BLOCK_SIZE + slot % BLOCK_SIZE


@triton.jit
def decode_attention_page_sparse_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    context_lens_ptr,
    selected_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_query_heads,
    num_slots,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    value_stride_block,
    value_stride_token,
    value_stride_h,
    block_table_stride_b,
    selected_stride_b,
    selected_stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from one group of query heads to one split of its selected pages; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    context = tl.load(context_lens_ptr + b)
    num_pages = tl.cdiv(context, BLOCK_SIZE)
    begin, end = split_range(num_slots, s, NUM_SPLITS, BLOCK_N)

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

    top = tl.full([BLOCK_M], LOWEST_SCORE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    selected_row_ptr = selected_ptr + b.to(tl.int64) * selected_stride_b + h * selected_stride_h
    # A block id is loaded a tile ahead and the page that it belongs to two tiles ahead: a load that feeds a load of
    # the same pass would take the pipeline's stages from K and V. Positions are carried instead of pages, because
    # Triton pipelines no loop that hands a value on over two passes unchanged.
    page = load_pages(selected_row_ptr, begin + n, end, BLOCK_SIZE)
    block = resolve_pages(block_table_row_ptr, page, num_pages)
    position = position_of(page, begin + n, BLOCK_SIZE)
    next_page = load_pages(selected_row_ptr, begin + BLOCK_N + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        slot = tile + n
        row = slot % BLOCK_SIZE
        held = (position >= 0) & (position < context)
        key_offset = block.to(tl.int64) * key_stride_block + row * key_stride_token + h * key_stride_h
        value_offset = block.to(tl.int64) * value_stride_block + row * value_stride_token + h * value_stride_h
        block = resolve_pages(block_table_row_ptr, next_page, num_pages)
        position = position_of(next_page, slot + BLOCK_N, BLOCK_SIZE)
        next_page = load_pages(selected_row_ptr, slot + 2 * BLOCK_N, end, BLOCK_SIZE)
        kv_mask = held[:, None]
        if HEAD_DIM < BLOCK_D:
            kv_mask = kv_mask & (d[None, :] < HEAD_DIM)

        key = tl.load(key_ptr + key_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        score = tl.where(held[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        value = tl.load(value_ptr + value_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")

    # A split without tokens has total 0: its lse is -inf, and its output, which is zero, is never read.
    divisor = tl.where(total > 0.0, total, 1.0)
    lse = tl.where(total > 0.0, top + tl.log2(divisor), float("-inf"))
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, lse, mask=m < GROUP)


def plan_page_sparse_split(
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
    selected, block_table, lse = inputs["selected_pages"], inputs["block_table"], buffers["lse"]
    requirements = {
        "query and caches must have one dtype": query.dtype == key.dtype == value.dtype,
        "key and value must be (num_blocks, block_size, num_kv_heads, head_dim)": key.shape
        == value.shape
        == (len(key), case.block_size, case.num_kv_heads, case.head_dim),
        "key and value must be contiguous along head_dim": key.stride(-1) == value.stride(-1) == 1,
        "selected_pages must be int32, (batch, num_kv_heads, num_selected)": selected.dtype == torch.int32
        and selected.shape[:-1] == (len(query), case.num_kv_heads),
        "selected_pages must be contiguous along the selection": selected.stride(-1) == 1,
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    return Launch(
        kernel=decode_attention_page_sparse_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, block_table, inputs["context_lens"], selected, buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads, selected.shape[-1] * case.block_size),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            block_table.stride(0),
            *selected.stride()[:2],
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
