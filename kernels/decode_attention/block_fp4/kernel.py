"""Paged split-KV decode attention over NVFP4 and MXFP4 keys and values, the fast form.

Tile names: b request, h KV head, m query head within its group, n token within a tile, c scale block within half a
vector, e element of a scale block, d dimension of half a vector, s split.
"""

# Compile-time sizes are upper case, and a fused kernel is long.
# ruff: noqa: N806, PLR0915

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.block_fp4 import BlockFp4
from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch
from ..softmax import load_block_ids, softmax_step, split_range
from .inputs import check_block_fp4_inputs

SCALED_BY = 128.0
"""Dequantised elements are this many times too small: E2M1 code times E4M3 scale, up to 6 * 448, is then exact in fp16
although elements come 2^14 times too small and scales must not exceed 2^16."""


@triton.jit
def block_scale_to_fp16(stored, IS_E8M0: tl.constexpr):
    """Give 2^7 times the block scales as fp16: E4M3 exactly; E8M0 from 2^-31, zero below, and infinite from 2^9."""
    if IS_E8M0:
        # The exponent field of fp32 has E8M0's bias.
        return ((stored.to(tl.uint32) << 23).to(tl.float32, bitcast=True) * 128.0).to(tl.float16)
    # Shifted by 7, E4M3 is fp16 with an exponent bias of 7 instead of 15.
    return (stored.to(tl.uint16) << 7).to(tl.float16, bitcast=True) * 32768.0


@triton.jit
def element_of_column(column):
    """Give the element of a vector that `dequantise` puts in a column: columns 2 i + l of a word hold 4 l + i."""
    return column // 8 * 8 + column % 2 * 4 + column % 8 // 2


@triton.jit
def dequantise(words, block_scale, SCALE_BLOCK: tl.constexpr, IS_E8M0: tl.constexpr):
    """Give vectors in fp16, 2^-7 times their values, elements in the order of `element_of_column`.

    words: uint32, (tokens, elements / 8); block_scale: uint8, (tokens, elements / SCALE_BLOCK).
    """
    # Four nibbles of each 16-bit lane in turn: the sign goes to bit 15, exponent and mantissa to bits 11 to 9, where
    # fp16 has its low exponent bits and its high mantissa bit. Subnormals fall on subnormals: every code is exact.
    nibble_0 = ((words << 12) & 0x80008000) | ((words << 9) & 0x0E000E00)
    nibble_1 = ((words << 8) & 0x80008000) | ((words << 5) & 0x0E000E00)
    nibble_2 = ((words << 4) & 0x80008000) | ((words << 1) & 0x0E000E00)
    nibble_3 = (words & 0x80008000) | ((words >> 3) & 0x0E000E00)
    pairs = tl.join(tl.join(nibble_0, nibble_2), tl.join(nibble_1, nibble_3))
    halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(tl.float16, bitcast=True)
    scale = block_scale_to_fp16(block_scale, IS_E8M0)
    blocks = tl.reshape(halves, [scale.shape[0], scale.shape[1], SCALE_BLOCK]) * scale[:, :, None] + 0.0
    return tl.reshape(blocks, [scale.shape[0], scale.shape[1] * SCALE_BLOCK])


@triton.jit
def decode_attention_block_fp4_kernel(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    value_ptr,
    value_scale_ptr,
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
    BLOCK_C: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    BLOCK_D: tl.constexpr = BLOCK_C * SCALE_BLOCK
    NUM_C: tl.constexpr = HEAD_DIM // SCALE_BLOCK
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    w = tl.arange(0, BLOCK_D // 8)
    d = element_of_column(tl.arange(0, BLOCK_D))
    query_head = h * GROUP + m
    query_mask = m[:, None] < GROUP
    if HEAD_DIM < BLOCK_D:
        query_mask = query_mask & (d[None, :] < HEAD_DIM)
    query = tl.load(
        query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + d[None, :], mask=query_mask, other=0.0
    ).to(tl.float16)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = token % BLOCK_SIZE
        page = block.to(tl.int64)
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        key_row = page * key_stride_block + row * key_stride_token + h * key_stride_h
        key_scale_row = page * key_scale_stride_block + row * key_scale_stride_token + h * key_scale_stride_h
        value_row = page * value_stride_block + row * value_stride_token + h * value_stride_h
        value_scale_row = page * value_scale_stride_block + row * value_scale_stride_token + h * value_scale_stride_h
        if NUM_C == BLOCK_C:
            key_scale_row = tl.multiple_of(key_scale_row, BLOCK_C)
            value_scale_row = tl.multiple_of(value_scale_row, BLOCK_C)
        word_mask = token[:, None] < end
        scale_mask = word_mask
        if HEAD_DIM < BLOCK_D:
            word_mask = word_mask & (w[None, :] < HEAD_DIM // 8)
            scale_mask = scale_mask & (c[None, :] < NUM_C)

        words = tl.load(key_ptr + key_row[:, None] + w[None, :], mask=word_mask, other=0)
        block_scale = tl.load(key_scale_ptr + key_scale_row[:, None] + c[None, :], mask=scale_mask, other=0)
        key = dequantise(words.to(tl.uint32, bitcast=True), block_scale, SCALE_BLOCK, IS_E8M0)
        score = tl.dot(query, tl.trans(key)) * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)

        words = tl.load(value_ptr + value_row[:, None] + w[None, :], mask=word_mask, other=0)
        block_scale = tl.load(value_scale_ptr + value_scale_row[:, None] + c[None, :], mask=scale_mask, other=0)
        value = dequantise(words.to(tl.uint32, bitcast=True), block_scale, SCALE_BLOCK, IS_E8M0)
        accumulator = tl.dot(weight.to(tl.float16), value, accumulator * decay[:, None])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator * (value_factor / divisor)[:, None]
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_block_fp4_split(
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
    fields = check_block_fp4_inputs(kv_format, case, inputs, buffers)
    query, block_table, lse = inputs["query"], inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_block_fp4_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, *fields, block_table, inputs["context_lens"], buffers["partial"], lse),
            inputs["scale"] * math.log2(math.e) * SCALED_BY * kv_format.tensor_scale("key"),
            SCALED_BY * kv_format.tensor_scale("value"),
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
            "BLOCK_C": triton.next_power_of_2(case.head_dim // kv_format.block_elements),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
