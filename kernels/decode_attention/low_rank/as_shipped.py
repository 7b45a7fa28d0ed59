"""Scores, softmax and values as Palu ships them: rebuild K per query head, multiply and sum on the CUDA cores.

The shape of the code is that of ``kernel/abx_rope.py`` in shadowpa0327/Palu: one program per query head and run of
tokens, cosines and sines computed in the kernel, scores written to memory. What differs: the cache is paged, contexts
are ragged, the base of RoPE is ours, and softmax and values, which Palu leaves to torch, are a second kernel.

Tile names: b request, h query head, n token within a tile, d dimension of half a head, k and v coordinate of K and V.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.low_rank import LowRank
from ...launches import Launch
from ..batch import DecodeBatch, check_decode_inputs
from .batch import LowRankConfig
from .rope import ROPE_BASE


@triton.jit
def palu_scores_kernel(
    query_ptr,
    key_ptr,
    key_basis_ptr,
    block_table_ptr,
    context_lens_ptr,
    scores_ptr,
    scale,
    rope_step_log2,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_g,
    key_basis_stride_g,
    key_basis_stride_k,
    block_table_stride_b,
    scores_stride_b,
    scores_stride_h,
    key_rank,
    GROUP_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the scores of one query head and one tile of tokens; keys and the rotation are rounded to 16 bits."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    kv_head = h // GROUP
    g = kv_head // GROUP_HEADS
    context = tl.load(context_lens_ptr + b)
    token = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = token < context
    d = tl.arange(0, BLOCK_D)
    d_mask = d < HALF_DIM
    k = tl.arange(0, BLOCK_K)
    block = tl.load(block_table_ptr + b * block_table_stride_b + token // BLOCK_SIZE, mask=n_mask, other=0)
    offset = block.to(tl.int64) * key_stride_block + (token % BLOCK_SIZE) * key_stride_token + g * key_stride_g
    basis_column = (kv_head % GROUP_HEADS) * (2 * HALF_DIM)
    basis_ptr = key_basis_ptr + g * key_basis_stride_g + basis_column + k[:, None] * key_basis_stride_k + d[None, :]

    low = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    high = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, key_rank, BLOCK_K):
        k_mask = first + k < key_rank
        key = tl.load(key_ptr + offset[:, None] + first + k[None, :], mask=n_mask[:, None] & k_mask[None, :], other=0.0)
        basis_row_ptr = basis_ptr + first * key_basis_stride_k
        basis_mask = k_mask[:, None] & d_mask[None, :]
        low = tl.dot(key, tl.load(basis_row_ptr, mask=basis_mask, other=0.0), low)
        high = tl.dot(key, tl.load(basis_row_ptr + HALF_DIM, mask=basis_mask, other=0.0), high)

    dtype = key_ptr.dtype.element_ty
    angle = token[:, None].to(tl.float32) * tl.exp2(d.to(tl.float32) * rope_step_log2)[None, :]
    cosine = tl.cos(angle).to(dtype)
    sine = tl.sin(angle).to(dtype)
    low = low.to(dtype)
    high = high.to(dtype)
    rotated_low = low * cosine - high * sine
    rotated_high = high * cosine + low * sine
    query_row_ptr = query_ptr + b * query_stride_b + h * query_stride_h + d
    query_low = tl.load(query_row_ptr, mask=d_mask, other=0.0)
    query_high = tl.load(query_row_ptr + HALF_DIM, mask=d_mask, other=0.0)
    score = tl.sum((query_low[None, :] * rotated_low).to(tl.float32), 1)
    score += tl.sum((query_high[None, :] * rotated_high).to(tl.float32), 1)
    scores_row_ptr = scores_ptr + b.to(tl.int64) * scores_stride_b + h * scores_stride_h
    tl.store(scores_row_ptr + token, score * scale, mask=n_mask)


@triton.jit
def palu_values_kernel(
    scores_ptr,
    value_ptr,
    block_table_ptr,
    context_lens_ptr,
    coordinates_ptr,
    scores_stride_b,
    scores_stride_h,
    value_stride_block,
    value_stride_token,
    value_stride_g,
    block_table_stride_b,
    coordinates_stride_b,
    coordinates_stride_h,
    HEADS_PER_GROUP: tl.constexpr,
    VALUE_RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sum the coordinates of V of one query head's tokens, weighted by the softmax of its scores."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    context = tl.load(context_lens_ptr + b)
    n = tl.arange(0, BLOCK_N)
    v = tl.arange(0, BLOCK_V)
    scores_row_ptr = scores_ptr + b.to(tl.int64) * scores_stride_b + h * scores_stride_h
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for tile in range(0, context, BLOCK_N):
        top = tl.maximum(top, tl.load(scores_row_ptr + tile + n, mask=tile + n < context, other=float("-inf")))
    highest = tl.max(top, 0)

    total = tl.zeros([BLOCK_N], tl.float32)
    accumulator = tl.zeros([BLOCK_V], tl.float32)
    for tile in range(0, context, BLOCK_N):
        token = tile + n
        mask = token < context
        score = tl.load(scores_row_ptr + token, mask=mask, other=float("-inf"))
        weight = tl.exp2((score - highest) * 1.4426950408889634)
        total += weight
        block = tl.load(block_table_ptr + b * block_table_stride_b + token // BLOCK_SIZE, mask=mask, other=0)
        row = token % BLOCK_SIZE
        offset = block.to(tl.int64) * value_stride_block + row * value_stride_token
        value = tl.load(
            value_ptr + offset[:, None] + (h // HEADS_PER_GROUP) * value_stride_g + v[None, :],
            mask=mask[:, None] & (v[None, :] < VALUE_RANK),
            other=0.0,
        )
        accumulator += tl.sum(weight[:, None] * value.to(tl.float32), 0)

    sum_of_weights = tl.sum(total, 0)
    coordinates = accumulator / tl.where(sum_of_weights > 0.0, sum_of_weights, 1.0)
    coordinates_row_ptr = coordinates_ptr + b * coordinates_stride_b + h * coordinates_stride_h
    tl.store(coordinates_row_ptr + v, coordinates.to(coordinates_ptr.dtype.element_ty), mask=v < VALUE_RANK)


def plan_as_shipped(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LowRankConfig,
    kv_format: LowRank,
) -> tuple[Launch, Launch]:
    """Lay out the scores of all tokens, fp32 as torch's softmax takes them, and the sum over coordinates.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, key, value = inputs["query"], inputs["fields"]["key"], inputs["fields"]["value"]
    basis, block_table, scores = inputs["key_basis"], inputs["block_table"], buffers["scores"]
    coordinates, context_lens = buffers["coordinates"], inputs["context_lens"]
    if not query.dtype == key.dtype == value.dtype == basis.dtype or query.dtype.itemsize != 2:
        raise ValueError("query, coordinates and basis must have one 16-bit dtype")
    if scores.shape[:2] != query.shape[:2] or scores.shape[2] < max(case.context_lens) or scores.stride(-1) != 1:
        raise ValueError("scores must be (batch, num_query_heads, the longest context)")
    group_heads = kv_format.heads(case.num_kv_heads)
    half_dim, value_rank = case.head_dim // 2, value.shape[3]
    shared = {"BLOCK_SIZE": case.block_size, "num_warps": config.num_warps, "num_stages": config.num_stages}
    return (
        Launch(
            kernel=palu_scores_kernel,
            grid=(*query.shape[:2], max(1, triton.cdiv(scores.shape[2], config.block_n))),
            arguments=(
                *(query, key, basis, block_table, context_lens, scores),
                *(inputs["scale"], -math.log2(ROPE_BASE) / half_dim),
                *query.stride()[:2],
                *key.stride()[:3],
                *basis.stride()[:2],
                block_table.stride(0),
                *scores.stride()[:2],
                basis.shape[1],
            ),
            options={
                "GROUP_HEADS": group_heads,
                "GROUP": case.group,
                "HALF_DIM": half_dim,
                "BLOCK_N": config.block_n,
                "BLOCK_D": triton.next_power_of_2(half_dim),
                "BLOCK_K": config.block_k,
                **shared,
            },
        ),
        Launch(
            kernel=palu_values_kernel,
            grid=tuple(query.shape[:2]),
            arguments=(
                *(scores, value, block_table, context_lens, coordinates),
                *scores.stride()[:2],
                *value.stride()[:3],
                block_table.stride(0),
                *coordinates.stride()[:2],
            ),
            options={
                "HEADS_PER_GROUP": group_heads * case.group,
                "VALUE_RANK": value_rank,
                "BLOCK_N": config.block_n,
                "BLOCK_V": triton.next_power_of_2(value_rank),
                **shared,
            },
        ),
    )
