"""Decode attention over per-token-head codes as vLLM ships it, written again without the features not used here.

8 bit: ``kernel_unified_attention`` (vllm/v1/attention/ops/triton_unified_attention.py): codes are cast to the query's
dtype. 4 bit: ``_attn_packed`` (vllm/v1/attention/ops/int4_per_token_head.py): even and odd nibbles are cast to fp32 and
multiplied with an fp32 query (TF32 on NVIDIA GPUs). Both load block ids where they are used, and each vector's metadata
from beside it.
"""

# Kernels read from top to bottom.
# ruff: noqa: PLR0915

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..fp8.kernel import check_codes, check_metadata
from ..softmax import split_range


@triton.jit
def softmax_step_e(score, top, total):
    """Fold a tile of scores into the running maximum and sum, with exp as vLLM does."""
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp(score - new_top[:, None])
    decay = tl.exp(top - new_top)
    return weight, decay, new_top, total * decay + tl.sum(weight, 1)


@triton.jit
def decode_attention_per_token_head_shipped_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    kv_stride_block,
    kv_stride_token,
    kv_stride_h,
    scale_stride_block,
    scale_stride_token,
    scale_stride_h,
    block_table_stride_b,
    CODES_PER_BYTE: tl.constexpr,
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
    dim = d * CODES_PER_BYTE
    query_head = h * GROUP + m
    query_mask = (m[:, None] < GROUP) & (dim[None, :] < HEAD_DIM)
    query_row_ptr = query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + dim[None, :]
    query = tl.load(query_row_ptr, mask=query_mask, other=0.0)
    if CODES_PER_BYTE == 2:
        query = query.to(tl.float32)
        query_odd = tl.load(query_row_ptr + 1, mask=query_mask, other=0.0).to(tl.float32)
        query_sum = tl.sum(query, 1) + tl.sum(query_odd, 1)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    output_odd = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        token_mask = token < end
        block_row_ptr = block_table_ptr + b * block_table_stride_b
        block = tl.load(block_row_ptr + token // BLOCK_SIZE, mask=token_mask, other=0).to(tl.int64)
        row = token % BLOCK_SIZE
        kv_offset = block * kv_stride_block + row * kv_stride_token + h * kv_stride_h
        key = tl.load(
            key_ptr + kv_offset[None, :] + d[:, None], mask=(dim[:, None] < HEAD_DIM) & token_mask[None, :], other=0.0
        )
        value = tl.load(
            value_ptr + kv_offset[:, None] + d[None, :], mask=(dim[None, :] < HEAD_DIM) & token_mask[:, None], other=0.0
        )
        scale_offset = block * scale_stride_block + row * scale_stride_token + h * scale_stride_h
        key_scale = tl.load(key_scale_ptr + scale_offset, mask=token_mask, other=1.0)
        value_scale = tl.load(value_scale_ptr + scale_offset, mask=token_mask, other=1.0)
        if CODES_PER_BYTE == 2:
            key_bits = key_scale.to(tl.int32, bitcast=True)
            key_zero = (key_bits & 15).to(tl.float32)
            key_scale = (key_bits & -16).to(tl.float32, bitcast=True)
            value_bits = value_scale.to(tl.int32, bitcast=True)
            value_zero = (value_bits & 15).to(tl.float32)
            value_scale = (value_bits & -16).to(tl.float32, bitcast=True)
            score = tl.dot(query, (key & 15).to(tl.float32)) + tl.dot(query_odd, (key >> 4).to(tl.float32))
            score = (score - query_sum[:, None] * key_zero[None, :]) * (scale * key_scale[None, :])
        else:
            score = tl.dot(query, key.to(query.dtype)) * (scale * key_scale[None, :])
        score = tl.where(token_mask[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step_e(score, top, total)
        weight = weight * value_scale[None, :]
        output = output * decay[:, None]
        if CODES_PER_BYTE == 2:
            output_odd = output_odd * decay[:, None]
            zero = tl.sum(weight * value_zero[None, :], 1)
            output += tl.dot(weight, (value & 15).to(tl.float32)) - zero[:, None]
            output_odd += tl.dot(weight, (value >> 4).to(tl.float32)) - zero[:, None]
        else:
            output += tl.dot(weight.to(query.dtype), value.to(query.dtype))

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial_row_ptr = partial_ptr + partial_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(partial_row_ptr, output / divisor[:, None], mask=query_mask & (begin < end))
    if CODES_PER_BYTE == 2:
        tl.store(partial_row_ptr + 1, output_odd / divisor[:, None], mask=query_mask & (begin < end))
    log2_e = 1.4426950408889634
    tl.store(lse_ptr + partial_row, top * log2_e + tl.log2(divisor), mask=m < GROUP)


def plan_shipped_split(
    case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the split kernel; raise ValueError where a shape, dtype or stride does not fit."""
    check_decode_inputs(case, inputs, buffers)
    query, fields = inputs["query"], inputs["fields"]
    key, value = fields["key"], fields["value"]
    check_codes(case, key, value, codes_per_word=1)
    check_metadata(key, fields["key_scale"], fields["value_scale"])
    if key.stride() != value.stride():
        raise ValueError("key and value must have the same strides")
    codes_per_byte = case.head_dim // key.shape[-1]
    block_table, lse = inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_per_token_head_shipped_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, fields["key_scale"], fields["value_scale"]),
            *(block_table, inputs["context_lens"], buffers["partial"], lse, inputs["scale"], case.num_query_heads),
            *query.stride()[:2],
            *key.stride()[:3],
            *fields["key_scale"].stride()[:3],
            block_table.stride(0),
        ),
        options={
            "CODES_PER_BYTE": codes_per_byte,
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": max(16, triton.next_power_of_2(key.shape[-1])),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
