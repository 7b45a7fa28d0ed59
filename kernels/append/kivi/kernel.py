"""Append to KIVI's residual ring and quantise the groups that leave it, in one launch.

The ring holds 32-token groups by turns. A program takes one group of positions that gains tokens: if the group starts
with this append, it first quantises the group that is 128 tokens older, whose rows the new tokens take over. So no
program writes a row that another reads.

Tile names: b request, h KV head, r row of a group, d dimension, c group of 32 channels, w 32-bit word. Products and
sums are not contracted (``enable_fp_fusion``), so that codes are the reference's to the bit.
"""

# Compile-time sizes are upper case, and a fused kernel is long.
# ruff: noqa: N806, PLR0915

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.kivi.kernel import packed_length
from ...formats.kivi import GROUP, Kivi
from ...launches import Launch, LaunchConfig
from .batch import ResidualAppendBatch, layout_of


@triton.jit
def scale_and_zero(least, largest, BITS: tl.constexpr):
    """Give fp16 scale and zero point, and the scale's fp32 inverse (0 where all values are equal)."""
    scale = tl.div_rn(largest - least, 2.0**BITS - 1.0).to(tl.float16)
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0.0, tl.div_rn(1.0, tl.where(step > 0.0, step, 1.0)), 0.0)
    return scale, least.to(tl.float16), inverse


@triton.jit
def round_and_pack(scaled, BITS: tl.constexpr):
    """Round codes (rows, channels), ties to even, and pack them `interleaved` to int32 words.

    Adding 1.5 * 2^23 leaves the rounded code in the low bits of an fp32.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    clamped = tl.minimum(tl.maximum(scaled, 0.0), 2.0**BITS - 1.0)
    code = (clamped + 12582912.0).to(tl.int32, bitcast=True) & (2**BITS - 1)
    place = tl.arange(0, PER_WORD)
    shifted = (
        tl.reshape(code, [code.shape[0], code.shape[1] // PER_WORD, PER_WORD])
        << (place % 2 * 16 + place // 2 * BITS)[None, None, :]
    )
    return tl.sum(shifted, 2)


@triton.jit
def append_kivi_kernel(
    key_ptr,
    value_ptr,
    query_start_ptr,
    context_lens_ptr,
    residual_key_ptr,
    residual_value_ptr,
    residual_index_ptr,
    block_table_ptr,
    key_code_ptr,
    key_scale_ptr,
    key_zero_ptr,
    value_code_ptr,
    value_scale_ptr,
    value_zero_ptr,
    new_stride_t,
    new_stride_h,
    residual_stride_b,
    residual_stride_token,
    residual_stride_h,
    block_table_stride_b,
    code_stride_block,
    code_stride_token,
    code_stride_h,
    key_scale_stride_block,
    key_scale_stride_group,
    key_scale_stride_h,
    value_scale_stride_block,
    value_scale_stride_token,
    value_scale_stride_h,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Handle one group of positions of one request and head."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    before = tl.load(context_lens_ptr + b)
    start = tl.load(query_start_ptr + b)
    after = before + tl.load(query_start_ptr + b + 1) - start
    group = before // 32 + tl.program_id(2)
    if group * 32 >= after:
        return
    BLOCK_W: tl.constexpr = BLOCK_D * BITS // 32
    BLOCK_C: tl.constexpr = BLOCK_D // 32
    r = tl.arange(0, 32)
    d = tl.arange(0, BLOCK_D)
    new_row = h * new_stride_h
    ring_row = tl.load(residual_index_ptr + b).to(tl.int64) * residual_stride_b + h * residual_stride_h

    leaving = group - RESIDUAL // 32
    if (leaving >= 0) & (group * 32 >= before):
        position = leaving * 32 + r
        channel_mask = (d < HEAD_DIM)[None, :]
        is_new = position[:, None] >= before
        ring_offset = ring_row + (position % RESIDUAL)[:, None] * residual_stride_token + d[None, :]
        new_offset = new_row + (start + position - before).to(tl.int64)[:, None] * new_stride_t + d[None, :]
        page = tl.load(block_table_ptr + b.to(tl.int64) * block_table_stride_b + leaving * 32 // BLOCK_SIZE)
        page = page.to(tl.int64)
        first_row = leaving * 32 % BLOCK_SIZE
        word = tl.arange(0, BLOCK_W)
        code_row = page * code_stride_block + (first_row + r) * code_stride_token + h * code_stride_h
        word_mask = (word < HEAD_DIM * BITS // 32)[None, :]

        old_key = tl.load(residual_key_ptr + ring_offset, mask=channel_mask & ~is_new, other=0.0)
        new_key = tl.load(key_ptr + new_offset, mask=channel_mask & is_new, other=0.0)
        key = tl.where(is_new, new_key, old_key).to(tl.float32)
        scale, zero, inverse = scale_and_zero(tl.min(key, 0), tl.max(key, 0), BITS)
        words = round_and_pack((key - zero.to(tl.float32)[None, :]) * inverse[None, :], BITS)
        tl.store(key_code_ptr + code_row[:, None] + word[None, :], words, mask=word_mask)
        scale_row = page * key_scale_stride_block + first_row // 32 * key_scale_stride_group + h * key_scale_stride_h
        tl.store(key_scale_ptr + scale_row + d, scale, mask=d < HEAD_DIM)
        tl.store(key_zero_ptr + scale_row + d, zero, mask=d < HEAD_DIM)

        old_value = tl.load(residual_value_ptr + ring_offset, mask=channel_mask & ~is_new, other=0.0)
        new_value = tl.load(value_ptr + new_offset, mask=channel_mask & is_new, other=0.0)
        value = tl.reshape(tl.where(is_new, new_value, old_value).to(tl.float32), [32, BLOCK_C, 32])
        scale, zero, inverse = scale_and_zero(tl.min(value, 2), tl.max(value, 2), BITS)
        scaled = (value - zero.to(tl.float32)[:, :, None]) * inverse[:, :, None]
        words = round_and_pack(tl.reshape(scaled, [32, BLOCK_D]), BITS)
        tl.store(value_code_ptr + code_row[:, None] + word[None, :], words, mask=word_mask)
        c = tl.arange(0, BLOCK_C)
        scale_row = page * value_scale_stride_block + (first_row + r) * value_scale_stride_token
        scale_offset = (scale_row + h * value_scale_stride_h)[:, None] + c[None, :]
        scale_mask = (c < HEAD_DIM // 32)[None, :]
        tl.store(value_scale_ptr + scale_offset, scale, mask=scale_mask)
        tl.store(value_zero_ptr + scale_offset, zero, mask=scale_mask)
        # The rows that were read are written below, perhaps by other threads.
        tl.debug_barrier()

    if group * 32 >= packed_length(after, RESIDUAL):
        position = group * 32 + r
        mask = ((position >= before) & (position < after))[:, None] & (d < HEAD_DIM)[None, :]
        ring_offset = ring_row + (position % RESIDUAL)[:, None] * residual_stride_token + d[None, :]
        new_offset = new_row + (start + position - before).to(tl.int64)[:, None] * new_stride_t + d[None, :]
        tl.store(residual_key_ptr + ring_offset, tl.load(key_ptr + new_offset, mask=mask, other=0.0), mask=mask)
        tl.store(residual_value_ptr + ring_offset, tl.load(value_ptr + new_offset, mask=mask, other=0.0), mask=mask)


def plan_append_kivi(
    kv_format: Kivi,
    case: ResidualAppendBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the launch: a program per request, head and 32 positions that gain tokens.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    key, value = inputs["key"], inputs["value"]
    fields = {field.name: buffers[field.name] for field in layout_of(kv_format, case).fields}
    rings = buffers["residual_key"], buffers["residual_value"]
    batch = len(case.context_lens)
    requirements = {
        "the kernel packs words interleaved": kv_format.packing == "interleaved",
        "key and value must be (num_tokens, num_kv_heads, head_dim) of one stride": key.shape
        == value.shape
        == (case.num_tokens, case.num_kv_heads, case.head_dim)
        and key.stride() == value.stride(),
        "rings must be (slots, residual_tokens, num_kv_heads, head_dim) of one stride": rings[0].shape[1:]
        == (kv_format.residual_tokens, case.num_kv_heads, case.head_dim)
        and rings[0].stride() == rings[1].stride(),
        "key, value and rings must have one dtype": key.dtype == value.dtype == rings[0].dtype == rings[1].dtype,
        "query_start, context_lens and residual_index must be int32 of the batch": all(
            inputs[name].dtype == torch.int32 and len(inputs[name]) == batch + extra
            for name, extra in (("query_start", 1), ("context_lens", 0), ("residual_index", 0))
        ),
        "block_table must be int32, contiguous along the blocks": inputs["block_table"].dtype == torch.int32
        and inputs["block_table"].stride(-1) == 1,
        "tensors must be contiguous along the last dimension": all(
            tensor.stride(-1) == 1 for tensor in (key, value, *rings, *fields.values())
        ),
        "fields of K and V must have one stride": fields["key"].stride() == fields["value"].stride()
        and fields["key_scale"].stride() == fields["key_zero"].stride()
        and fields["value_scale"].stride() == fields["value_zero"].stride(),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    most_groups = max(
        -(-(before + new) // GROUP) - before // GROUP
        for before, new in zip(case.context_lens, case.new_tokens, strict=True)
    )
    return Launch(
        kernel=append_kivi_kernel,
        grid=(batch, case.num_kv_heads, max(1, most_groups)),
        arguments=(
            *(key, value, inputs["query_start"], inputs["context_lens"], *rings),
            *(inputs["residual_index"], inputs["block_table"], *fields.values()),
            *key.stride()[:2],
            *rings[0].stride()[:3],
            inputs["block_table"].stride(0),
            *fields["key"].stride()[:3],
            *fields["key_scale"].stride()[:3],
            *fields["value_scale"].stride()[:3],
        ),
        options={
            "BITS": kv_format.bits,
            "RESIDUAL": kv_format.residual_tokens,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": False,
        },
    )
