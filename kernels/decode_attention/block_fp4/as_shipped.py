"""Paged split-KV decode attention over NVFP4 and MXFP4 as it is usually written: a table of values and no tricks.

Nibbles are looked up in a table of 16 values, even and odd elements are two tiles with a strided query, each element's
scale is loaded with it, and block ids are loaded where they are used. Tile names are those of ``kernel.py``; e: pair of
neighbours.
"""

# Compile-time sizes are upper case, and a fused kernel is long.
# ruff: noqa: PLR0915

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.block_fp4 import E2M1_VALUES, BlockFp4
from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch
from ..softmax import load_block_ids, softmax_step, split_range
from .inputs import check_block_fp4_inputs
from .kernel import SCALED_BY, block_scale_to_fp16


@triton.jit
def decode_attention_block_fp4_as_shipped_kernel(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    value_ptr,
    value_scale_ptr,
    value_table_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    value_factor,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    key_scale_stride_block,
    key_scale_stride_token,
    key_scale_stride_h,
    value_stride_block,
    value_stride_token,
    value_stride_h,
    value_scale_stride_block,
    value_scale_stride_token,
    value_scale_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    IS_E8M0: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    query_head = h * GROUP + m
    query_mask = (m[:, None] < GROUP) & (e[None, :] < HEAD_DIM // 2)
    query_row_ptr = query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + 2 * e[None, :]
    query_even = tl.load(query_row_ptr, mask=query_mask, other=0.0)
    query_odd = tl.load(query_row_ptr + 1, mask=query_mask, other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output_even = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    output_odd = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        page = load_block_ids(block_table_row_ptr, token, end, BLOCK_SIZE).to(tl.int64)
        row = token % BLOCK_SIZE
        key_row = page * key_stride_block + row * key_stride_token + h * key_stride_h
        key_scale_row = page * key_scale_stride_block + row * key_scale_stride_token + h * key_scale_stride_h
        value_row = page * value_stride_block + row * value_stride_token + h * value_stride_h
        value_scale_row = page * value_scale_stride_block + row * value_scale_stride_token + h * value_scale_stride_h
        mask = (token[:, None] < end) & (e[None, :] < HEAD_DIM // 2)
        scale_column = e[None, :] * 2 // SCALE_BLOCK

        packed = tl.load(key_ptr + key_row[:, None] + e[None, :], mask=mask, other=0).to(tl.int32)
        block_scale = tl.load(key_scale_ptr + key_scale_row[:, None] + scale_column, mask=mask, other=0)
        factor = block_scale_to_fp16(block_scale, IS_E8M0).to(tl.float32)
        key_even = (tl.load(value_table_ptr + (packed & 15)) * factor).to(query_even.dtype)
        key_odd = (tl.load(value_table_ptr + (packed >> 4)) * factor).to(query_even.dtype)
        score = tl.dot(query_even, tl.trans(key_even))
        score = tl.dot(query_odd, tl.trans(key_odd), score) * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)

        packed = tl.load(value_ptr + value_row[:, None] + e[None, :], mask=mask, other=0).to(tl.int32)
        block_scale = tl.load(value_scale_ptr + value_scale_row[:, None] + scale_column, mask=mask, other=0)
        factor = block_scale_to_fp16(block_scale, IS_E8M0).to(tl.float32)
        value_even = (tl.load(value_table_ptr + (packed & 15)) * factor).to(query_even.dtype)
        value_odd = (tl.load(value_table_ptr + (packed >> 4)) * factor).to(query_even.dtype)
        weight = weight.to(query_even.dtype)
        output_even = tl.dot(weight, value_even, output_even * decay[:, None])
        output_odd = tl.dot(weight, value_odd, output_odd * decay[:, None])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial_row_ptr = partial_ptr + partial_row[:, None] * HEAD_DIM + 2 * e[None, :]
    factor = (value_factor / divisor)[:, None]
    tl.store(partial_row_ptr, output_even * factor, mask=query_mask & (begin < end))
    tl.store(partial_row_ptr + 1, output_odd * factor, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def make_value_table(device: torch.device) -> torch.Tensor:
    """Give the values of the 16 codes over `SCALED_BY`, because `block_scale_to_fp16` gives scales times it.

    Returns
    -------
    Tensor of float32, (16,)
    """
    magnitudes = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)
    return torch.cat((magnitudes, -magnitudes)) / SCALED_BY


def plan_block_fp4_as_shipped_split(
    kv_format: BlockFp4,
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the split kernel.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    _, key_scale, _, value_scale = check_block_fp4_inputs(kv_format, case, inputs, buffers)
    fields = (inputs["fields"]["key"], key_scale, inputs["fields"]["value"], value_scale)
    query, block_table, lse = inputs["query"], inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_block_fp4_as_shipped_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, *fields, inputs["value_table"], block_table, inputs["context_lens"], buffers["partial"], lse),
            inputs["scale"] * math.log2(math.e) * kv_format.tensor_scale("key"),
            kv_format.tensor_scale("value"),
            case.num_query_heads,
            *query.stride()[:2],
            *(stride for field in fields for stride in field.stride()[:3]),
            block_table.stride(0),
        ),
        options={
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "SCALE_BLOCK": kv_format.block_elements,
            "IS_E8M0": kv_format.name == "mxfp4",
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_E": max(16, triton.next_power_of_2(case.head_dim // 2)),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
