"""Write path of a TurboQuant preset in the shape of vLLM's store kernel: one program per token and head.

The rotation is a launch before it. Codes are found by binary search in a table in memory and packed into streams of
bits; pages are inline and written byte by byte; the norm is the vector's own.
"""

# Compile-time locals are upper case.
# ruff: noqa: N806

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.turboquant import SMALLEST_NORM, SMALLEST_SCALE, TurboQuant
from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs
from .kernel import check_rotatable


@triton.jit
def store_stream(byte_ptr, codes, HEAD_DIM: tl.constexpr, BITS: tl.constexpr):
    """Pack codes of 3 or 4 bits into a stream of bits, lowest first, and store it."""
    if BITS == 4:
        pairs = tl.reshape(codes, [HEAD_DIM // 2, 2]) << (4 * tl.arange(0, 2))[None, :]
        tl.store(byte_ptr + tl.arange(0, HEAD_DIM // 2), tl.sum(pairs, 1).to(tl.uint8))
    else:
        groups = tl.reshape(codes, [HEAD_DIM // 8, 8]) << (3 * tl.arange(0, 8))[None, :]
        words = tl.sum(groups, 1)
        first_ptr = byte_ptr + 3 * tl.arange(0, HEAD_DIM // 8)
        for i in tl.static_range(3):
            tl.store(first_ptr + i, ((words >> 8 * i) & 0xFF).to(tl.uint8))


@triton.jit
def store_half(byte_ptr, number):
    """Store a number as fp16, byte by byte."""
    bits = number.to(tl.float16).to(tl.uint16, bitcast=True)
    tl.store(byte_ptr, (bits & 0xFF).to(tl.uint8))
    tl.store(byte_ptr + 1, (bits >> 8).to(tl.uint8))


@triton.jit
def append_turboquant_as_shipped_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    thresholds_ptr,
    pages_ptr,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    stride_block,
    stride_token,
    stride_h,
    ROOT: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FP8: tl.constexpr,
    KEY_IS_FP8: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write one token of one head, its key rotated already unless keys are fp8."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, HEAD_DIM)
    KEY_BYTES: tl.constexpr = HEAD_DIM * KEY_BITS // 8
    VALUE_START: tl.constexpr = KEY_BYTES if KEY_IS_FP8 else KEY_BYTES + 2
    VALUE_BYTES: tl.constexpr = HEAD_DIM * VALUE_BITS // 8
    slot = tl.load(slot_mapping_ptr + t)
    if slot >= 0:
        slot_ptr = pages_ptr + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_token + h * stride_h
        key = tl.load(key_ptr + t * key_stride_t + h * key_stride_h + d).to(tl.float32)
        if KEY_IS_FP8:
            code = tl.clamp(key, -LARGEST_FP8, LARGEST_FP8).to(tl.float8e4nv)
            tl.store(slot_ptr + d, code.to(tl.uint8, bitcast=True))
        else:
            norm = tl.sqrt(tl.sum(key * key, 0))
            unit = key * (ROOT / tl.maximum(norm, SMALLEST_NORM))
            low = tl.zeros([HEAD_DIM], tl.int32)
            for bit in tl.static_range(KEY_BITS):
                threshold = tl.load(thresholds_ptr + low + (1 << (KEY_BITS - 1 - bit)) - 1)
                low += (unit >= threshold).to(tl.int32) << (KEY_BITS - 1 - bit)
            store_stream(slot_ptr, low, HEAD_DIM, KEY_BITS)
            store_half(slot_ptr + KEY_BYTES, norm)

        value = tl.load(value_ptr + t * value_stride_t + h * value_stride_h + d).to(tl.float32)
        zero = tl.min(value, 0)
        LARGEST: tl.constexpr = (1 << VALUE_BITS) - 1
        scale = tl.maximum((tl.max(value, 0) - zero) / LARGEST, SMALLEST_SCALE)
        codes = tl.clamp(tl.floor((value - zero) / scale + 0.5), 0.0, LARGEST * 1.0).to(tl.int32)
        store_stream(slot_ptr + VALUE_START, codes, HEAD_DIM, VALUE_BITS)
        store_half(slot_ptr + VALUE_START + VALUE_BYTES, scale)
        store_half(slot_ptr + VALUE_START + VALUE_BYTES + 2, zero)


def plan_append_as_shipped(
    kv_format: TurboQuant,
    case: AppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the write of all tokens; it reads ``rotated_key`` and ``thresholds`` of the buffers unless keys are fp8.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_append_inputs(case, inputs)
    check_rotatable(case, inputs)
    pages, value = buffers["pages"], inputs["value"]
    if kv_format.arrangement != "inline" or not pages.is_contiguous():
        raise ValueError("pages must be contiguous and inline")
    key = buffers["rotated_key"] if kv_format.rotates_keys else inputs["key"]
    token_bytes = pages.shape[-1] // case.block_size
    return Launch(
        kernel=append_turboquant_as_shipped_kernel,
        grid=(case.num_tokens, case.num_kv_heads),
        arguments=(
            *(key, value, inputs["slot_mapping"], buffers.get("thresholds", key), pages),
            *(*key.stride()[:2], *value.stride()[:2]),
            *(pages.shape[-1], token_bytes, token_bytes // case.num_kv_heads),
        ),
        options={
            "ROOT": math.sqrt(case.head_dim),
            "SMALLEST_NORM": SMALLEST_NORM,
            "SMALLEST_SCALE": SMALLEST_SCALE,
            "LARGEST_FP8": torch.finfo(torch.float8_e4m3fn).max,
            "KEY_IS_FP8": not kv_format.rotates_keys,
            "KEY_BITS": kv_format.key_bits,
            "VALUE_BITS": kv_format.value_bits,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
