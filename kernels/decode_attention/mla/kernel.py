"""Paged split-KV decode attention over latents, in the model's dtype or in fp8 with one scale.

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

from ...formats.latent import ROPE_DIM
from ...launches import Launch
from ..batch import MIN_DOT_ROWS, check_decode_inputs
from ..softmax import load_block_ids, softmax_step, split_range
from .batch import LatentBatch, LatentConfig, check_latent_inputs, fp16_query
from .e4m3 import codes_for, e4m3_to_fp16

NUM_PARTS = 4


@triton.jit
def decode_attention_mla_kernel(
    query_ptr,
    latent_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    latent_stride_block,
    latent_stride_token,
    block_table_stride_b,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend from one block of query heads to one split of one request; write its output and log2-sum-exp2.

    The tile of compressed values serves both products: transposed as keys, as it is as values.
    """
    b = tl.program_id(0)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, LATENT_DIM)
    r = LATENT_DIM + tl.arange(0, ROPE_DIM)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head < num_query_heads
    query_row_ptr = query_ptr + b * query_stride_b + head[:, None] * query_stride_h
    query = tl.load(query_row_ptr + c[None, :], mask=head_mask[:, None], other=0.0)
    query_rope = tl.load(query_row_ptr + r[None, :], mask=head_mask[:, None], other=0.0)

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    accumulator = tl.zeros([BLOCK_H, LATENT_DIM], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row_ptr = latent_ptr + block.to(tl.int64) * latent_stride_block + (token % BLOCK_SIZE) * latent_stride_token
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        mask = token[:, None] < end
        latent = tl.load(row_ptr[:, None] + c[None, :], mask=mask, other=0.0)
        rope = tl.load(row_ptr[:, None] + r[None, :], mask=mask, other=0.0)

        score = tl.dot(query, tl.trans(latent))
        score = tl.dot(query_rope, tl.trans(rope), score) * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        accumulator = tl.dot(weight.to(latent.dtype), latent, accumulator * decay[:, None])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    mask = head_mask[:, None] & (begin < end)
    tl.store(partial_ptr + partial_row[:, None] * LATENT_DIM + c[None, :], partial, mask=mask)
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=head_mask)


@triton.jit
def load_codes(row_ptr, mask, first, COUNT: tl.constexpr, BY_BITS: tl.constexpr):
    """Load e4m3 codes of a tile's tokens from the value `first` on, (BLOCK_N, COUNT), and convert them to fp16."""
    value = first + tl.arange(0, COUNT)
    if BY_BITS:
        codes = tl.load(row_ptr[:, None] + value[None, :], mask=mask[:, None], other=0)
    else:
        codes = tl.load(row_ptr[:, None] + value[None, :], mask=mask[:, None], other=0.0)
    return e4m3_to_fp16(codes, BY_BITS)


@triton.jit
def decode_attention_mla_e4m3_kernel(
    query_ptr,
    latent_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    value_scale,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    latent_stride_block,
    latent_stride_token,
    block_table_stride_b,
    PART: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_BITS: tl.constexpr,
):
    """Do as `decode_attention_mla_kernel` does over e4m3, four parts of the compressed values in turn.

    In one part, tile and conversion together need more registers than there are. The query is fp16 already: a cast
    here would make the compiler reload it into registers in every pass of the loop.
    """
    b = tl.program_id(0)
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    n = tl.arange(0, BLOCK_N)
    c = tl.arange(0, PART)
    r = tl.arange(0, ROPE_DIM)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    head_mask = head[:, None] < num_query_heads
    query_row_ptr = query_ptr + b * query_stride_b + head[:, None] * query_stride_h
    query_0 = tl.load(query_row_ptr + c[None, :], mask=head_mask, other=0.0)
    query_1 = tl.load(query_row_ptr + PART + c[None, :], mask=head_mask, other=0.0)
    query_2 = tl.load(query_row_ptr + 2 * PART + c[None, :], mask=head_mask, other=0.0)
    query_3 = tl.load(query_row_ptr + 3 * PART + c[None, :], mask=head_mask, other=0.0)
    query_rope = tl.load(query_row_ptr + 4 * PART + r[None, :], mask=head_mask, other=0.0)

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    output_0 = tl.zeros([BLOCK_H, PART], tl.float32)
    output_1 = tl.zeros([BLOCK_H, PART], tl.float32)
    output_2 = tl.zeros([BLOCK_H, PART], tl.float32)
    output_3 = tl.zeros([BLOCK_H, PART], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row_ptr = latent_ptr + block.to(tl.int64) * latent_stride_block + (token % BLOCK_SIZE) * latent_stride_token
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        mask = token < end
        latent_0 = load_codes(row_ptr, mask, 0, PART, BY_BITS)
        latent_1 = load_codes(row_ptr, mask, PART, PART, BY_BITS)
        latent_2 = load_codes(row_ptr, mask, 2 * PART, PART, BY_BITS)
        latent_3 = load_codes(row_ptr, mask, 3 * PART, PART, BY_BITS)
        rope = load_codes(row_ptr, mask, 4 * PART, ROPE_DIM, BY_BITS)

        score = tl.dot(query_rope, tl.trans(rope))
        score = tl.dot(query_0, tl.trans(latent_0), score)
        score = tl.dot(query_1, tl.trans(latent_1), score)
        score = tl.dot(query_2, tl.trans(latent_2), score)
        score = tl.dot(query_3, tl.trans(latent_3), score)
        score = tl.where(mask[None, :], score * scale_log2, float("-inf"))
        weight, decay, top, total = softmax_step(score, top, total)
        weight = weight.to(tl.float16)
        decay = decay[:, None]
        output_0 = tl.dot(weight, latent_0, output_0 * decay)
        output_1 = tl.dot(weight, latent_1, output_1 * decay)
        output_2 = tl.dot(weight, latent_2, output_2 * decay)
        output_3 = tl.dot(weight, latent_3, output_3 * decay)

    divisor = tl.where(total > 0.0, total, 1.0)
    factor = (value_scale / divisor)[:, None]
    partial_row = (b * num_query_heads + head).to(tl.int64) * NUM_SPLITS + s
    partial_row_ptr = partial_ptr + partial_row[:, None] * (4 * PART) + c[None, :]
    mask = head_mask & (begin < end)
    tl.store(partial_row_ptr, output_0 * factor, mask=mask)
    tl.store(partial_row_ptr + PART, output_1 * factor, mask=mask)
    tl.store(partial_row_ptr + 2 * PART, output_2 * factor, mask=mask)
    tl.store(partial_row_ptr + 3 * PART, output_3 * factor, mask=mask)
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=head < num_query_heads)


def plan_mla_split(
    case: LatentBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LatentConfig
) -> Launch:
    """Lay out the split kernel over latents in the model's dtype.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    check_latent_inputs(case, inputs, config)
    query, latent = inputs["query"], inputs["fields"]["latent"]
    if latent.dtype != query.dtype or latent.shape[-1] != case.head_dim:
        raise ValueError("latent must be head_dim values in the dtype of the query")
    return _launch(
        decode_attention_mla_kernel,
        case,
        (query, latent),
        inputs,
        buffers,
        config,
        factors=(inputs["scale"] * math.log2(math.e),),
        options={"LATENT_DIM": case.latent_dim},
    )


def plan_mla_e4m3_split(
    case: LatentBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LatentConfig,
    latent_scale: float,
) -> Launch:
    """Lay out the split kernel over e4m3; `latent_scale` is what a stored value is multiplied by.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    check_latent_inputs(case, inputs, config)
    query, latent = fp16_query(inputs), inputs["fields"]["latent"]
    if latent.dtype != torch.float8_e4m3fn or latent.shape[-1] != case.head_dim:
        raise ValueError("latent must be head_dim values of e4m3")
    if case.latent_dim < NUM_PARTS * MIN_DOT_ROWS:
        raise ValueError(f"latent_dim must be at least {NUM_PARTS * MIN_DOT_ROWS}")
    latent, factor = codes_for(latent, config.e4m3_by_bits)
    value_scale = latent_scale * factor
    return _launch(
        decode_attention_mla_e4m3_kernel,
        case,
        (query, latent),
        inputs,
        buffers,
        config,
        factors=(inputs["scale"] * math.log2(math.e) * value_scale, value_scale),
        options={"PART": case.latent_dim // NUM_PARTS, "BY_BITS": config.e4m3_by_bits},
    )


def _launch(
    kernel: Any,
    case: LatentBatch,
    tensors: tuple[torch.Tensor, torch.Tensor],
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LatentConfig,
    *,
    factors: tuple[float, ...],
    options: dict[str, Any],
) -> Launch:
    query, latent = tensors
    block_table, lse = inputs["block_table"], buffers["lse"]
    return Launch(
        kernel=kernel,
        grid=(len(query), triton.cdiv(case.num_query_heads, config.block_h), lse.shape[-1]),
        arguments=(
            *(query, latent, block_table, inputs["context_lens"], buffers["partial"], lse),
            *(*factors, case.num_query_heads),
            *query.stride()[:2],
            *latent.stride()[:2],
            block_table.stride(0),
        ),
        options=options
        | {
            "ROPE_DIM": ROPE_DIM,
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_H": config.block_h,
            "BLOCK_N": config.block_n,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
