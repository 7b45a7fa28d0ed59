"""Quantise new K and V to ggml blocks, and write codes, fifth bits and steps to their slots of the pool.

Tile names: t new token, h KV head, c block of 32 elements, e element of a block. Products and sums are not contracted
(``enable_fp_fusion``), so that codes are the reference's to the bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.ggml import BLOCK, Ggml
from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs


@triton.jit
def inverse_of(step):
    """Give 1 / step, and 0 where the step is 0."""
    return tl.where(step == 0.0, 0.0, tl.div_rn(1.0, tl.where(step == 0.0, 1.0, step)))


@triton.jit
def quantise_blocks(blocks, BITS: tl.constexpr):
    """Quantise fp32 blocks, (tokens, blocks, 32); give codes from 0 up (int32), fp32 steps and minima."""
    e = tl.arange(0, 32)[None, None, :]
    magnitude = tl.abs(blocks)
    largest = tl.max(magnitude, 2)
    if BITS == 8:
        step = tl.div_rn(largest, 127.0)
        scaled = magnitude * inverse_of(step)[:, :, None]
        # Halves away from zero: added to what is left over, not to the number, which the sum could lift to a half.
        whole = scaled.to(tl.int32)
        whole += (scaled - whole.to(tl.float32) >= 0.5).to(tl.int32)
        return tl.where(blocks < 0.0, -whole, whole) + 128, step, step
    elif BITS == 5:
        least = tl.min(blocks, 2)
        step = tl.div_rn(tl.max(blocks, 2) - least, 31.0)
        scaled = (blocks - least[:, :, None]) * inverse_of(step)[:, :, None] + 0.5
        return tl.minimum(scaled.to(tl.int32), 31), step, least
    else:
        # The first element of largest magnitude, with its sign.
        place = tl.min(tl.where(magnitude == largest[:, :, None], e, 32), 2)
        step = tl.sum(tl.where(e == place[:, :, None], blocks, 0.0), 2) * -0.125
        scaled = blocks * inverse_of(step)[:, :, None] + 8.5
        return tl.minimum(scaled.to(tl.int32), 15), step, step


@triton.jit
def write_vectors(
    vectors_ptr,
    row,
    mask,
    code_ptr,
    code_row,
    high_ptr,
    high_row,
    scale_ptr,
    scale_row,
    BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Encode and write one vector per token; mask (tokens, blocks)."""
    c = tl.arange(0, BLOCK_C)[None, :]
    e = tl.arange(0, 32)
    element = c[:, :, None] * 32 + e[None, None, :]
    blocks = tl.load(vectors_ptr + row[:, None, None] + element, mask=mask[:, :, None], other=0.0).to(tl.float32)
    code, step, least = quantise_blocks(blocks, BITS)
    if BITS == 8:
        tl.store(code_ptr + code_row[:, None, None] + element, code.to(tl.uint8), mask=mask[:, :, None])
    else:
        halves = tl.permute(tl.reshape(code & 15, [code.shape[0], BLOCK_C, 2, 16]), (0, 1, 3, 2))
        low, high = tl.split(halves)
        byte = c[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
        packed = (low | (high << 4)).to(tl.uint8)
        tl.store(code_ptr + code_row[:, None, None] + byte, packed, mask=mask[:, :, None])
    if BITS == 5:
        # The places of `kernels.formats.ggml`.
        place = e % 4 // 2 * 16 + e % 16 // 4 * 4 + e % 2 * 2 + e // 16
        tl.store(high_ptr + high_row[:, None] + c, tl.sum((code >> 4) << place[None, None, :], 2), mask=mask)
        tl.store(scale_ptr + scale_row[:, None] + 2 * c, step.to(tl.float16), mask=mask)
        tl.store(scale_ptr + scale_row[:, None] + 2 * c + 1, least.to(tl.float16), mask=mask)
    else:
        tl.store(scale_ptr + scale_row[:, None] + c, step.to(tl.float16), mask=mask)


@triton.jit
def append_ggml_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    key_page_ptr,
    key_high_ptr,
    key_scale_ptr,
    value_page_ptr,
    value_high_ptr,
    value_scale_ptr,
    num_tokens,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    page_stride_block,
    page_stride_row,
    page_stride_h,
    high_stride_block,
    high_stride_row,
    high_stride_h,
    scale_stride_block,
    scale_stride_row,
    scale_stride_h,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write one head of a tile of tokens, K then V; a token in slot -1 is not written."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    block = slot // BLOCK_SIZE
    row = slot % BLOCK_SIZE
    mask = (slot >= 0)[:, None] & (tl.arange(0, BLOCK_C)[None, :] < HEAD_DIM // 32)
    page_row = block * page_stride_block + row * page_stride_row + h * page_stride_h
    high_row = block * high_stride_block + row * high_stride_row + h * high_stride_h
    scale_row = block * scale_stride_block + row * scale_stride_row + h * scale_stride_h
    t = t.to(tl.int64)
    key_row = t * key_stride_t + h * key_stride_h
    write_vectors(
        key_ptr, key_row, mask, key_page_ptr, page_row, key_high_ptr, high_row, key_scale_ptr, scale_row, BITS, BLOCK_C
    )
    value_row = t * value_stride_t + h * value_stride_h
    write_vectors(
        *(value_ptr, value_row, mask, value_page_ptr, page_row, value_high_ptr, high_row, value_scale_ptr, scale_row),
        BITS,
        BLOCK_C,
    )


def plan_append_ggml(
    kv_format: Ggml,
    case: AppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the launch over tiles of ``config.block_n`` tokens.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_append_inputs(case, inputs)
    if case.head_dim % BLOCK:
        raise ValueError(f"head_dim must be a multiple of {BLOCK}")
    suffixes = ("", "_high" if kv_format.bits == 5 else "", "_scale")
    keys, values = (tuple(buffers[vector + suffix] for suffix in suffixes) for vector in ("key", "value"))
    for key, value in zip(keys, values, strict=True):
        if key.stride() != value.stride() or key.stride(-1) != 1:
            raise ValueError("fields of K and V must have one stride and be contiguous along the last dimension")
    return Launch(
        kernel=append_ggml_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(inputs["key"], inputs["value"], inputs["slot_mapping"], *keys, *values, case.num_tokens),
            *inputs["key"].stride()[:2],
            *inputs["value"].stride()[:2],
            *(stride for field in keys for stride in field.stride()[:3]),
        ),
        options={
            "HEAD_DIM": case.head_dim,
            "BITS": kv_format.bits,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "BLOCK_C": triton.next_power_of_2(case.head_dim // BLOCK),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )
