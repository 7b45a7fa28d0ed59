"""Quantise new keys and values by the paper's Algorithm 1 or 2 and write them to their slots.

Tile names: t token, d element, o element of a projection. Suffix `_ptr`: pointer. Upper case: compile-time.
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
from ...formats.turboquant import SMALLEST_NORM, TurboQuantPaper, gaussian_projection, hadamard, random_signs
from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs
from ..turboquant.kernel import MATRIX_ROWS, check_rotatable, positive_half
from ..turboquant.pieces import gather_slices, quantize_symmetric, rotate_rows, store_planes


@triton.jit
def sign_bytes(
    rows, projection_ptr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, PROJECTION_ROWS: tl.constexpr
):  # fmt: skip
    """Project rows, (ROWS, HEAD_DIM) in fp32, and pack the signs into a 1-bit plane.

    Rows go in as two fp16 parts each, so that only a projection within 2**-21 of zero may get the wrong sign.
    """
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    SLICES: tl.constexpr = PROJECTION_ROWS // EIGHTH
    high = rows.to(tl.float16)
    low = (rows - high.to(tl.float32)).to(tl.float16)
    d = tl.arange(0, HEAD_DIM)
    plane = tl.zeros([ROWS, EIGHTH], tl.int32)
    for first in tl.static_range(0, HEAD_DIM, PROJECTION_ROWS):
        o = first + tl.arange(0, PROJECTION_ROWS)
        projection = tl.trans(tl.load(projection_ptr + o[:, None] * HEAD_DIM + d[None, :]))
        projected = tl.dot(low, projection, tl.dot(high, projection))
        bits = (projected >= 0.0).to(tl.int32)
        plane |= gather_slices(bits, ROWS, EIGHTH, SLICES, 1) << (first // EIGHTH)
    return plane


@triton.jit
def append_turboquant_paper_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    matrix_ptr,
    projection_ptr,
    key_codes_ptr,
    key_high_ptr,
    key_signs_ptr,
    key_norm_ptr,
    key_residual_norm_ptr,
    value_codes_ptr,
    value_high_ptr,
    value_norm_ptr,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_halves,
    KEY_THRESHOLDS: tl.constexpr,
    KEY_LEVELS: tl.constexpr,
    VALUE_THRESHOLDS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr,
    ROOT: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
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
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    mask = slot >= 0
    slot = tl.where(mask, slot, 0)
    page = slot // BLOCK_SIZE * page_halves
    row = slot % BLOCK_SIZE * NUM_KV_HEADS + h

    key_row_ptr = key_ptr + (t.to(tl.int64) * key_stride_t + h * key_stride_h)[:, None]
    rotated, square = rotate_rows(key_row_ptr, mask[:, None], matrix_ptr, BLOCK_T, HEAD_DIM, MATRIX_ROWS)
    norm = tl.sqrt(square)
    # The matrix is sqrt(HEAD_DIM) times a rotation, so these have unit variance.
    unit = rotated / tl.maximum(norm, SMALLEST_NORM)[:, None]
    codes, levels = quantize_symmetric(unit, KEY_THRESHOLDS, KEY_LEVELS, 1 << (KEY_BITS - 1))
    store_planes(key_codes_ptr, key_high_ptr, codes, page, row, mask, BLOCK_T, HEAD_DIM, KEY_BITS)
    tl.store(key_norm_ptr + page + row, norm.to(tl.float16), mask=mask)
    if HAS_SIGNS:
        residual = unit - levels
        length = tl.sqrt(tl.sum(residual * residual, 1))
        plane = sign_bytes(residual, projection_ptr, BLOCK_T, HEAD_DIM, MATRIX_ROWS)
        w = tl.arange(0, HEAD_DIM // 8)
        signs_offset = (2 * page + row * (HEAD_DIM // 8))[:, None] + w[None, :]
        tl.store(key_signs_ptr + signs_offset, plane.to(tl.uint8), mask=mask[:, None])
        tl.store(key_residual_norm_ptr + page + row, (length * norm / ROOT).to(tl.float16), mask=mask)

    value_row_ptr = value_ptr + (t.to(tl.int64) * value_stride_t + h * value_stride_h)[:, None]
    rotated, square = rotate_rows(value_row_ptr, mask[:, None], matrix_ptr, BLOCK_T, HEAD_DIM, MATRIX_ROWS)
    norm = tl.sqrt(square)
    unit = rotated / tl.maximum(norm, SMALLEST_NORM)[:, None]
    codes, levels = quantize_symmetric(unit, VALUE_THRESHOLDS, VALUE_LEVELS, 1 << (VALUE_BITS - 1))
    store_planes(value_codes_ptr, value_high_ptr, codes, page, row, mask, BLOCK_T, HEAD_DIM, VALUE_BITS)
    tl.store(value_norm_ptr + page + row, norm.to(tl.float16), mask=mask)


def plan_append_turboquant_paper(
    kv_format: TurboQuantPaper,
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
    device = str(key.device)
    matrix = (random_signs(case.head_dim, device)[:, None] * hadamard(case.head_dim, device)).to(key.dtype)
    key_codes = buffers["key_codes"] if kv_format.key_bits == 1 else buffers["key_codes"].view(torch.uint16)
    value_codes = buffers["value_codes"].view(torch.uint16)
    key_thresholds, key_levels = positive_half(kv_format.key_codebook)
    value_thresholds, value_levels = positive_half(kv_format.value_codebook)
    return Launch(
        kernel=append_turboquant_paper_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(key, value, inputs["slot_mapping"], matrix, gaussian_projection(case.head_dim, device)),
            *(key_codes, buffers.get("key_high", key_codes), buffers.get("key_signs", key_codes)),
            *(buffers["key_norm"], buffers.get("key_residual_norm", buffers["key_norm"])),
            *(value_codes, buffers.get("value_high", value_codes), buffers["value_norm"]),
            *(case.num_tokens, *key.stride()[:2], *value.stride()[:2], page_halves(buffers["pages"])),
        ),
        options={
            "KEY_THRESHOLDS": key_thresholds,
            "KEY_LEVELS": key_levels,
            "VALUE_THRESHOLDS": value_thresholds,
            "VALUE_LEVELS": value_levels,
            "ROOT": math.sqrt(case.head_dim),
            "SMALLEST_NORM": SMALLEST_NORM,
            "HAS_SIGNS": kv_format.has_signs,
            "KEY_BITS": kv_format.key_bits,
            "VALUE_BITS": kv_format.bits,
            "NUM_KV_HEADS": case.num_kv_heads,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "MATRIX_ROWS": min(MATRIX_ROWS, case.head_dim),
            "BLOCK_T": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
