"""Paged split-KV decode attention over 4-bit codes with an fp16 scale and zero per token and head.

Tile names: b request, h KV head, m query head within its group, n token within a tile, w word of four codes, s split.
Suffix `_0` to `_3`: the plane of that nibble of the words.
Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

# One kernel, read from top to bottom.
# ruff: noqa: PLR0915

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..fp8.kernel import WEIGHT_FACTOR, check_codes, check_metadata
from ..fp8.unpack import nibble_planes
from ..softmax import load_block_ids, softmax_step, split_range

CODES_PER_WORD = 4
PLANE_FACTOR = 2.0**-12
"""What `nibble_planes` gives for a low nibble, over its code; for a high nibble it is 16 times this."""


@triton.jit
def split_scale_zero(pair):
    """Split 32-bit words into the fp16 scale (lower half) and zero (upper half), as fp32."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def decode_attention_int4_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_zero_ptr,
    value_scale_zero_ptr,
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
    scale_stride_block,
    scale_stride_token,
    scale_stride_h,
    block_table_stride_b,
    PLANE_FACTOR: tl.constexpr,
    WEIGHT_FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2.

    Word w of a vector holds the codes of dimensions 2 w, D/2 + 2 w, 2 w + 1 and D/2 + 2 w + 1, lowest nibble first.
    """
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    w = tl.arange(0, BLOCK_W)
    query_head = h * GROUP + m
    query_mask = m[:, None] < GROUP
    if HEAD_DIM < 4 * BLOCK_W:
        query_mask = query_mask & (4 * w[None, :] < HEAD_DIM)
    query_row_ptr = query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + 2 * w[None, :]
    query_0 = tl.load(query_row_ptr, mask=query_mask, other=0.0).to(tl.float16)
    query_1 = tl.load(query_row_ptr + HEAD_DIM // 2, mask=query_mask, other=0.0).to(tl.float16)
    query_2 = tl.load(query_row_ptr + 1, mask=query_mask, other=0.0).to(tl.float16)
    query_3 = tl.load(query_row_ptr + HEAD_DIM // 2 + 1, mask=query_mask, other=0.0).to(tl.float16)
    query_sum = tl.sum(query_0.to(tl.float32) + query_1.to(tl.float32), 1)
    query_sum += tl.sum(query_2.to(tl.float32) + query_3.to(tl.float32), 1)
    # High nibbles come 16 times larger.
    query_1 = (query_1 * 0.0625).to(tl.float16)
    query_3 = (query_3 * 0.0625).to(tl.float16)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output_0 = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    output_1 = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    output_2 = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    output_3 = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    zero_output = tl.zeros([BLOCK_M], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = token % BLOCK_SIZE
        block_long = block.to(tl.int64)
        key_offset = block_long * key_stride_block + row * key_stride_token + h * key_stride_h
        value_offset = block_long * value_stride_block + row * value_stride_token + h * value_stride_h
        scale_offset = block_long * scale_stride_block + row * scale_stride_token + h * scale_stride_h
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        token_mask = token < end
        word_mask = token_mask[:, None]
        if HEAD_DIM < 4 * BLOCK_W:
            word_mask = word_mask & (4 * w[None, :] < HEAD_DIM)

        key_words = tl.load(key_ptr + key_offset[:, None] + w[None, :], mask=word_mask, other=0)
        key_0, key_1, key_2, key_3 = nibble_planes(key_words)
        score = tl.dot(query_0, tl.trans(key_0))
        score = tl.dot(query_1, tl.trans(key_1), score)
        score = tl.dot(query_2, tl.trans(key_2), score)
        score = tl.dot(query_3, tl.trans(key_3), score)
        key_scale, key_zero = split_scale_zero(tl.load(key_scale_zero_ptr + scale_offset, mask=token_mask, other=0))
        # q . (code * scale + zero) = (q . code) * scale + (sum of q) * zero
        score = score * (key_scale * (scale_log2 / PLANE_FACTOR))[None, :]
        score += query_sum[:, None] * (key_zero * scale_log2)[None, :]
        score = tl.where(token_mask[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        value_scale, value_zero = split_scale_zero(
            tl.load(value_scale_zero_ptr + scale_offset, mask=token_mask, other=0)
        )
        zero_output = zero_output * decay + tl.sum(weight * value_zero[None, :], 1)
        weight = (weight * (value_scale * WEIGHT_FACTOR)[None, :]).to(tl.float16)
        value_words = tl.load(value_ptr + value_offset[:, None] + w[None, :], mask=word_mask, other=0)
        value_0, value_1, value_2, value_3 = nibble_planes(value_words)
        output_0 = tl.dot(weight, value_0, output_0 * decay[:, None])
        output_1 = tl.dot(weight, value_1, output_1 * decay[:, None])
        output_2 = tl.dot(weight, value_2, output_2 * decay[:, None])
        output_3 = tl.dot(weight, value_3, output_3 * decay[:, None])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial_row_ptr = partial_ptr + partial_row[:, None] * HEAD_DIM + 2 * w[None, :]
    mask = query_mask & (begin < end)
    factor = (1.0 / (WEIGHT_FACTOR * PLANE_FACTOR) / divisor)[:, None]
    zero = (zero_output / divisor)[:, None]
    tl.store(partial_row_ptr, output_0 * factor + zero, mask=mask)
    tl.store(partial_row_ptr + HEAD_DIM // 2, output_1 * (factor * 0.0625) + zero, mask=mask)
    tl.store(partial_row_ptr + 1, output_2 * factor + zero, mask=mask)
    tl.store(partial_row_ptr + HEAD_DIM // 2 + 1, output_3 * (factor * 0.0625) + zero, mask=mask)
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_int4_split(
    case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the split kernel.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, fields = inputs["query"], inputs["fields"]
    key, value = fields["key"], fields["value"]
    check_codes(case, key, value, codes_per_word=2)
    if case.head_dim % CODES_PER_WORD:
        raise ValueError("head_dim must be a multiple of 4: so many codes share a word")
    pairs = tuple(fields[name].view(torch.int32) for name in ("key_scale_zero", "value_scale_zero"))
    check_metadata(key, *pairs)
    key, value = key.view(torch.uint16), value.view(torch.uint16)
    block_table, lse = inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_int4_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, *pairs, block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            *pairs[0].stride()[:3],
            block_table.stride(0),
        ),
        options={
            "PLANE_FACTOR": PLANE_FACTOR,
            "WEIGHT_FACTOR": WEIGHT_FACTOR,
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_W": max(16, triton.next_power_of_2(key.shape[-1])),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
