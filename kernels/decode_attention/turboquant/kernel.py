"""Paged split-KV decode attention over vLLM's TurboQuant presets: our layout and kernel.

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

from ...formats.turboquant import FP8_BITS, TurboQuant, slices
from ...launches import Launch, LaunchConfig
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import load_block_ids, softmax_step, split_range
from .planes import cubic_levels, load_slices, raw_codes, raw_unit, table_levels, zero_slices

MIN_SLICE = 16
"""Elements of a slice: the least depth of a 16-bit matrix product."""


@triton.jit
def decode_attention_turboquant_kernel(
    query_ptr,
    key_ptr,
    key_high_ptr,
    key_norm_ptr,
    value_ptr,
    value_high_ptr,
    value_scale_ptr,
    value_zero_ptr,
    levels_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    score_scale,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    page_halves,
    block_table_stride_b,
    ALPHA: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_SLICES: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_SLICES: tl.constexpr,
    FROM_TABLE: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one group of (rotated) query heads to one split of one request; write its output and log2-sum-exp2.

    A block starts `page_halves` times two bytes after the one before it; a field's token and head are contiguous.
    """
    b = tl.program_id(0)
    h = tl.program_id(1)
    split = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), split, NUM_SPLITS, BLOCK_N)
    KEY_SLICE: tl.constexpr = HEAD_DIM // KEY_SLICES
    VALUE_SLICE: tl.constexpr = HEAD_DIM // VALUE_SLICES
    KEY_IS_FP8: tl.constexpr = KEY_SLICES == 1

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    key_w = tl.arange(0, KEY_SLICE)
    value_w = tl.arange(0, VALUE_SLICE)
    query_head = h * GROUP + m
    query_row = b * query_stride_b + query_head * query_stride_h
    query = load_slices(query_ptr + query_row[:, None], m[:, None] < GROUP, KEY_SLICES, KEY_SLICE)
    if FROM_TABLE:
        levels = tl.load(levels_ptr + tl.arange(0, 1 << KEY_BITS))

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    offset = tl.zeros([BLOCK_M], tl.float32)
    accumulators = zero_slices(BLOCK_M, VALUE_SLICES, VALUE_SLICE)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    # Norms, scales and zeros are too narrow for asynchronous copies, so they too are loaded a tile ahead, and block
    # ids two. What is carried must be computed in the loop, or Triton sees a dependence over two passes and pipelines
    # nothing: hence pages, not block ids.
    page = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE).to(tl.int64) * page_halves
    block = load_block_ids(block_table_row_ptr, begin + BLOCK_N + n, end, BLOCK_SIZE)
    row = ((begin + n) % BLOCK_SIZE) * NUM_KV_HEADS + h
    mask = begin + n < end
    norm = tl.load(key_norm_ptr + page + row, mask=mask, other=0.0)
    scale = tl.load(value_scale_ptr + page + row, mask=mask, other=0.0)
    zero = tl.load(value_zero_ptr + page + row, mask=mask, other=0.0)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = (token % BLOCK_SIZE) * NUM_KV_HEADS + h
        mask = token < end
        key_mask = mask[:, None]
        high_offset = (2 * page + row * (HEAD_DIM // 8))[:, None]
        if KEY_IS_FP8:
            key = tl.load(key_ptr + (2 * page + row * HEAD_DIM)[:, None] + key_w[None, :], mask=key_mask, other=0.0)
        else:
            key_row = (page + row * (HEAD_DIM * (KEY_BITS // 2) // 8))[:, None]
            key = tl.load(key_ptr + key_row + key_w[None, :], mask=key_mask, other=0)
        key_high = key
        if KEY_BITS == 3:
            key_high = tl.load(key_high_ptr + high_offset + key_w[None, :], mask=key_mask, other=0).to(tl.uint16)
        value_row = (page + row * (HEAD_DIM * (VALUE_BITS // 2) // 8))[:, None]
        value = tl.load(value_ptr + value_row + value_w[None, :], mask=key_mask, other=0)
        value_high = value
        if VALUE_BITS == 3:
            value_high = tl.load(value_high_ptr + high_offset + value_w[None, :], mask=key_mask, other=0)
            value_high = value_high.to(tl.uint16)

        next_token = token + BLOCK_N
        next_row = (next_token % BLOCK_SIZE) * NUM_KV_HEADS + h
        next_mask = next_token < end
        page = block.to(tl.int64) * page_halves
        block = load_block_ids(block_table_row_ptr, next_token + BLOCK_N, end, BLOCK_SIZE)
        next_scale = tl.load(value_scale_ptr + page + next_row, mask=next_mask, other=0.0)
        next_zero = tl.load(value_zero_ptr + page + next_row, mask=next_mask, other=0.0)

        if KEY_IS_FP8:
            score = tl.dot(query[0], tl.trans(key.to(tl.float16))) * score_scale
        else:
            next_norm = tl.load(key_norm_ptr + page + next_row, mask=next_mask, other=0.0)
            score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(KEY_SLICES):
                if FROM_TABLE:
                    part = table_levels(key, key_high, levels, s, KEY_BITS, BLOCK_N)
                else:
                    part = cubic_levels(key, key_high, s, KEY_BITS, ALPHA)
                score = tl.dot(query[s], tl.trans(part), score)
            score = score * (norm.to(tl.float32) * score_scale)[None, :]
            norm = next_norm
        score = tl.where(mask[None, :], score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        offset = offset * decay + tl.sum(weight * zero.to(tl.float32)[None, :], 1)
        weight = (weight * scale.to(tl.float32)[None, :]).to(tl.float16)
        scale = next_scale
        zero = next_zero
        updated = ()
        for s in tl.static_range(VALUE_SLICES):
            part = raw_codes(value, value_high, s, VALUE_BITS)
            updated = updated + (tl.dot(weight, part, accumulators[s] * decay[:, None]),)
        accumulators = updated

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + split
    partial_mask = (m[:, None] < GROUP) & (begin < end)
    for s in tl.static_range(VALUE_SLICES):
        partial = (accumulators[s] * raw_unit(s, VALUE_BITS) + offset[:, None]) / divisor[:, None]
        partial_offset = partial_row[:, None] * HEAD_DIM + s * VALUE_SLICE + value_w[None, :]
        tl.store(partial_ptr + partial_offset, partial, mask=partial_mask)
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


def plan_turboquant_split(
    kv_format: TurboQuant,
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LaunchConfig,
) -> Launch:
    """Lay out the split kernel; it reads ``rotated_query`` of the buffers, or the query itself where keys are fp8.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    check_sliceable(case.head_dim, kv_format.key_bits, kv_format.value_bits)
    fields, block_table, lse = inputs["fields"], inputs["block_table"], buffers["lse"]
    query = buffers["rotated_query"] if kv_format.rotates_keys else inputs["query"]
    key_slices = slices(kv_format.key_bits) if kv_format.rotates_keys else 1
    from_table = kv_format.rotates_keys and kv_format.codebook_kind == "lloyd_max"
    log2_scale = inputs["scale"] * math.log2(math.e)
    score_scale, alpha = log2_scale, 0.0
    if kv_format.rotates_keys:
        score_scale = log2_scale / math.sqrt(case.head_dim)
        if not from_table:
            alpha = kv_format.codebook.alpha
            score_scale *= kv_format.codebook.beta
    key = fields["key_codes"].view(torch.uint16) if kv_format.rotates_keys else fields["key_codes"]
    value = fields["value_codes"].view(torch.uint16)
    return Launch(
        kernel=decode_attention_turboquant_kernel,
        grid=(len(query), case.num_kv_heads, lse.shape[-1]),
        arguments=(
            *(query, key, fields.get("key_high", key), fields.get("key_norm", fields["value_scale"])),
            *(value, fields.get("value_high", value), fields["value_scale"], fields["value_zero"]),
            buffers["levels"] if from_table else lse,
            *(block_table, inputs["context_lens"], buffers["partial"], lse),
            *(score_scale, case.num_query_heads, *query.stride()[:2]),
            *(page_halves(inputs["pages"]), block_table.stride(0)),
        ),
        options={
            "ALPHA": alpha,
            "KEY_BITS": kv_format.key_bits,
            "KEY_SLICES": key_slices,
            "VALUE_BITS": kv_format.value_bits,
            "VALUE_SLICES": slices(kv_format.value_bits),
            "FROM_TABLE": from_table,
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


def check_sliceable(head_dim: int, *bits: int) -> None:
    """Raise ValueError unless each slice of each plane is deep enough for a matrix product."""
    narrowest = max(slices(width) for width in bits if width != FP8_BITS)
    if head_dim & (head_dim - 1) or head_dim < MIN_SLICE * narrowest:
        raise ValueError(f"head_dim must be a power of two of at least {MIN_SLICE * narrowest}, not {head_dim}")


def page_halves(pages: torch.Tensor) -> int:
    """Units of two bytes from one block to the next.

    Raises
    ------
    ValueError
        If a block has an odd number of bytes, or the pool is not contiguous.
    """
    if not pages.is_contiguous() or pages.shape[-1] % 2:
        raise ValueError("pages must be contiguous blocks of an even number of bytes")
    return pages.shape[-1] // 2
