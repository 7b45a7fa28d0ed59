"""Paged split-KV decode attention over low-rank coordinates: K rebuilt and rotated per tile, V's basis absorbed.

Everything is transposed, tokens along the rows: the rebuilt keys are the left operand of their product with the
queries, so they stay in registers between the two products.

Tile names: b request, n token within a tile, m query head within the program's, i KV head within the program's, d
dimension of half a head, k and v coordinate of K and V, s split. Suffix `_ptr`: pointer; `_stride_x`: elements between
neighbours along x. Upper case: compile-time.
"""

# ruff: noqa: PLR0915 (the kernel is one page of loads)

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...formats.low_rank import LowRank
from ...launches import Launch
from ..batch import MIN_DOT_ROWS, DecodeBatch, check_decode_inputs
from ..softmax import load_block_ids, split_range
from .batch import LowRankConfig


@triton.jit
def decode_attention_low_rank_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    key_basis_ptr,
    rope_table_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_query_heads,
    key_rank,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_g,
    value_stride_block,
    value_stride_token,
    value_stride_g,
    key_basis_stride_g,
    key_basis_stride_k,
    rope_table_stride,
    block_table_stride_b,
    HEADS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_DIM: tl.constexpr,
    VALUE_RANK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Attend from the query heads of HEADS KV heads to one split of one request; write coordinates of the output."""
    b = tl.program_id(0)
    first_head = tl.program_id(1) * HEADS
    g = first_head // GROUP_HEADS
    s = tl.program_id(2)
    begin, end = split_range(tl.load(context_lens_ptr + b), s, NUM_SPLITS, BLOCK_N)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    d_mask = d < HALF_DIM
    query_head = first_head * GROUP + m
    m_mask = m < HEADS * GROUP
    query_column_ptr = query_ptr + b * query_stride_b + query_head[None, :] * query_stride_h + d[:, None]
    query_mask = m_mask[None, :] & d_mask[:, None]
    query_low = tl.load(query_column_ptr, mask=query_mask, other=0.0).to(tl.float32)
    query_high = tl.load(query_column_ptr + HALF_DIM, mask=query_mask, other=0.0).to(tl.float32)

    # Angles add up: turning keys by their place in the tile, and the query back by the tile's first position, gives
    # the score of the full turn, and the table's rows 0 to BLOCK_N - 1 serve every tile.
    place_ptr = rope_table_ptr + n[:, None] * rope_table_stride + d[None, :]
    cosine = tl.load(place_ptr, mask=d_mask[None, :], other=0.0)
    sine = tl.load(place_ptr + HALF_DIM, mask=d_mask[None, :], other=0.0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
    basis_column = (first_head % GROUP_HEADS) * (2 * HALF_DIM)
    basis_ptr = key_basis_ptr + g * key_basis_stride_g + basis_column + k[:, None] * key_basis_stride_k + d[None, :]
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    block = load_block_ids(block_table_row_ptr, begin + n, end, BLOCK_SIZE)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = token % BLOCK_SIZE
        key_offset = block.to(tl.int64) * key_stride_block + row * key_stride_token + g * key_stride_g
        value_offset = block.to(tl.int64) * value_stride_block + row * value_stride_token + g * value_stride_g
        block = load_block_ids(block_table_row_ptr, token + BLOCK_N, end, BLOCK_SIZE)
        mask = token[:, None] < end
        key_row_ptr = key_ptr + key_offset[:, None] + k[None, :]
        base_ptr = rope_table_ptr + tile * rope_table_stride + d
        base_cosine = tl.load(base_ptr, mask=d_mask, other=0.0)[:, None]
        base_sine = tl.load(base_ptr + HALF_DIM, mask=d_mask, other=0.0)[:, None]
        turned_low = (query_low * base_cosine + query_high * base_sine).to(key_ptr.dtype.element_ty)
        turned_high = (query_high * base_cosine - query_low * base_sine).to(key_ptr.dtype.element_ty)

        score = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(HEADS):
            low = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            high = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            head_ptr = basis_ptr + i * (2 * HALF_DIM)
            for first in range(0, key_rank, BLOCK_K):
                k_mask = first + k < key_rank
                key = tl.load(key_row_ptr + first, mask=mask & k_mask[None, :], other=0.0)
                basis_row_ptr = head_ptr + first * key_basis_stride_k
                basis_mask = k_mask[:, None] & d_mask[None, :]
                low = tl.dot(key, tl.load(basis_row_ptr, mask=basis_mask, other=0.0), low)
                high = tl.dot(key, tl.load(basis_row_ptr + HALF_DIM, mask=basis_mask, other=0.0), high)
            rotated_low = (low * cosine - high * sine).to(key_ptr.dtype.element_ty)
            rotated_high = (high * cosine + low * sine).to(key_ptr.dtype.element_ty)
            # The columns of other heads are zero, so that each head adds its own scores to one tile.
            of_head = (m // GROUP == i)[None, :]
            score = tl.dot(rotated_low, tl.where(of_head, turned_low, 0.0).to(key_ptr.dtype.element_ty), score)
            score = tl.dot(rotated_high, tl.where(of_head, turned_high, 0.0).to(key_ptr.dtype.element_ty), score)

        score = tl.where(token[:, None] < end, score * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[None, :])
        top = new_top
        total = total * decay + tl.sum(weight, 0)
        value_mask = mask & (v[None, :] < VALUE_RANK)
        value = tl.load(value_ptr + value_offset[:, None] + v[None, :], mask=value_mask, other=0.0)
        accumulator = tl.dot(tl.trans(value), weight.to(value.dtype), accumulator * decay[None, :])

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    tl.store(
        partial_ptr + partial_row[None, :] * VALUE_RANK + v[:, None],
        accumulator / divisor[None, :],
        mask=m_mask[None, :] & (v[:, None] < VALUE_RANK) & (begin < end),
    )
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m_mask)


def plan_low_rank_split(
    case: DecodeBatch,
    inputs: Mapping[str, Any],
    buffers: Mapping[str, torch.Tensor],
    config: LowRankConfig,
    kv_format: LowRank,
) -> Launch:
    """Lay out the split kernel, whose partial outputs are coordinates of V.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, key, value = inputs["query"], inputs["fields"]["key"], inputs["fields"]["value"]
    basis, table, block_table, lse = inputs["key_basis"], inputs["rope_table"], inputs["block_table"], buffers["lse"]
    group_heads = kv_format.heads(case.num_kv_heads)
    heads = config.heads or group_heads
    num_groups, key_rank, width = basis.shape
    requirements = {
        "query, coordinates and basis must have one 16-bit dtype": query.dtype
        == key.dtype
        == value.dtype
        == basis.dtype
        and query.dtype.itemsize == 2,
        "key and value must be (num_blocks, block_size, num_groups, rank)": key.shape[:3]
        == value.shape[:3]
        == (len(key), case.block_size, num_groups)
        and key.shape[3] == key_rank,
        "key, value, basis and table must be contiguous along their last dimension": all(
            tensor.stride(-1) == 1 for tensor in (key, value, basis, table)
        ),
        "basis must be (num_groups, rank, heads * head_dim)": num_groups * group_heads == case.num_kv_heads
        and width == group_heads * case.head_dim,
        "head_dim must be even": case.head_dim % 2 == 0,
        "heads per program must divide the heads of a group": group_heads % heads == 0,
        "rope_table must be float32 and cover a tile and the longest context": table.dtype == torch.float32
        and len(table) >= max(config.block_n, *case.context_lens)
        and table.shape[1] == case.head_dim,
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    half_dim = case.head_dim // 2
    return Launch(
        kernel=decode_attention_low_rank_kernel,
        grid=(len(query), case.num_kv_heads // heads, lse.shape[-1]),
        arguments=(
            *(query, key, value, basis, table, block_table, inputs["context_lens"], buffers["partial"], lse),
            *(inputs["scale"] * math.log2(math.e), case.num_query_heads, key_rank),
            *query.stride()[:2],
            *key.stride()[:3],
            *value.stride()[:3],
            *basis.stride()[:2],
            table.stride(0),
            block_table.stride(0),
        ),
        options={
            "HEADS": heads,
            "GROUP_HEADS": group_heads,
            "GROUP": case.group,
            "HALF_DIM": half_dim,
            "VALUE_RANK": value.shape[3],
            "BLOCK_SIZE": case.block_size,
            "NUM_SPLITS": lse.shape[-1],
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(heads * case.group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": max(MIN_DOT_ROWS, triton.next_power_of_2(half_dim)),
            "BLOCK_K": config.block_k,
            "BLOCK_V": max(MIN_DOT_ROWS, triton.next_power_of_2(value.shape[3])),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
