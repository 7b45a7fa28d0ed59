"""Decode attention over KIVI-4 and KIVI-2 in the three launches of KIVI's repository: scores, softmax, output.

As in its CUDA kernels (github.com/jy-yuan/KIVI, quant/csrc/gemv_cuda.cu), each query head multiplies vectors by itself,
codes are shifted out of int32 words and converted, and scores and weights go through memory in fp16. Ours differ in
that K and V lie in pages and that the residual is part of the same launches.

Tile names: b request, q query head, h KV head, n token within a tile, d dimension of a head, w word, f field of a word.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.kivi import GROUP, Kivi
from ...launches import Launch, LaunchConfig
from ..batch import DecodeBatch
from .inputs import check_kivi_inputs
from .kernel import packed_length

SOFTMAX_BLOCK_N = 1024


@triton.jit
def unpack_words(words, BITS: tl.constexpr):
    """Unpack int32 words (rows, W), `sequential`, to fp32 codes (rows, W * 32 / BITS)."""
    shift = tl.arange(0, 32 // BITS) * BITS
    codes = (words[:, :, None] >> shift[None, None, :]) & (2**BITS - 1)
    return tl.reshape(codes, [words.shape[0], words.shape[1] * (32 // BITS)]).to(tl.float32)


@triton.jit
def kivi_scores_kernel(
    query_ptr,
    key_ptr,
    key_scale_ptr,
    key_zero_ptr,
    residual_key_ptr,
    residual_index_ptr,
    block_table_ptr,
    context_lens_ptr,
    weight_ptr,
    scale,
    query_stride_b,
    query_stride_q,
    key_stride_block,
    key_stride_group,
    key_stride_h,
    key_stride_d,
    key_scale_stride_block,
    key_scale_stride_group,
    key_scale_stride_h,
    residual_stride_b,
    residual_stride_token,
    residual_stride_h,
    block_table_stride_b,
    weight_stride_b,
    weight_stride_q,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Score one query head against a tile of tokens, first by key groups, then what of the tile is in the residual."""
    b = tl.program_id(0)
    q = tl.program_id(1)
    h = q // GROUP
    context = tl.load(context_lens_ptr + b)
    packed = packed_length(context, RESIDUAL)
    begin = tl.program_id(2) * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, context)
    n = tl.arange(0, 32)
    d = tl.arange(0, BLOCK_D)
    query = tl.load(query_ptr + b * query_stride_b + q * query_stride_q + d, mask=d < HEAD_DIM, other=0.0)
    query = query.to(tl.float32)
    weight_row_ptr = weight_ptr + b.to(tl.int64) * weight_stride_b + q * weight_stride_q
    for first in range(begin, tl.minimum(end, packed), 32):
        page = tl.load(block_table_ptr + b.to(tl.int64) * block_table_stride_b + first // BLOCK_SIZE).to(tl.int64)
        group = first % BLOCK_SIZE // 32
        word = d[:, None] * key_stride_d + tl.arange(0, BITS)[None, :]
        key_row = page * key_stride_block + group * key_stride_group + h * key_stride_h
        words = tl.load(key_ptr + key_row + word, mask=d[:, None] < HEAD_DIM, other=0)
        scale_row = page * key_scale_stride_block + group * key_scale_stride_group + h * key_scale_stride_h
        key_scale = tl.load(key_scale_ptr + scale_row + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        key_zero = tl.load(key_zero_ptr + scale_row + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        key = unpack_words(words, BITS) * key_scale[:, None] + key_zero[:, None]
        score = tl.sum(query[:, None] * key, 0) * scale
        tl.store(weight_row_ptr + first + n, score.to(weight_ptr.dtype.element_ty))
    residual = tl.load(residual_index_ptr + b).to(tl.int64) * residual_stride_b + h * residual_stride_h
    for first in range(tl.maximum(begin, packed), end, 32):
        token = first + n
        offset = residual + (token % RESIDUAL)[None, :] * residual_stride_token + d[:, None]
        mask = (token[None, :] < context) & (d[:, None] < HEAD_DIM)
        key = tl.load(residual_key_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(query[:, None] * key, 0) * scale
        tl.store(weight_row_ptr + token, score.to(weight_ptr.dtype.element_ty), mask=token < context)


@triton.jit
def kivi_softmax_kernel(weight_ptr, context_lens_ptr, weight_stride_b, weight_stride_q, BLOCK_N: tl.constexpr):
    """Turn one query head's scores into weights, in place."""
    b = tl.program_id(0)
    q = tl.program_id(1)
    context = tl.load(context_lens_ptr + b)
    row_ptr = weight_ptr + b.to(tl.int64) * weight_stride_b + q * weight_stride_q
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for tile in range(0, context, BLOCK_N):
        token = tile + tl.arange(0, BLOCK_N)
        top = tl.maximum(top, tl.load(row_ptr + token, mask=token < context, other=float("-inf")).to(tl.float32))
    row_top = tl.max(top, 0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(0, context, BLOCK_N):
        token = tile + tl.arange(0, BLOCK_N)
        score = tl.load(row_ptr + token, mask=token < context, other=float("-inf")).to(tl.float32)
        total += tl.exp(score - row_top)
    row_total = tl.sum(total, 0)
    for tile in range(0, context, BLOCK_N):
        token = tile + tl.arange(0, BLOCK_N)
        score = tl.load(row_ptr + token, mask=token < context, other=float("-inf")).to(tl.float32)
        weight = tl.exp(score - row_top) / row_total
        tl.store(row_ptr + token, weight.to(weight_ptr.dtype.element_ty), mask=token < context)


@triton.jit
def kivi_output_kernel(
    weight_ptr,
    value_ptr,
    value_scale_ptr,
    value_zero_ptr,
    residual_value_ptr,
    residual_index_ptr,
    block_table_ptr,
    context_lens_ptr,
    output_ptr,
    weight_stride_b,
    weight_stride_q,
    value_stride_block,
    value_stride_token,
    value_stride_h,
    value_scale_stride_block,
    value_scale_stride_token,
    value_scale_stride_h,
    residual_stride_b,
    residual_stride_token,
    residual_stride_h,
    block_table_stride_b,
    output_stride_b,
    output_stride_q,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum 32 channels of one query head's values, weighted, over all of its tokens."""
    b = tl.program_id(0)
    q = tl.program_id(1)
    channels = tl.program_id(2)
    h = q // GROUP
    context = tl.load(context_lens_ptr + b)
    packed = packed_length(context, RESIDUAL)
    n = tl.arange(0, BLOCK_N)
    d = channels * 32 + tl.arange(0, 32)
    weight_row_ptr = weight_ptr + b.to(tl.int64) * weight_stride_b + q * weight_stride_q
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    output = tl.zeros([32], tl.float32)
    for tile in range(0, packed, BLOCK_N):
        token = tile + n
        mask = token < packed
        page = tl.load(block_table_row_ptr + token // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
        row = token % BLOCK_SIZE
        value_row = page * value_stride_block + row * value_stride_token + h * value_stride_h + channels * BITS
        words = tl.load(value_ptr + value_row[:, None] + tl.arange(0, BITS)[None, :], mask=mask[:, None], other=0)
        scale_row = page * value_scale_stride_block + row * value_scale_stride_token + h * value_scale_stride_h
        value_scale = tl.load(value_scale_ptr + scale_row + channels, mask=mask, other=0.0).to(tl.float32)
        value_zero = tl.load(value_zero_ptr + scale_row + channels, mask=mask, other=0.0).to(tl.float32)
        value = unpack_words(words, BITS) * value_scale[:, None] + value_zero[:, None]
        weight = tl.load(weight_row_ptr + token, mask=mask, other=0.0).to(tl.float32)
        output += tl.sum(weight[:, None] * value, 0)
    residual = tl.load(residual_index_ptr + b).to(tl.int64) * residual_stride_b + h * residual_stride_h
    for tile in range(packed, context, BLOCK_N):
        token = tile + n
        mask = token < context
        offset = residual + (token % RESIDUAL)[:, None] * residual_stride_token + d[None, :]
        value = tl.load(residual_value_ptr + offset, mask=mask[:, None], other=0.0).to(tl.float32)
        weight = tl.load(weight_row_ptr + token, mask=mask, other=0.0).to(tl.float32)
        output += tl.sum(weight[:, None] * value, 0)
    output_row_ptr = output_ptr + b * output_stride_b + q * output_stride_q
    tl.store(output_row_ptr + d, output.to(output_ptr.dtype.element_ty))


def plan_kivi_as_shipped(
    kv_format: Kivi,
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> tuple[Launch, ...]:
    """Lay out the three launches.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_kivi_inputs(kv_format, case, inputs, buffers)
    if kv_format.packing != "sequential":
        raise ValueError("this form reads words packed sequential")
    query, fields, weight, output = inputs["query"], inputs["fields"], buffers["weight"], buffers["output"]
    if weight.dim() != 3 or weight.shape[:2] != query.shape[:2] or weight.shape[2] < max(case.context_lens):
        raise ValueError("weight must be (batch, num_query_heads, at least the longest context)")
    if config.block_n % GROUP:
        raise ValueError(f"block_n must be a multiple of {GROUP}")
    if weight.stride(-1) != 1 or output.stride(-1) != 1:
        raise ValueError("weight and output must be contiguous along the last dimension")
    batch, num_query_heads, head_dim = query.shape
    context_lens, block_table = inputs["context_lens"], inputs["block_table"]
    residual_strides = (*inputs["residual_key"].stride()[:3], block_table.stride(0))
    options = {
        "BITS": kv_format.bits,
        "RESIDUAL": kv_format.residual_tokens,
        "GROUP": case.group,
        "BLOCK_SIZE": case.block_size,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    scores = Launch(
        kernel=kivi_scores_kernel,
        grid=(batch, num_query_heads, max(1, math.ceil(max(case.context_lens) / config.block_n))),
        arguments=(
            *(query, fields["key"], fields["key_scale"], fields["key_zero"]),
            *(inputs["residual_key"], inputs["residual_index"], block_table, context_lens, weight),
            inputs["scale"],
            *query.stride()[:2],
            *fields["key"].stride()[:4],
            *fields["key_scale"].stride()[:3],
            *residual_strides,
            *weight.stride()[:2],
        ),
        options={
            **options,
            "HEAD_DIM": head_dim,
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(head_dim),
        },
    )
    softmax = Launch(
        kernel=kivi_softmax_kernel,
        grid=(batch, num_query_heads),
        arguments=(weight, context_lens, *weight.stride()[:2]),
        options={"BLOCK_N": SOFTMAX_BLOCK_N, "num_warps": 4},
    )
    weighted_sum = Launch(
        kernel=kivi_output_kernel,
        grid=(batch, num_query_heads, head_dim // GROUP),
        arguments=(
            *(weight, fields["value"], fields["value_scale"], fields["value_zero"]),
            *(inputs["residual_value"], inputs["residual_index"], block_table, context_lens, output),
            *weight.stride()[:2],
            *fields["value"].stride()[:3],
            *fields["value_scale"].stride()[:3],
            *residual_strides,
            *output.stride()[:2],
        ),
        options={**options, "BLOCK_N": config.block_n},
    )
    return scores, softmax, weighted_sum
