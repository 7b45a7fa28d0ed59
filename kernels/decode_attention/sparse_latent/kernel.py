"""Split-KV decode attention over chosen tokens of a latent cache, in the model's dtype and in ``fp8_ds_mla``.

Tile names: b request, h query head within the program's block, n token within a tile, c compressed dimension, r rotary
dimension, s split. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

# ruff: noqa: PLR0915 (four parts of a tile are four of each statement)

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.latent import ROPE_DIM, SCALE_GROUP
from ...launches import Launch
from ..batch import check_decode_inputs
from ..mla.batch import LatentConfig, check_latent_inputs, fp16_query
from ..mla.e4m3 import BITS_FACTOR, codes_for, e4m3_to_fp16
from ..softmax import softmax_step, split_range
from .batch import TopkBatch

FP8_DS_MLA_DIM = 512
WEIGHT_FACTOR = 256.0
"""Lifts weight times scale out of fp16's subnormals: a scale is near 1/100 where values are near 4."""
NOTHING_YET = tl.constexpr(-1e30)
"""Running maximum before the first token; finite, so that a tile of absent tokens gives weights of zero, not NaN."""


@triton.jit
def load_slots(slots_row_ptr, position, end):
    """Load the slots of a tile, -1 beyond the end; call it for the tile after the one that is being computed."""
    return tl.load(slots_row_ptr + position, mask=position < end, other=-1)


@triton.jit
def store_log_sum(lse_ptr, partial_row, top, total, mask):
    """Write log2 of the sum of exponentials, -inf where no token was present."""
    log_sum = tl.where(total > 0.0, top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + partial_row, log_sum, mask=mask)


@triton.jit
def decode_attention_topk_kernel(
    query_ptr,
    latent_ptr,
    slots_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_query_heads,
    topk,
    query_stride_b,
    query_stride_h,
    latent_stride_block,
    latent_stride_token,
    slots_stride_b,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one block of query heads to one split of a request's chosen tokens, in the model's dtype."""
    b = tl.program_id(0)
    s = tl.program_id(2)
    begin, end = split_range(topk, s, NUM_SPLITS, BLOCK_N)

    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, LATENT_DIM)
    r = LATENT_DIM + tl.arange(0, ROPE_DIM)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < num_query_heads
    query_row_ptr = query_ptr + b * query_stride_b + head[:, None] * query_stride_h
    query = tl.load(query_row_ptr + c[None, :], mask=head_mask[:, None], other=0.0)
    query_rope = tl.load(query_row_ptr + r[None, :], mask=head_mask[:, None], other=0.0)

    top = tl.full([BLOCK_H], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    accumulator = tl.zeros([BLOCK_H, LATENT_DIM], tl.float32)
    slots_row_ptr = slots_ptr + b.to(tl.int64) * slots_stride_b
    next_slot = load_slots(slots_row_ptr, begin + n, end)
    for tile in range(begin, end, BLOCK_N):
        slot = next_slot
        next_slot = load_slots(slots_row_ptr, tile + BLOCK_N + n, end)
        block_offset = (slot // BLOCK_SIZE).to(tl.int64) * latent_stride_block
        row_ptr = latent_ptr + block_offset + (slot % BLOCK_SIZE) * latent_stride_token
        mask = slot[:, None] >= 0
        latent = tl.load(row_ptr[:, None] + c[None, :], mask=mask, other=0.0)
        rope = tl.load(row_ptr[:, None] + r[None, :], mask=mask, other=0.0)

        score = tl.dot(query, tl.trans(latent))
        score = tl.dot(query_rope, tl.trans(rope), score) * scale_log2
        score = tl.where(slot[None, :] >= 0, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        accumulator = tl.dot(weight.to(latent.dtype), latent, accumulator * decay[:, None])

    partial_row = (b * num_query_heads + head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / tl.where(total > 0.0, total, 1.0)[:, None]
    mask = head_mask[:, None] & (total > 0.0)[:, None]
    tl.store(partial_ptr + partial_row[:, None] * LATENT_DIM + c[None, :], partial, mask=mask)
    store_log_sum(lse_ptr, partial_row, top, total, head_mask)


@triton.jit
def load_codes(row_ptr, mask, BY_BITS: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr):
    """Load and convert one group of compressed values of a tile, (BLOCK_N, GROUP) in fp16."""
    c = FIRST + tl.arange(0, GROUP)
    if BY_BITS:
        codes = tl.load(row_ptr[:, None] + c[None, :], mask=mask[:, None], other=0)
    else:
        codes = tl.load(row_ptr[:, None] + c[None, :], mask=mask[:, None], other=0.0)
    return e4m3_to_fp16(codes, BY_BITS)


@triton.jit
def decode_attention_topk_fp8_ds_mla_kernel(
    query_fp16_ptr,
    query_ptr,
    latent_ptr,
    latent_scale_ptr,
    rope_ptr,
    slots_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    code_factor,
    value_factor,
    num_query_heads,
    topk,
    query_fp16_stride_b,
    query_fp16_stride_h,
    query_stride_b,
    query_stride_h,
    latent_stride_block,
    latent_stride_token,
    latent_scale_stride_block,
    latent_scale_stride_token,
    rope_stride_block,
    rope_stride_token,
    slots_stride_b,
    GROUP: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """Attend from one block of query heads to one split of a request's chosen tokens, four groups of fp8 each.

    A group's scale multiplies its part of the scores, and the weights before they meet the group's values: no element
    of the tile is scaled.
    """
    b = tl.program_id(0)
    s = tl.program_id(2)
    begin, end = split_range(topk, s, NUM_SPLITS, BLOCK_N)

    n = tl.arange(0, BLOCK_N)
    g = tl.arange(0, GROUP)
    r = tl.arange(0, ROPE_DIM)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < num_query_heads
    query_row_ptr = query_fp16_ptr + b * query_fp16_stride_b + head[:, None] * query_fp16_stride_h + g[None, :]
    query_0 = tl.load(query_row_ptr, mask=head_mask[:, None], other=0.0)
    query_1 = tl.load(query_row_ptr + GROUP, mask=head_mask[:, None], other=0.0)
    query_2 = tl.load(query_row_ptr + 2 * GROUP, mask=head_mask[:, None], other=0.0)
    query_3 = tl.load(query_row_ptr + 3 * GROUP, mask=head_mask[:, None], other=0.0)
    query_rope_ptr = query_ptr + b * query_stride_b + head[:, None] * query_stride_h + 4 * GROUP + r[None, :]
    query_rope = tl.load(query_rope_ptr, mask=head_mask[:, None], other=0.0)

    top = tl.full([BLOCK_H], NOTHING_YET, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    output_0 = tl.zeros([BLOCK_H, GROUP], tl.float32)
    output_1 = tl.zeros([BLOCK_H, GROUP], tl.float32)
    output_2 = tl.zeros([BLOCK_H, GROUP], tl.float32)
    output_3 = tl.zeros([BLOCK_H, GROUP], tl.float32)
    slots_row_ptr = slots_ptr + b.to(tl.int64) * slots_stride_b
    next_slot = load_slots(slots_row_ptr, begin + n, end)
    for tile in range(begin, end, BLOCK_N):
        slot = next_slot
        next_slot = load_slots(slots_row_ptr, tile + BLOCK_N + n, end)
        mask = slot >= 0
        block = (slot // BLOCK_SIZE).to(tl.int64)
        row = slot % BLOCK_SIZE
        code_ptr = latent_ptr + block * latent_stride_block + row * latent_stride_token
        scales_ptr = latent_scale_ptr + block * latent_scale_stride_block + row * latent_scale_stride_token
        rope_row_ptr = rope_ptr + block * rope_stride_block + row * rope_stride_token
        scale_0 = tl.load(scales_ptr, mask=mask, other=0.0) * code_factor
        scale_1 = tl.load(scales_ptr + 1, mask=mask, other=0.0) * code_factor
        scale_2 = tl.load(scales_ptr + 2, mask=mask, other=0.0) * code_factor
        scale_3 = tl.load(scales_ptr + 3, mask=mask, other=0.0) * code_factor
        latent_0 = load_codes(code_ptr, mask, BY_BITS, 0, GROUP)
        latent_1 = load_codes(code_ptr, mask, BY_BITS, GROUP, GROUP)
        latent_2 = load_codes(code_ptr, mask, BY_BITS, 2 * GROUP, GROUP)
        latent_3 = load_codes(code_ptr, mask, BY_BITS, 3 * GROUP, GROUP)
        rope = tl.load(rope_row_ptr[:, None] + r[None, :], mask=mask[:, None], other=0.0)

        score = tl.dot(query_rope, tl.trans(rope))
        score += tl.dot(query_0, tl.trans(latent_0)) * scale_0[None, :]
        score += tl.dot(query_1, tl.trans(latent_1)) * scale_1[None, :]
        score += tl.dot(query_2, tl.trans(latent_2)) * scale_2[None, :]
        score += tl.dot(query_3, tl.trans(latent_3)) * scale_3[None, :]
        score = tl.where(mask[None, :], score * scale_log2, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        lifted = weight * value_factor
        decay = decay[:, None]
        output_0 = tl.dot((lifted * scale_0[None, :]).to(tl.float16), latent_0, output_0 * decay)
        output_1 = tl.dot((lifted * scale_1[None, :]).to(tl.float16), latent_1, output_1 * decay)
        output_2 = tl.dot((lifted * scale_2[None, :]).to(tl.float16), latent_2, output_2 * decay)
        output_3 = tl.dot((lifted * scale_3[None, :]).to(tl.float16), latent_3, output_3 * decay)

    partial_row = (b * num_query_heads + head).to(tl.int64) * NUM_SPLITS + s
    factor = (1.0 / (tl.where(total > 0.0, total, 1.0) * value_factor))[:, None]
    mask = head_mask[:, None] & (total > 0.0)[:, None]
    partial_row_ptr = partial_ptr + partial_row[:, None] * (4 * GROUP) + g[None, :]
    tl.store(partial_row_ptr, output_0 * factor, mask=mask)
    tl.store(partial_row_ptr + GROUP, output_1 * factor, mask=mask)
    tl.store(partial_row_ptr + 2 * GROUP, output_2 * factor, mask=mask)
    tl.store(partial_row_ptr + 3 * GROUP, output_3 * factor, mask=mask)
    store_log_sum(lse_ptr, partial_row, top, total, head_mask)


def check_slots(case: TopkBatch, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError unless the slots fit the case."""
    slots = inputs["slots"]
    if slots.dtype != torch.int32 or slots.shape != (len(case.context_lens), case.topk) or slots.stride(-1) != 1:
        raise ValueError("slots must be int32, (batch, topk), contiguous along topk")


def plan_topk_split(
    case: TopkBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LatentConfig
) -> Launch:
    """Lay out the split kernel over latents in the model's dtype.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    check_latent_inputs(case, inputs, config)
    check_slots(case, inputs)
    query, latent, slots, lse = inputs["query"], inputs["fields"]["latent"], inputs["slots"], buffers["lse"]
    if latent.dtype != query.dtype or latent.shape[-1] != case.head_dim:
        raise ValueError("latent must be head_dim values in the dtype of the query")
    return Launch(
        kernel=decode_attention_topk_kernel,
        grid=(len(query), triton.cdiv(case.num_query_heads, config.block_h), lse.shape[-1]),
        arguments=(
            *(query, latent, slots, buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads, case.topk),
            *query.stride()[:2],
            *latent.stride()[:2],
            slots.stride(0),
        ),
        options={"LATENT_DIM": case.latent_dim, **_shared_options(case, lse, config)},
    )


def plan_topk_fp8_ds_mla_split(
    case: TopkBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LatentConfig
) -> Launch:
    """Lay out the split kernel over ``fp8_ds_mla``.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    check_latent_inputs(case, inputs, config)
    check_slots(case, inputs)
    query, slots, lse = inputs["query"], inputs["slots"], buffers["lse"]
    latent, latent_scale, rope = (inputs["fields"][name] for name in ("latent", "latent_scale", "rope"))
    if case.latent_dim != FP8_DS_MLA_DIM:
        raise ValueError(f"fp8_ds_mla has {FP8_DS_MLA_DIM} compressed values, not {case.latent_dim}")
    if latent.dtype != torch.float8_e4m3fn or latent_scale.dtype != torch.float32 or rope.dtype != query.dtype:
        raise ValueError("latent must be e4m3, its scale float32, and rope in the dtype of the query")
    if not latent_scale.stride(-1) == rope.stride(-1) == 1:
        raise ValueError("scales and rope must be contiguous along their last dimension")
    query_fp16 = fp16_query(inputs)
    latent, code_factor = codes_for(latent, config.e4m3_by_bits)
    return Launch(
        kernel=decode_attention_topk_fp8_ds_mla_kernel,
        grid=(len(query), triton.cdiv(case.num_query_heads, config.block_h), lse.shape[-1]),
        arguments=(
            *(query_fp16, query, latent, latent_scale, rope, slots, buffers["partial"], lse),
            inputs["scale"] * math.log2(math.e),
            # Moved bits bring their own factor of 256, so that either way weight times scale is lifted by it.
            *(code_factor, WEIGHT_FACTOR * (BITS_FACTOR if config.e4m3_by_bits else 1.0)),
            *(case.num_query_heads, case.topk),
            *query_fp16.stride()[:2],
            *query.stride()[:2],
            *latent.stride()[:2],
            *latent_scale.stride()[:2],
            *rope.stride()[:2],
            slots.stride(0),
        ),
        options={
            "GROUP": SCALE_GROUP,
            "BY_BITS": config.e4m3_by_bits,
            **_shared_options(case, lse, config),
        },
    )


def _shared_options(case: TopkBatch, lse: torch.Tensor, config: LatentConfig) -> dict[str, Any]:
    return {
        "ROPE_DIM": ROPE_DIM,
        "BLOCK_SIZE": case.block_size,
        "NUM_SPLITS": lse.shape[-1],
        "BLOCK_H": config.block_h,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
