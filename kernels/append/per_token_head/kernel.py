"""Quantise new K and V per token and head, and write codes and scales to their slots of the pool.

Tile names: t new token, h KV head, d dimension. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along
x. Upper case: compile-time. Products and sums are not contracted (``enable_fp_fusion``), so that codes are the
reference's to the bit.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from ...formats.per_token_head import (
    INT8_OFFSET,
    LARGEST_CODE,
    LARGEST_NIBBLE,
    SMALLEST_FP16_SCALE,
    SMALLEST_SCALE,
)
from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs
from ..fp8.encode import encode_fp8
from ..fp8.kernel import converts


@triton.jit
def round_to_byte(values, OFFSET: tl.constexpr):
    """Give ``round(x) + OFFSET``, ties to even, as uint8, for small x.

    Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits of an fp32.
    """
    bits = (values + (12582912.0 + OFFSET)).to(tl.int32, bitcast=True)
    return (bits & 0xFF).to(tl.uint8)


@triton.jit
def encode_byte_vectors(
    vectors, CODE: tl.constexpr, CONVERT: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr, OFFSET: tl.constexpr
):
    """Give codes (uint8) and fp32 scales of the rows of a tile."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(vectors), 1), LARGEST), FLOOR)
    scaled = vectors * tl.div_rn(1.0, scale)[:, None]
    if CODE == "int8":
        code = round_to_byte(tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST), OFFSET)
    else:
        code = encode_fp8(scaled, CODE, CONVERT)
    return code, scale


@triton.jit
def append_bytes_per_token_head_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    key_page_ptr,
    value_page_ptr,
    key_scale_ptr,
    value_scale_ptr,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_stride_block,
    page_stride_row,
    page_stride_h,
    scale_stride_block,
    scale_stride_row,
    scale_stride_h,
    CODE: tl.constexpr,
    CONVERT: tl.constexpr,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one head of a tile of tokens; a token in slot -1 is not written."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    kept = slot >= 0
    mask = kept[:, None] & (d[None, :] < HEAD_DIM)
    block = slot // BLOCK_SIZE
    row = slot % BLOCK_SIZE
    target = block * page_stride_block + row * page_stride_row + h * page_stride_h
    scale_target = block * scale_stride_block + row * scale_stride_row + h * scale_stride_h
    t = t.to(tl.int64)
    key = tl.load(key_ptr + (t * key_stride_t + h * key_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    value = tl.load(value_ptr + (t * value_stride_t + h * value_stride_h)[:, None] + d[None, :], mask=mask, other=0.0)
    key_code, key_scale = encode_byte_vectors(key.to(tl.float32), CODE, CONVERT, LARGEST, FLOOR, OFFSET)
    value_code, value_scale = encode_byte_vectors(value.to(tl.float32), CODE, CONVERT, LARGEST, FLOOR, OFFSET)
    tl.store(key_page_ptr + target[:, None] + d[None, :], key_code, mask=mask)
    tl.store(value_page_ptr + target[:, None] + d[None, :], value_code, mask=mask)
    tl.store(key_scale_ptr + scale_target, key_scale, mask=kept)
    tl.store(value_scale_ptr + scale_target, value_scale, mask=kept)


@triton.jit
def load_halves(vector_ptr, d, mask, HALF_DIM: tl.constexpr):
    """Load rows in two halves as fp32, and their least and largest elements."""
    low = tl.load(vector_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    high = tl.load(vector_ptr[:, None] + HALF_DIM + d[None, :], mask=mask, other=0.0).to(tl.float32)
    least = tl.min(tl.where(mask, tl.minimum(low, high), float("inf")), 1)
    largest = tl.max(tl.where(mask, tl.maximum(low, high), float("-inf")), 1)
    return low, high, least, largest


@triton.jit
def encode_nibbles(values, zero, factor, LARGEST: tl.constexpr):
    """Give the 4-bit codes of a tile, uint8."""
    scaled = (values - zero.to(tl.float32)[:, None]) * factor[:, None]
    return round_to_byte(tl.minimum(tl.maximum(scaled, 0.0), LARGEST), 0)


@triton.jit
def append_int4_per_token_head_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    key_page_ptr,
    value_page_ptr,
    key_scale_zero_ptr,
    value_scale_zero_ptr,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_stride_block,
    page_stride_row,
    page_stride_h,
    scale_stride_block,
    scale_stride_row,
    scale_stride_h,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write one head of a tile of tokens, K then V; a token in slot -1 is not written."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    kept = slot >= 0
    mask = kept[:, None] & (d[None, :] < HALF_DIM)
    block = slot // BLOCK_SIZE
    row = slot % BLOCK_SIZE
    target = block * page_stride_block + row * page_stride_row + h * page_stride_h
    scale_target = block * scale_stride_block + row * scale_stride_row + h * scale_stride_h
    t = t.to(tl.int64)
    for is_value in tl.static_range(2):
        if is_value == 0:
            vector_ptr = key_ptr + t * key_stride_t + h * key_stride_h
            page_ptr = key_page_ptr
            scale_zero_ptr = key_scale_zero_ptr
        else:
            vector_ptr = value_ptr + t * value_stride_t + h * value_stride_h
            page_ptr = value_page_ptr
            scale_zero_ptr = value_scale_zero_ptr
        low, high, least, largest = load_halves(vector_ptr, d, mask, HALF_DIM)
        # Rows that are not written hold no elements: give them an empty range.
        least = tl.where(kept, least, 0.0)
        largest = tl.where(kept, largest, 0.0)
        zero = least.to(tl.float16)
        scale = tl.maximum(tl.div_rn(largest - least, LARGEST), FLOOR).to(tl.float16)
        factor = tl.div_rn(1.0, scale.to(tl.float32))
        code = encode_nibbles(low, zero, factor, LARGEST) | (encode_nibbles(high, zero, factor, LARGEST) << 4)
        tl.store(page_ptr + target[:, None] + d[None, :], code, mask=mask)
        tl.store(scale_zero_ptr + scale_target, scale, mask=kept)
        tl.store(scale_zero_ptr + scale_target + 1, zero, mask=kept)


def plan_append_bytes(
    case: AppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
    *,
    dtype: Literal["int8", "fp8"],
) -> Launch:
    """Lay out the kernel of 8-bit codes; raise ValueError where a shape, dtype or stride does not fit."""
    options = {
        "CODE": "int8" if dtype == "int8" else "e4m3",
        "CONVERT": converts(config),
        "LARGEST": LARGEST_CODE[dtype],
        "FLOOR": SMALLEST_SCALE,
        "OFFSET": INT8_OFFSET,
        "HEAD_DIM": case.head_dim,
        "BLOCK_D": triton.next_power_of_2(case.head_dim),
    }
    metadata = (buffers["key_scale"], buffers["value_scale"])
    return _plan(append_bytes_per_token_head_kernel, case, inputs, buffers, config, metadata, options)


def plan_append_int4(
    case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> Launch:
    """Lay out the kernel of 4-bit codes; raise ValueError where a shape, dtype or stride does not fit."""
    options = {
        "LARGEST": float(LARGEST_NIBBLE),
        "FLOOR": SMALLEST_FP16_SCALE,
        "HALF_DIM": case.head_dim // 2,
        "BLOCK_D": triton.next_power_of_2(case.head_dim // 2),
    }
    metadata = (buffers["key_scale_zero"], buffers["value_scale_zero"])
    return _plan(append_int4_per_token_head_kernel, case, inputs, buffers, config, metadata, options)


def _plan(
    kernel: Any,
    case: AppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
    metadata: tuple[torch.Tensor, torch.Tensor],
    options: Mapping[str, Any],
) -> Launch:
    check_append_inputs(case, inputs)
    key, value = inputs["key"], inputs["value"]
    pages = tuple(buffers[name].view(torch.uint8) for name in ("key", "value"))
    for first, second in (pages, metadata):
        if first.stride() != second.stride() or first.stride(-1) != 1:
            raise ValueError("K and V of the pool must have the same strides and be contiguous along a vector")
    return Launch(
        kernel=kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(key, value, inputs["slot_mapping"], *pages, *metadata, case.num_tokens),
            *key.stride()[:2],
            *value.stride()[:2],
            *pages[0].stride()[:3],
            *metadata[0].stride()[:3],
        ),
        options={
            **options,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )
