"""Paged split-KV decode attention over q8_0, q5_1 and q4_0 keys and values.

Tile names: b request, h KV head, m query head within its group, n token within a tile, c block of 32 elements, w word
of codes, d dimension, s split.
"""

# Compile-time sizes are upper case, and a fused kernel is long.
# ruff: noqa: N806

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.ggml import BLOCK, Ggml
from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import load_block_ids, softmax_step, split_range


@triton.jit
def element_of_column(column, BITS: tl.constexpr):
    """Give the element of a vector that `unpack` puts in a column."""
    if BITS == 8:
        # Columns 2 i + l of a word hold byte 2 l + i.
        return column // 4 * 4 + column % 2 * 2 + column % 4 // 2
    # Columns 2 i + l of a word hold nibble i of its half l: a byte's low nibble, then its high one, 16 elements on.
    nibble = column % 8 // 2
    return column // 32 * 32 + nibble % 2 * 16 + column % 32 // 8 * 4 + column % 2 * 2 + nibble // 2


@triton.jit
def as_halves(low_bits):
    """Give both 16-bit halves of words, integers below 1024, as fp16 numbers 1024 too large."""
    bits = low_bits | 0x64006400
    return tl.join(bits.to(tl.uint16), (bits >> 16).to(tl.uint16)).to(tl.float16, bitcast=True)


@triton.jit
def unpack(words, high, BITS: tl.constexpr):
    """Give codes plus 1024 as fp16, (tokens, columns), in the order of `element_of_column`.

    words: uint32, (tokens, words); high: uint32 of the same shape, shifted so that the word's own bits are lowest.
    """
    if BITS == 8:
        bytes_of_halves = tl.join(words & 0x00FF00FF, (words >> 8) & 0x00FF00FF)
        return tl.reshape(as_halves(bytes_of_halves), [words.shape[0], 4 * words.shape[1]])
    else:
        nibble_0 = words & 0x000F000F
        nibble_1 = (words >> 4) & 0x000F000F
        nibble_2 = (words >> 8) & 0x000F000F
        nibble_3 = (words >> 12) & 0x000F000F
        if BITS == 5:
            nibble_0 = nibble_0 | ((high << 4) & 0x00100010)
            nibble_1 = nibble_1 | ((high << 3) & 0x00100010)
            nibble_2 = nibble_2 | ((high << 2) & 0x00100010)
            nibble_3 = nibble_3 | ((high << 1) & 0x00100010)
        nibbles = tl.join(tl.join(nibble_0, nibble_2), tl.join(nibble_1, nibble_3))
        return tl.reshape(as_halves(nibbles), [words.shape[0], 8 * words.shape[1]])


@triton.jit
def load_vectors(
    code_ptr,
    high_ptr,
    scale_ptr,
    code_row,
    high_row,
    scale_row,
    token_mask,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Load vectors and give them in fp16, (tokens, 32 * BLOCK_C), elements in the order of `element_of_column`."""
    WORDS: tl.constexpr = 8 if BITS == 8 else 4
    c = tl.arange(0, BLOCK_C)
    w = tl.arange(0, BLOCK_C * WORDS)
    scale_mask = token_mask[:, None]
    word_mask = scale_mask
    if HEAD_DIM < 32 * BLOCK_C:
        scale_mask = scale_mask & (c[None, :] < HEAD_DIM // 32)
        word_mask = word_mask & (w[None, :] < HEAD_DIM // 32 * WORDS)
    words = tl.load(code_ptr + code_row[:, None] + w[None, :], mask=word_mask, other=0).to(tl.uint32, bitcast=True)
    high = words
    if BITS == 5:
        bits = tl.load(high_ptr + high_row[:, None] + c[None, :], mask=scale_mask, other=0).to(tl.uint32, bitcast=True)
        high = tl.reshape(bits[:, :, None] >> (4 * tl.arange(0, 4))[None, None, :], [words.shape[0], words.shape[1]])
    codes = tl.reshape(unpack(words, high, BITS), [words.shape[0], BLOCK_C, 32])
    stored = tl.load(scale_ptr + scale_row[:, None] + c[None, :], mask=scale_mask, other=0)
    if BITS == 5:
        step = (stored & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        minimum = (stored >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        vectors = (codes - 1024.0) * step[:, :, None] + minimum[:, :, None]
    else:
        offset: tl.constexpr = 1024.0 + (128.0 if BITS == 8 else 8.0)
        # ptxas pairs fused multiply-adds without moving the halves, and plain products not.
        vectors = (codes - offset) * stored[:, :, None] + 0.0
    return tl.reshape(vectors, [words.shape[0], 32 * BLOCK_C])


@triton.jit
def decode_attention_ggml_kernel(
    query_ptr,
    key_ptr,
    key_high_ptr,
    key_scale_ptr,
    value_ptr,
    value_high_ptr,
    value_scale_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    code_stride_block,
    code_stride_token,
    code_stride_h,
    high_stride_block,
    high_stride_token,
    high_stride_h,
    scale_stride_block,
    scale_stride_token,
    scale_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
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

    BLOCK_D: tl.constexpr = BLOCK_C * 32
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = element_of_column(tl.arange(0, BLOCK_D), BITS)
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
        code_row = page * code_stride_block + row * code_stride_token + h * code_stride_h
        high_row = page * high_stride_block + row * high_stride_token + h * high_stride_h
        scale_row = page * scale_stride_block + row * scale_stride_token + h * scale_stride_h
        if HEAD_DIM == BLOCK_D:
            scale_row = tl.multiple_of(scale_row, BLOCK_C)
        mask = token < end

        key = load_vectors(
            key_ptr, key_high_ptr, key_scale_ptr, code_row, high_row, scale_row, mask, HEAD_DIM, BITS, BLOCK_C
        )
        score = tl.dot(query, tl.trans(key)) * scale_log2
        score = tl.where(mask[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        value = load_vectors(
            value_ptr, value_high_ptr, value_scale_ptr, code_row, high_row, scale_row, mask, HEAD_DIM, BITS, BLOCK_C
        )
        accumulator = tl.dot(weight.to(tl.float16), value, accumulator * decay[:, None])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def check_ggml_fields(
    kv_format: Ggml, case: DecodeBatch, fields: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Give codes, high bits and scales of keys and of values as the kernel reads them, by suffix.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    widths = {"": case.head_dim if kv_format.bits == 8 else case.head_dim // 2, "_scale": case.head_dim // BLOCK}
    if kv_format.bits == 5:
        widths |= {"_high": case.head_dim // BLOCK, "_scale": case.head_dim // (BLOCK // 2)}
    views: dict[str, dict[str, torch.Tensor]] = {"key": {}, "value": {}}
    for suffix, width in widths.items():
        key, value = fields["key" + suffix], fields["value" + suffix]
        if key.shape[1:] != (case.block_size, case.num_kv_heads, width) or key.stride(-1) != 1:
            msg = f"key{suffix} must be {width} contiguous elements per block, token and KV head"
            raise ValueError(msg)
        if (key.shape, key.stride()) != (value.shape, value.stride()):
            raise ValueError("fields of K and V must have one shape and one stride")
        for vector, field in (("key", key), ("value", value)):
            words = suffix == "" or kv_format.bits == 5
            views[vector][suffix] = field.view(torch.int32) if words else field
    for vector in views.values():
        vector.setdefault("_high", vector[""])
    return views["key"], views["value"]


def plan_ggml_split(
    kv_format: Ggml,
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
    check_decode_inputs(case, inputs, buffers)
    query, block_table, lse = inputs["query"], inputs["block_table"], buffers["lse"]
    if query.dtype not in {torch.float16, torch.bfloat16}:
        raise ValueError("query must be float16 or bfloat16")
    key, value = check_ggml_fields(kv_format, case, inputs["fields"])
    order = ("", "_high", "_scale")
    return Launch(
        kernel=decode_attention_ggml_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            query,
            *(vector[suffix] for vector in (key, value) for suffix in order),
            *(block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads),
            *query.stride()[:2],
            *(stride for suffix in order for stride in key[suffix].stride()[:3]),
            block_table.stride(0),
        ),
        options={
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BITS": kv_format.bits,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_C": triton.next_power_of_2(case.head_dim // BLOCK),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
