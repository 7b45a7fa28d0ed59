"""Quantise new keys and values by a TurboQuant preset and write them to their slots.

Tile names: t token, d element. Suffix `_ptr`: pointer. Upper case: compile-time.
"""

# Compile-time locals are upper case.
# ruff: noqa: N806

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.turboquant.kernel import page_halves
from ...formats.lloyd_max import Codebook
from ...formats.turboquant import SMALLEST_NORM, SMALLEST_SCALE, TurboQuant, hadamard
from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs
from .pieces import quantize_symmetric, rotate_rows, store_planes

MATRIX_ROWS = 64
"""Rows of the rotation matrix that are held at a time."""


@triton.jit
def append_turboquant_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    matrix_ptr,
    key_codes_ptr,
    key_high_ptr,
    key_norm_ptr,
    value_codes_ptr,
    value_high_ptr,
    value_scale_ptr,
    value_zero_ptr,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_halves,
    THRESHOLDS: tl.constexpr,
    LEVELS: tl.constexpr,
    ROOT: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    LARGEST_FP8: tl.constexpr,
    KEY_IS_FP8: tl.constexpr,
    KEY_BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MATRIX_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write one tile of tokens of one head; tokens without a slot are left out."""
    h = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, HEAD_DIM)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    mask = slot >= 0
    slot = tl.where(mask, slot, 0)
    page = slot // BLOCK_SIZE * page_halves
    row = slot % BLOCK_SIZE * NUM_KV_HEADS + h

    key_row_ptr = key_ptr + (t.to(tl.int64) * key_stride_t + h * key_stride_h)[:, None]
    if KEY_IS_FP8:
        key = tl.load(key_row_ptr + d[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
        key = tl.clamp(key, -LARGEST_FP8, LARGEST_FP8).to(tl.float8e4nv)
        tl.store(key_codes_ptr + (2 * page + row * HEAD_DIM)[:, None] + d[None, :], key, mask=mask[:, None])
    else:
        rotated, square = rotate_rows(key_row_ptr, mask[:, None], matrix_ptr, BLOCK_T, HEAD_DIM, MATRIX_ROWS)
        norm = tl.sqrt(square)
        # The matrix is sqrt(HEAD_DIM) times a rotation, so these have unit variance.
        unit = rotated / tl.maximum(norm, SMALLEST_NORM)[:, None]
        codes, levels = quantize_symmetric(unit, THRESHOLDS, LEVELS, 1 << (KEY_BITS - 1))
        store_planes(key_codes_ptr, key_high_ptr, codes, page, row, mask, BLOCK_T, HEAD_DIM, KEY_BITS)
        norm = norm * ROOT / tl.sqrt(tl.sum(levels * levels, 1))
        tl.store(key_norm_ptr + page + row, norm.to(tl.float16), mask=mask)

    value_row_ptr = value_ptr + (t.to(tl.int64) * value_stride_t + h * value_stride_h)[:, None]
    value = tl.load(value_row_ptr + d[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    zero = tl.min(value, 1)
    LARGEST: tl.constexpr = (1 << VALUE_BITS) - 1
    scale = tl.maximum((tl.max(value, 1) - zero) / LARGEST, SMALLEST_SCALE)
    codes = tl.floor((value - zero[:, None]) / scale[:, None] + 0.5)
    codes = tl.clamp(codes, 0.0, LARGEST * 1.0).to(tl.int32)
    store_planes(value_codes_ptr, value_high_ptr, codes, page, row, mask, BLOCK_T, HEAD_DIM, VALUE_BITS)
    tl.store(value_scale_ptr + page + row, scale.to(tl.float16), mask=mask)
    tl.store(value_zero_ptr + page + row, zero.to(tl.float16), mask=mask)


def plan_append_turboquant(
    kv_format: TurboQuant,
    case: AppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the write of all tokens; `config.block_n` counts tokens, at least 16.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_append_inputs(case, inputs)
    check_rotatable(case, inputs)
    key, value = inputs["key"], inputs["value"]
    rotates = kv_format.rotates_keys
    key_codes = buffers["key_codes"].view(torch.uint16) if rotates else buffers["key_codes"]
    value_codes = buffers["value_codes"].view(torch.uint16)
    thresholds, levels = positive_half(kv_format.codebook) if rotates else ((), ())
    matrix = hadamard(case.head_dim, str(key.device)).to(key.dtype) if rotates else key
    return Launch(
        kernel=append_turboquant_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(key, value, inputs["slot_mapping"], matrix),
            *(key_codes, buffers.get("key_high", key_codes), buffers.get("key_norm", buffers["value_scale"])),
            *(value_codes, buffers.get("value_high", value_codes), buffers["value_scale"], buffers["value_zero"]),
            *(case.num_tokens, *key.stride()[:2], *value.stride()[:2], page_halves(buffers["pages"])),
        ),
        options={
            "THRESHOLDS": thresholds,
            "LEVELS": levels,
            "ROOT": math.sqrt(case.head_dim),
            "SMALLEST_NORM": SMALLEST_NORM,
            "SMALLEST_SCALE": SMALLEST_SCALE,
            "LARGEST_FP8": torch.finfo(torch.float8_e4m3fn).max,
            "KEY_IS_FP8": not rotates,
            "KEY_BITS": kv_format.key_bits,
            "VALUE_BITS": kv_format.value_bits,
            "NUM_KV_HEADS": case.num_kv_heads,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "MATRIX_ROWS": min(MATRIX_ROWS, case.head_dim),
            "BLOCK_T": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )


def positive_half(codebook: Codebook) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give the positive thresholds and levels of a symmetric codebook."""
    half = len(codebook.levels) // 2
    return codebook.thresholds[half:], codebook.levels[half:]


def check_rotatable(case: AppendBatch, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless keys and values are 16 bits wide and vectors a power of two long."""
    if inputs["key"].dtype not in {torch.float16, torch.bfloat16}:
        raise ValueError("keys and values must be fp16 or bf16, whose products with +1 and -1 are exact")
    if case.head_dim & (case.head_dim - 1) or case.head_dim < 16:
        raise ValueError(f"head_dim must be a power of two of at least 16, not {case.head_dim}")
