"""Quantise new K and V to blocks of E2M1 with a one-byte scale, and write them to their slots of the pool.

Tile names: t new token, h KV head, c scale block, e element of a block. Products and sums are not contracted
(``enable_fp_fusion``), so that codes are the reference's to the bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.block_fp4 import E2M1_MAX, BlockFp4
from ...launches import Launch, LaunchConfig
from ..batch import AppendBatch, check_append_inputs


@triton.jit
def encode_e4m3(values):
    """Round non-negative fp32 to E4M3 codes (uint32), ties to even, above 448 to 448, on targets without the type."""
    values = tl.minimum(values, 448.0)
    bits = values.to(tl.uint32, bitcast=True)
    # Keep three mantissa bits, rounded by what is cut off, and change the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 codes count steps of 2^-9; adding 1.5 * 2^23 leaves the rounded count in the low bits.
    subnormal = (values * 512.0 + 12582912.0).to(tl.uint32, bitcast=True) & 0xF
    return tl.where(values < 0.015625, subnormal, normal)


@triton.jit
def encode_e2m1(values):
    """Round fp32 to E2M1 codes (uint8), ties to the even code, magnitudes above 6 to 6."""
    magnitude = tl.minimum(tl.abs(values), 6.0)
    bits = magnitude.to(tl.uint32, bitcast=True)
    # As for E4M3: one mantissa bit, exponent bias 1, and steps of 1/2 below 1.
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - ((127 - 1) << 1)
    subnormal = (magnitude * 2.0 + 12582912.0).to(tl.uint32, bitcast=True) & 0x3
    sign = values.to(tl.uint32, bitcast=True) >> 31
    return (tl.where(magnitude < 1.0, subnormal, normal) | (sign << 3)).to(tl.uint8)


@triton.jit
def encode_blocks(vectors, tensor_scale, inverse_scale, IS_E8M0: tl.constexpr):
    """Encode fp32 blocks (tokens, blocks, elements); give packed bytes (tokens, blocks, elements / 2) and scales."""
    largest = tl.max(tl.abs(vectors), 2)
    if IS_E8M0:
        # The exponent of the largest element, less that of 6 = 1.5 * 2^2.
        exponent = ((largest.to(tl.uint32, bitcast=True) >> 23) & 0xFF).to(tl.int32) - 2
        stored = tl.minimum(tl.maximum(exponent, 1), 254).to(tl.uint32)
        factor = (stored << 23).to(tl.float32, bitcast=True)
    else:
        stored = encode_e4m3(largest * inverse_scale)
        # Shifted by 7, E4M3 is fp16 with an exponent bias of 7 instead of 15.
        factor = (stored << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * tensor_scale
    inverse = tl.where(factor > 0.0, tl.div_rn(1.0, tl.where(factor > 0.0, factor, 1.0)), 0.0)
    code = encode_e2m1(vectors * inverse[:, :, None])
    even, odd = tl.split(tl.reshape(code, [code.shape[0], code.shape[1], code.shape[2] // 2, 2]))
    return even | (odd << 4), stored.to(tl.uint8)


@triton.jit
def append_block_fp4_kernel(
    key_ptr,
    value_ptr,
    slot_mapping_ptr,
    key_page_ptr,
    key_scale_ptr,
    value_page_ptr,
    value_scale_ptr,
    key_tensor_scale,
    key_inverse_scale,
    value_tensor_scale,
    value_inverse_scale,
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
    HEAD_DIM: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    IS_E8M0: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write one head of a tile of tokens, K then V; a token in slot -1 is not written."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    slot = tl.load(slot_mapping_ptr + t, mask=t < num_tokens, other=-1)
    block = slot // BLOCK_SIZE
    row = slot % BLOCK_SIZE
    mask = (slot >= 0)[:, None] & (c[None, :] < HEAD_DIM // SCALE_BLOCK)
    element = c[None, :, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, None, :]
    byte = c[None, :, None] * (SCALE_BLOCK // 2) + tl.arange(0, SCALE_BLOCK // 2)[None, None, :]
    target = (block * page_stride_block + row * page_stride_row + h * page_stride_h)[:, None, None] + byte
    scale_target = (block * scale_stride_block + row * scale_stride_row + h * scale_stride_h)[:, None] + c[None, :]
    t = t.to(tl.int64)

    key_row = (t * key_stride_t + h * key_stride_h)[:, None, None]
    key = tl.load(key_ptr + key_row + element, mask=mask[:, :, None], other=0.0).to(tl.float32)
    packed, stored = encode_blocks(key, key_tensor_scale, key_inverse_scale, IS_E8M0)
    tl.store(key_page_ptr + target, packed, mask=mask[:, :, None])
    tl.store(key_scale_ptr + scale_target, stored, mask=mask)

    value_row = (t * value_stride_t + h * value_stride_h)[:, None, None]
    value = tl.load(value_ptr + value_row + element, mask=mask[:, :, None], other=0.0).to(tl.float32)
    packed, stored = encode_blocks(value, value_tensor_scale, value_inverse_scale, IS_E8M0)
    tl.store(value_page_ptr + target, packed, mask=mask[:, :, None])
    tl.store(value_scale_ptr + scale_target, stored, mask=mask)


def plan_append_block_fp4(
    kv_format: BlockFp4,
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
    if case.head_dim % kv_format.block_elements:
        raise ValueError(f"head_dim must be a multiple of {kv_format.block_elements}")
    codes = buffers["key"], buffers["value"]
    scales = tuple(buffers[name].view(torch.uint8) for name in ("key_scale", "value_scale"))
    for first, second in (codes, scales):
        if first.stride() != second.stride() or first.stride(-1) != 1:
            raise ValueError("fields of K and V must have one stride and be contiguous along the last dimension")
    tensor_scales = [kv_format.tensor_scale(name) for name in ("key", "value")]
    return Launch(
        kernel=append_block_fp4_kernel,
        grid=(triton.cdiv(case.num_tokens, config.block_n), case.num_kv_heads),
        arguments=(
            *(inputs["key"], inputs["value"], inputs["slot_mapping"], codes[0], scales[0], codes[1], scales[1]),
            *(factor for scale in tensor_scales for factor in (scale, 1.0 / (E2M1_MAX * scale))),
            case.num_tokens,
            *inputs["key"].stride()[:2],
            *inputs["value"].stride()[:2],
            *codes[0].stride()[:3],
            *scales[0].stride()[:3],
        ),
        options={
            "HEAD_DIM": case.head_dim,
            "SCALE_BLOCK": kv_format.block_elements,
            "IS_E8M0": kv_format.name == "mxfp4",
            "BLOCK_SIZE": case.block_size,
            "BLOCK_T": config.block_n,
            "BLOCK_C": triton.next_power_of_2(case.head_dim // kv_format.block_elements),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )
