"""Paged split-KV decode attention over bytes: fp8 (e4m3, e5m2) or int8, one scale per tensor or per token and head.

Tile names: b request, h KV head, m query head within its group, n token within a tile, d dimension of a head (or a
pair of them), s split. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x.
Upper case: compile-time.
"""

# One kernel, read from top to bottom.
# ruff: noqa: PLR0915

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import load_block_ids, softmax_step, split_range
from .unpack import byte_planes, convert_code

WEIGHT_FACTOR = 16.0
"""Weights times value scales are rounded to fp16: this keeps scales of 4e-6 to 4,094 in its normal range."""
PLANE_FACTORS = {"e4m3": 1.0, "e5m2": 1.0, "int8": 2.0**-9}
"""What `byte_planes` gives, over the value of the code."""


@dataclass(frozen=True)
class UnpackConfig(LaunchConfig):
    """A tiling, and how codes become halves.

    Attributes
    ----------
    unpack : {'bits', 'convert'}
        bits: by integer operations on 16-bit words; convert: by the target's conversion instructions.
    """

    unpack: Literal["bits", "convert"] = "bits"


@triton.jit
def decode_attention_bytes_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    score_factor,
    output_factor,
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
    CODE: tl.constexpr,
    CONVERT: tl.constexpr,
    PER_TOKEN_SCALE: tl.constexpr,
    WEIGHT_FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2.

    V is read in words of two codes, dimensions 2 d and 2 d + 1, each of which has its own accumulator. K is read in
    such words too, with the query split likewise; or, where the target converts codes (CONVERT), code by code: pairs of
    codes are then neighbours in a register as they come.
    """
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    query_head = h * GROUP + m
    query_mask = m[:, None] < GROUP
    if HEAD_DIM < 2 * BLOCK_D:
        query_mask = query_mask & (2 * d[None, :] < HEAD_DIM)
    query_row_ptr = query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h
    if CONVERT:
        code_d = tl.arange(0, 2 * BLOCK_D)
        code_mask = (m[:, None] < GROUP) & (code_d[None, :] < HEAD_DIM)
        query = tl.load(query_row_ptr + code_d[None, :], mask=code_mask, other=0.0).to(tl.float16)
    else:
        query_even = tl.load(query_row_ptr + 2 * d[None, :], mask=query_mask, other=0.0).to(tl.float16)
        query_odd = tl.load(query_row_ptr + 2 * d[None, :] + 1, mask=query_mask, other=0.0).to(tl.float16)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output_even = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    output_odd = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        if HEAD_DIM < 2 * BLOCK_D:
            word_mask = word_mask & (2 * d[None, :] < HEAD_DIM)

        if CONVERT:
            key_mask = token_mask[:, None]
            if HEAD_DIM < 2 * BLOCK_D:
                key_mask = key_mask & (code_d[None, :] < HEAD_DIM)
            key = tl.load(key_ptr + key_offset[:, None] + code_d[None, :], mask=key_mask, other=0)
            score = tl.dot(query, tl.trans(convert_code(key, CODE)))
        else:
            key_words = tl.load(key_ptr + key_offset[:, None] + d[None, :], mask=word_mask, other=0)
            key_even, key_odd = byte_planes(key_words, CODE, False)
            score = tl.dot(query_even, tl.trans(key_even))
            score = tl.dot(query_odd, tl.trans(key_odd), score)
        if PER_TOKEN_SCALE:
            key_scale = tl.load(key_scale_ptr + scale_offset, mask=token_mask, other=0.0)
            score = score * (key_scale * score_factor)[None, :]
        else:
            score = score * score_factor
        score = tl.where(token_mask[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        if PER_TOKEN_SCALE:
            value_scale = tl.load(value_scale_ptr + scale_offset, mask=token_mask, other=0.0)
            weight = weight * (value_scale * WEIGHT_FACTOR)[None, :]
        weight = weight.to(tl.float16)
        value_words = tl.load(value_ptr + value_offset[:, None] + d[None, :], mask=word_mask, other=0)
        value_even, value_odd = byte_planes(value_words, CODE, CONVERT)
        output_even = tl.dot(weight, value_even, output_even * decay[:, None])
        output_odd = tl.dot(weight, value_odd, output_odd * decay[:, None])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial_row_ptr = partial_ptr + partial_row[:, None] * HEAD_DIM + 2 * d[None, :]
    factor = (output_factor / divisor)[:, None]
    tl.store(partial_row_ptr, output_even * factor, mask=query_mask & (begin < end))
    tl.store(partial_row_ptr + 1, output_odd * factor, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_byte_split(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
    *,
    code: Literal["e4m3", "e5m2", "int8"],
) -> Launch:
    """Lay out the split kernel over fp8 or int8 codes.

    Scales per token and head are fields ``key_scale`` and ``value_scale``; scales per tensor are inputs of those names,
    a float or a tensor of one element.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, key, value = inputs["query"], inputs["fields"]["key"], inputs["fields"]["value"]
    check_codes(case, key, value, codes_per_word=2)
    convert = isinstance(config, UnpackConfig) and config.unpack == "convert"
    if convert and code == "int8":
        raise ValueError("int8 codes are read as words: no conversion instruction gives halves")
    per_token = "key_scale" in inputs["fields"]
    score_factor = inputs["scale"] * math.log2(math.e)
    if per_token:
        key_scale, value_scale = inputs["fields"]["key_scale"], inputs["fields"]["value_scale"]
        check_metadata(key, key_scale, value_scale)
        output_factor = 1.0 / WEIGHT_FACTOR
    else:
        key_scale = value_scale = buffers["lse"]  # never read
        score_factor *= float(inputs["key_scale"])
        output_factor = float(inputs["value_scale"])
    score_factor /= PLANE_FACTORS[code]
    output_factor /= PLANE_FACTORS[code]
    key, value = key.view(torch.uint8 if convert else torch.uint16), value.view(torch.uint16)
    block_table, lse = inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=decode_attention_bytes_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, key_scale, value_scale, block_table, inputs["context_lens"]),
            *(buffers["partial"], lse, score_factor, output_factor, case.num_query_heads),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            *key_scale.stride()[:3],
            block_table.stride(0),
        ),
        options={
            "CODE": code,
            "CONVERT": convert,
            "PER_TOKEN_SCALE": per_token,
            "WEIGHT_FACTOR": WEIGHT_FACTOR,
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": max(16, triton.next_power_of_2(value.shape[-1])),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )


def check_codes(case: DecodeBatch, key: torch.Tensor, value: torch.Tensor, *, codes_per_word: int) -> None:
    """Raise ValueError unless K and V are alike, contiguous along a vector, and whole words long."""
    requirements = {
        "key and value must be (num_blocks, block_size, num_kv_heads, codes)": key.shape == value.shape
        and key.shape[1:3] == (case.block_size, case.num_kv_heads),
        "key and value must have one dtype of one byte": key.dtype == value.dtype and key.dtype.itemsize == 1,
        "key and value must be contiguous along a vector": key.stride(-1) == value.stride(-1) == 1,
        f"head_dim must be a multiple of {codes_per_word}: so many codes share a word": case.head_dim % codes_per_word
        == 0,
        "vectors must start at multiples of a word": all(
            offset % codes_per_word == 0
            for tensor in (key, value)
            for offset in (*tensor.stride()[:3], tensor.storage_offset())
        ),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)


def check_metadata(key: torch.Tensor, key_metadata: torch.Tensor, value_metadata: torch.Tensor) -> None:
    """Raise ValueError unless both are (num_blocks, block_size, num_kv_heads, 1) with the same strides and dtype."""
    if not key_metadata.shape == value_metadata.shape == (*key.shape[:3], 1):
        raise ValueError("scales must be (num_blocks, block_size, num_kv_heads, 1)")
    if key_metadata.stride() != value_metadata.stride() or key_metadata.dtype != value_metadata.dtype:
        raise ValueError("the scales of key and value must have the same strides and dtype")
