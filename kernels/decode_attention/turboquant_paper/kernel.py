"""Paged split-KV decode attention over keys and values of the TurboQuant paper's Algorithm 1 or 2.

Tile names: b request, h KV head, m query head within its group, n token within a tile, w element within a slice,
s slice (`split` for the split). Suffix `_ptr`: pointer. Upper case: compile-time.
"""

# Compile-time locals are upper case; Triton builds tuples by addition; a kernel is one long loop.
# ruff: noqa: C901, N806, PLR0912, PLR0915, RUF005

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.turboquant import TurboQuantPaper, slices
from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import load_block_ids, softmax_step, split_range
from ..turboquant.kernel import check_sliceable, page_halves
from ..turboquant.planes import cubic_levels, load_slices, sign_scores, zero_slices


@triton.jit
def load_high(high_ptr, offset, mask, WIDTH: tl.constexpr):
    """Load rows of a 1-bit plane, one byte per 16-bit lane."""
    w = tl.arange(0, WIDTH)
    return tl.load(high_ptr + offset[:, None] + w[None, :], mask=mask[:, None], other=0).to(tl.uint16)


@triton.jit
def decode_attention_turboquant_paper_kernel(
    query_ptr,
    projected_ptr,
    key_ptr,
    key_high_ptr,
    key_signs_ptr,
    key_norm_ptr,
    key_residual_norm_ptr,
    value_ptr,
    value_high_ptr,
    value_norm_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    level_scale,
    sign_scale,
    value_scale,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    page_halves,
    block_table_stride_b,
    KEY_ALPHA: tl.constexpr,
    VALUE_ALPHA: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_SLICES: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_SLICES: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one group of rotated query heads to one split of one request; write its rotated output and lse.

    A block starts `page_halves` times two bytes after the one before it; a field's token and head are contiguous.
    """
    b = tl.program_id(0)
    h = tl.program_id(1)
    split = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), split, NUM_SPLITS, BLOCK_N)
    KEY_SLICE: tl.constexpr = HEAD_DIM // KEY_SLICES
    VALUE_SLICE: tl.constexpr = HEAD_DIM // VALUE_SLICES
    BIT_SLICE: tl.constexpr = HEAD_DIM // 8

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    key_w = tl.arange(0, KEY_SLICE)
    value_w = tl.arange(0, VALUE_SLICE)
    query_head = h * GROUP + m
    query_row = (b * query_stride_b + query_head * query_stride_h)[:, None]
    query = load_slices(query_ptr + query_row, m[:, None] < GROUP, KEY_SLICES, KEY_SLICE)
    if HAS_SIGNS:
        projected = load_slices(projected_ptr + query_row, m[:, None] < GROUP, 8, BIT_SLICE)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulators = zero_slices(BLOCK_M, VALUE_SLICES, VALUE_SLICE)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    # Norms a tile ahead and block ids two; pages, not block ids, are carried: see turboquant/kernel.py.
    page = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE).to(tl.int64) * page_halves
    block = load_block_ids(block_table_row_ptr, begin + BLOCK_N + n, end, BLOCK_SIZE)
    row = ((begin + n) % BLOCK_SIZE) * NUM_KV_HEADS + h
    mask = begin + n < end
    key_norm = tl.load(key_norm_ptr + page + row, mask=mask, other=0.0)
    value_norm = tl.load(value_norm_ptr + page + row, mask=mask, other=0.0)
    if HAS_SIGNS:
        residual_norm = tl.load(key_residual_norm_ptr + page + row, mask=mask, other=0.0)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = (token % BLOCK_SIZE) * NUM_KV_HEADS + h
        mask = token < end
        bit_offset = 2 * page + row * BIT_SLICE
        if KEY_BITS == 1:
            key = load_high(key_ptr, bit_offset, mask, BIT_SLICE)
        else:
            key_row = (page + row * (HEAD_DIM * (KEY_BITS // 2) // 8))[:, None]
            key = tl.load(key_ptr + key_row + key_w[None, :], mask=mask[:, None], other=0)
        key_high = key
        if KEY_BITS == 3:
            key_high = load_high(key_high_ptr, bit_offset, mask, BIT_SLICE)
        if HAS_SIGNS:
            signs = load_high(key_signs_ptr, bit_offset, mask, BIT_SLICE)
        value_row = (page + row * (HEAD_DIM * (VALUE_BITS // 2) // 8))[:, None]
        value = tl.load(value_ptr + value_row + value_w[None, :], mask=mask[:, None], other=0)
        value_high = value
        if VALUE_BITS == 3:
            value_high = load_high(value_high_ptr, bit_offset, mask, BIT_SLICE)

        next_token = token + BLOCK_N
        next_row = (next_token % BLOCK_SIZE) * NUM_KV_HEADS + h
        next_mask = next_token < end
        page = block.to(tl.int64) * page_halves
        block = load_block_ids(block_table_row_ptr, next_token + BLOCK_N, end, BLOCK_SIZE)
        next_key_norm = tl.load(key_norm_ptr + page + next_row, mask=next_mask, other=0.0)
        next_value_norm = tl.load(value_norm_ptr + page + next_row, mask=next_mask, other=0.0)

        if KEY_BITS == 1:
            score = sign_scores(query, key)
        else:
            score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(KEY_SLICES):
                part = cubic_levels(key, key_high, s, KEY_BITS, KEY_ALPHA)
                score = tl.dot(query[s], tl.trans(part), score)
        score = score * (key_norm.to(tl.float32) * level_scale)[None, :]
        if HAS_SIGNS:
            sign_score = sign_scores(projected, signs)
            score += sign_score * (residual_norm.to(tl.float32) * sign_scale)[None, :]
            residual_norm = tl.load(key_residual_norm_ptr + page + next_row, mask=next_mask, other=0.0)
        score = tl.where(mask[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        weight = (weight * value_norm.to(tl.float32)[None, :]).to(tl.float16)
        key_norm = next_key_norm
        value_norm = next_value_norm
        updated = ()
        for s in tl.static_range(VALUE_SLICES):
            part = cubic_levels(value, value_high, s, VALUE_BITS, VALUE_ALPHA)
            updated = updated + (tl.dot(weight, part, accumulators[s] * decay[:, None]),)
        accumulators = updated

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + split
    partial_mask = (m[:, None] < GROUP) & (begin < end)
    for s in tl.static_range(VALUE_SLICES):
        partial = accumulators[s] * (value_scale / divisor)[:, None]
        partial_offset = partial_row[:, None] * HEAD_DIM + s * VALUE_SLICE + value_w[None, :]
        tl.store(partial_ptr + partial_offset, partial, mask=partial_mask)
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_turboquant_paper_split(
    kv_format: TurboQuantPaper,
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the split kernel; it reads ``rotated_query`` and, for Algorithm 2, ``projected_query`` of the buffers.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    check_sliceable(case.head_dim, kv_format.key_bits, kv_format.bits, *([1] if kv_format.has_signs else []))
    fields, block_table, lse = inputs["fields"], inputs["block_table"], buffers["lse"]
    query = buffers["rotated_query"]
    key_codebook, value_codebook = kv_format.key_codebook, kv_format.value_codebook
    log2_scale, root = inputs["scale"] * math.log2(math.e), math.sqrt(case.head_dim)
    # `sign_scores` gives halves.
    key_level = 2 * key_codebook.levels[1] if key_codebook.beta is None else key_codebook.beta
    sign_scale = 2 * log2_scale * math.sqrt(math.pi / 2) / case.head_dim
    key = fields["key_codes"] if kv_format.key_bits == 1 else fields["key_codes"].view(torch.uint16)
    value = fields["value_codes"].view(torch.uint16)
    return Launch(
        kernel=decode_attention_turboquant_paper_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, buffers.get("projected_query", query)),
            *(key, fields.get("key_high", key), fields.get("key_signs", key)),
            *(fields["key_norm"], fields.get("key_residual_norm", fields["key_norm"])),
            *(value, fields.get("value_high", value), fields["value_norm"]),
            *(block_table, inputs["context_lens"], buffers["partial"], lse),
            *(log2_scale * key_level / root, sign_scale, value_codebook.beta / root),
            *(case.num_query_heads, *query.stride()[:2]),
            *(page_halves(inputs["pages"]), block_table.stride(0)),
        ),
        options={
            "KEY_ALPHA": key_codebook.alpha or 0.0,
            "VALUE_ALPHA": value_codebook.alpha,
            "KEY_BITS": kv_format.key_bits,
            "KEY_SLICES": slices(kv_format.key_bits),
            "VALUE_BITS": kv_format.bits,
            "VALUE_SLICES": slices(kv_format.bits),
            "HAS_SIGNS": kv_format.has_signs,
            "GROUP": case.group,
            "NUM_KV_HEADS": case.num_kv_heads,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(case.group)),
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
