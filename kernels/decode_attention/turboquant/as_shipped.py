"""Decode attention over TurboQuant pages in the shape of vLLM's merged kernel (PR 38479).

One program per query head, so each KV head is read and unpacked once per query head of its group; 16 tokens per tile;
products and sums on CUDA cores in fp32; a level looked up in memory per element; 3-bit codes from two byte loads;
norms, scales and zeros from byte loads; levels brought to unit length again on each read.
"""

# Compile-time locals are upper case.
# ruff: noqa: N806

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.turboquant import TurboQuant
from ...launches import Launch, LaunchConfig
from ..batch import DecodeBatch, check_decode_inputs
from ..softmax import split_range

SMALLEST_SQUARE = 1e-16
"""Keeps the length of an all-zero vector of levels from dividing by zero (vLLM's)."""


@triton.jit
def load_half(byte_ptr, mask):
    """Load fp16 numbers byte by byte, as fp32."""
    low = tl.load(byte_ptr, mask=mask, other=0).to(tl.uint16)
    high = tl.load(byte_ptr + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_codes(row_ptr, element, mask, BITS: tl.constexpr):
    """Load codes of BITS bits from streams of bits that start at `row_ptr`, int32."""
    first_bit = element * BITS
    byte_ptr = row_ptr[:, None] + (first_bit // 8)[None, :]
    word = tl.load(byte_ptr, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        # A code may cross into the next byte; after the last code comes the norm or scale, so the byte exists.
        word = word | (tl.load(byte_ptr + 1, mask=mask, other=0).to(tl.int32) << 8)
    return (word >> (first_bit % 8)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def decode_attention_turboquant_as_shipped_kernel(
    query_ptr,
    pages_ptr,
    levels_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    score_scale,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    stride_block,
    stride_token,
    stride_h,
    block_table_stride_b,
    EPSILON: tl.constexpr,
    KEY_IS_FP8: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one query head to one split of one request; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    query_head = tl.program_id(1)
    split = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), split, NUM_SPLITS, BLOCK_N)
    KEY_BYTES: tl.constexpr = HEAD_DIM * KEY_BITS // 8
    VALUE_START: tl.constexpr = KEY_BYTES if KEY_IS_FP8 else KEY_BYTES + 2
    VALUE_BYTES: tl.constexpr = HEAD_DIM * VALUE_BITS // 8
    d = tl.arange(0, HEAD_DIM)
    n = tl.arange(0, BLOCK_N)
    query = tl.load(query_ptr + b * query_stride_b + query_head * query_stride_h + d).to(tl.float32)

    top = float("-inf")
    total = 0.0
    accumulator = tl.zeros([HEAD_DIM], tl.float32)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        mask = token < end
        element_mask = mask[:, None]
        block = tl.load(
            block_table_ptr + b.to(tl.int64) * block_table_stride_b + token // BLOCK_SIZE, mask=mask, other=0
        )
        row = block.to(tl.int64) * stride_block + (token % BLOCK_SIZE) * stride_token + query_head // GROUP * stride_h
        row_ptr = pages_ptr + row
        if KEY_IS_FP8:
            code = tl.load(row_ptr[:, None] + d[None, :], mask=element_mask, other=0)
            key = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            score = tl.sum(query[None, :] * key, 1) * score_scale
        else:
            code = load_codes(row_ptr, d, element_mask, KEY_BITS)
            key = tl.load(levels_ptr + code, mask=element_mask, other=0.0)
            key = key / tl.sqrt(tl.sum(key * key, 1) + EPSILON)[:, None]
            norm = load_half(row_ptr + KEY_BYTES, mask)
            score = norm * tl.sum(query[None, :] * key, 1) * score_scale
        score = tl.where(mask, score, float("-inf"))
        new_top = tl.maximum(tl.max(score, 0), top)
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top)

        value_ptr = row_ptr + VALUE_START
        scale = load_half(value_ptr + VALUE_BYTES, mask)
        zero = load_half(value_ptr + VALUE_BYTES + 2, mask)
        value = load_codes(value_ptr, d, element_mask, VALUE_BITS).to(tl.float32) * scale[:, None] + zero[:, None]
        accumulator = accumulator * decay + tl.sum(weight[:, None] * value, 0)
        total = total * decay + tl.sum(weight, 0)
        top = new_top

    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + split
    tl.store(partial_ptr + partial_row * HEAD_DIM + d, accumulator / divisor, mask=(d < HEAD_DIM) & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor))


def plan_as_shipped_split(
    kv_format: TurboQuant,
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the split kernel; it reads ``rotated_query`` of the buffers, or the query itself where keys are fp8.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    head_dim, pages = case.head_dim, inputs["pages"]
    if head_dim & (head_dim - 1) or head_dim < 16:
        raise ValueError(f"head_dim must be a power of two of at least 16, not {head_dim}")
    if kv_format.arrangement != "inline" or not pages.is_contiguous():
        raise ValueError("pages must be contiguous and inline")
    query = buffers["rotated_query"] if kv_format.rotates_keys else inputs["query"]
    block_table, lse = inputs["block_table"], buffers["lse"]
    block_bytes = pages.shape[-1]
    token_bytes = block_bytes // case.block_size
    return Launch(
        kernel=decode_attention_turboquant_as_shipped_kernel,
        grid=(len(query), case.num_query_heads, lse.shape[-1]),
        arguments=(
            *(query, pages, buffers["levels"] if kv_format.rotates_keys else lse),
            *(block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads, *query.stride()[:2]),
            *(block_bytes, token_bytes, token_bytes // case.num_kv_heads, block_table.stride(0)),
        ),
        options={
            "EPSILON": SMALLEST_SQUARE,
            "KEY_IS_FP8": not kv_format.rotates_keys,
            "KEY_BITS": kv_format.key_bits,
            "VALUE_BITS": kv_format.value_bits,
            "GROUP": case.group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
