"""Paged split-KV decode attention over KIVI-4 and KIVI-2 with a native residual, the fast form.

Tile names: b request, h KV head, m query head within its group, g group of 32 tokens, n column of the score tile,
w 32-bit word of a vector, d dimension of a head, s split.
"""

# Compile-time sizes are upper case, and a fused kernel is long.
# ruff: noqa: N806, PLR0915

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.kivi import GROUP, Kivi
from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch
from ..softmax import load_block_ids, softmax_step, split_range
from .inputs import check_kivi_inputs

RESIDUAL_BLOCK_N = 32


@triton.jit
def packed_length(context, RESIDUAL: tl.constexpr):
    """Give how many tokens are quantised: the least multiple of 32 that leaves at most the residual."""
    return tl.cdiv(tl.maximum(context - RESIDUAL, 0), 32) * 32


@triton.jit
def codes_to_fp16(words, BITS: tl.constexpr):
    """Unpack uint32 words (rows, W), `interleaved`, to 2^-9 times their codes in fp16, (rows, W * 32 / BITS).

    A code in the low bits of a 16-bit lane is a subnormal of fp16, 2^-24 times its value, and one ``b`` bits higher
    2^(b - 24) times: a mask and an exact product replace the integer conversion. Codes 8 bits apart share masks after
    one shift. Adding zero makes the product a fused multiply-add, which ptxas pairs without moving the halves.
    """
    shifted = tl.join(words, words >> 8)
    if BITS == 4:
        pairs = tl.join(shifted & 0x000F000F, shifted & 0x00F000F0)
        factor = tl.join(tl.full(shifted.shape, 32768.0, tl.float16), tl.full(shifted.shape, 2048.0, tl.float16))
    else:
        pairs = tl.join(
            tl.join(shifted & 0x00030003, shifted & 0x00300030), tl.join(shifted & 0x000C000C, shifted & 0x00C000C0)
        )
        factor = tl.join(
            tl.join(tl.full(shifted.shape, 32768.0, tl.float16), tl.full(shifted.shape, 2048.0, tl.float16)),
            tl.join(tl.full(shifted.shape, 8192.0, tl.float16), tl.full(shifted.shape, 512.0, tl.float16)),
        )
    halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)).to(tl.float16, bitcast=True)
    return tl.reshape(halves * tl.join(factor, factor) + 0.0, [words.shape[0], words.shape[1] * (32 // BITS)])


@triton.jit
def decode_attention_kivi_kernel(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    key_zero_ptr,
    value_ptr,
    value_scale_ptr,
    value_zero_ptr,
    residual_key_ptr,
    residual_value_ptr,
    residual_index_ptr,
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
    key_scale_stride_block,
    key_scale_stride_group,
    key_scale_stride_h,
    value_scale_stride_block,
    value_scale_stride_token,
    value_scale_stride_h,
    residual_stride_b,
    residual_stride_token,
    residual_stride_h,
    block_table_stride_b,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    context = tl.load(context_lens_ptr + b)
    packed = packed_length(context, RESIDUAL)
    begin, end = split_range(packed, s, NUM_SPLITS, BLOCK_N)

    NUM_G: tl.constexpr = BLOCK_N // 32
    BLOCK_W: tl.constexpr = BLOCK_D * BITS // 32
    BLOCK_C: tl.constexpr = BLOCK_D // 32
    m = tl.arange(0, BLOCK_M)
    g = tl.arange(0, NUM_G)
    w = tl.arange(0, BLOCK_W)
    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    # Columns are in the order [row // 8, group, row % 8]: a matrix instruction has 8 columns, and warps take them by
    # turns, so that each warp keeps to one group and holds one group's scales.
    n = tl.arange(0, BLOCK_N)
    group_of_column = n // 8 % NUM_G
    row_of_column = n // (8 * NUM_G) * 8 + n % 8
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
    column = group_of_column * 32 + row_of_column
    group_block = load_block_ids(block_table_row_ptr, begin + g * 32, end, BLOCK_SIZE)
    block = load_block_ids(block_table_row_ptr, begin + column, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        first = tile + g * 32
        token = tile + column
        row = token % BLOCK_SIZE
        page = block.to(tl.int64)
        key_scale_row = (
            group_block.to(tl.int64) * key_scale_stride_block
            + first % BLOCK_SIZE // 32 * key_scale_stride_group
            + h * key_scale_stride_h
        )
        code_row = page * code_stride_block + row * code_stride_token + h * code_stride_h
        value_scale_row = page * value_scale_stride_block + row * value_scale_stride_token + h * value_scale_stride_h
        group_block = load_block_ids(block_table_row_ptr, first + BLOCK_N, end, BLOCK_SIZE)
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        key_scale_mask = first[:, None] < end
        word_mask = token[:, None] < end
        value_scale_mask = word_mask
        if HEAD_DIM < BLOCK_D:
            key_scale_mask = key_scale_mask & (d[None, :] < HEAD_DIM)
            word_mask = word_mask & (w[None, :] < HEAD_DIM * BITS // 32)
            value_scale_mask = value_scale_mask & (c[None, :] < HEAD_DIM // 32)
        else:
            # Rows start at multiples of their length: it takes the hint to read the short ones by whole vectors.
            code_row = tl.multiple_of(code_row, BLOCK_W)
            value_scale_row = tl.multiple_of(value_scale_row, BLOCK_C)

        words = tl.load(key_ptr + code_row[:, None] + w[None, :], mask=word_mask, other=0)
        key_scale = tl.load(key_scale_ptr + key_scale_row[:, None] + d[None, :], mask=key_scale_mask, other=0.0)
        key_zero = tl.load(key_zero_ptr + key_scale_row[:, None] + d[None, :], mask=key_scale_mask, other=0.0)
        codes = tl.reshape(codes_to_fp16(words.to(tl.uint32, bitcast=True), BITS), [4, NUM_G, 8, BLOCK_D])
        key = codes * (key_scale * 512.0)[None, :, None, :] + key_zero[None, :, None, :]
        score = tl.dot(query, tl.trans(tl.reshape(key, [BLOCK_N, BLOCK_D]))) * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)

        words = tl.load(value_ptr + code_row[:, None] + w[None, :], mask=word_mask, other=0)
        value_scale_offset = value_scale_row[:, None] + c[None, :]
        value_scale = tl.load(value_scale_ptr + value_scale_offset, mask=value_scale_mask, other=0.0)
        value_zero = tl.load(value_zero_ptr + value_scale_offset, mask=value_scale_mask, other=0.0)
        codes = tl.reshape(codes_to_fp16(words.to(tl.uint32, bitcast=True), BITS), [BLOCK_N, BLOCK_C, 32])
        value = codes * (value_scale * 512.0)[:, :, None] + value_zero[:, :, None]
        value = tl.reshape(value, [BLOCK_N, BLOCK_D])
        accumulator = tl.dot(weight.to(tl.float16), value, accumulator * decay[:, None])

    # The last splits, which have the fewest packed tokens, take the residual.
    begin, end = split_range(context - packed, NUM_SPLITS - 1 - s, NUM_SPLITS, BLOCK_R)
    residual = tl.load(residual_index_ptr + b).to(tl.int64) * residual_stride_b + h * residual_stride_h
    for tile in range(begin, end, BLOCK_R):
        token = tile + tl.arange(0, BLOCK_R)
        kv_mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            kv_mask = kv_mask & (d[None, :] < HEAD_DIM)
        offset = residual + ((packed + token) % RESIDUAL)[:, None] * residual_stride_token + d[None, :]
        key = tl.load(residual_key_ptr + offset, mask=kv_mask, other=0.0).to(tl.float16)
        score = tl.dot(query, tl.trans(key)) * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        value = tl.load(residual_value_ptr + offset, mask=kv_mask, other=0.0).to(tl.float16)
        accumulator = tl.dot(weight.to(tl.float16), value, accumulator * decay[:, None])

    # A split without tokens has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    partial_mask = query_mask & (total[:, None] > 0.0)
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=partial_mask)
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_kivi_split(
    kv_format: Kivi,
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
    check_kivi_inputs(kv_format, case, inputs, buffers)
    if kv_format.packing != "interleaved":
        raise ValueError("the fast form reads words packed interleaved")
    if config.block_n % GROUP:
        msg = f"block_n must be a multiple of {GROUP}"
        raise ValueError(msg)
    query, fields, block_table, lse = inputs["query"], inputs["fields"], inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_kivi_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            query,
            *(fields[name] for name in ("key", "key_scale", "key_zero", "value", "value_scale", "value_zero")),
            *(inputs["residual_key"], inputs["residual_value"], inputs["residual_index"]),
            *(block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads),
            *query.stride()[:2],
            *fields["key"].stride()[:3],
            *fields["key_scale"].stride()[:3],
            *fields["value_scale"].stride()[:3],
            *inputs["residual_key"].stride()[:3],
            block_table.stride(0),
        ),
        options={
            "BITS": kv_format.bits,
            "RESIDUAL": kv_format.residual_tokens,
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "BLOCK_R": RESIDUAL_BLOCK_N,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
