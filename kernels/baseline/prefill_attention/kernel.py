"""Causal attention over whole prompts in Triton: one program per tile of queries and query head.

Tile names: m query within a tile, n key within a tile, d dimension of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig


@triton.jit
def _attend_tiles(
    accumulator, top, total, query, key_ptr, value_ptr, key_stride_t, value_stride_t, scale_log2, row, d, length,
    first, last, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold keys first..last into the running softmax; only the diagonal tiles need the causal mask."""
    n = tl.arange(0, BLOCK_N)
    for tile in range(first, last, BLOCK_N):
        token = tile + n
        inside = (token[:, None] < length) & (d[None, :] < HEAD_DIM)
        offset = token.to(tl.int64)[:, None]
        key = tl.load(key_ptr + offset * key_stride_t + d[None, :], mask=inside, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if MASKED:
            score = tl.where(token[None, :] <= row[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        total = total * decay + tl.sum(weight, 1)
        value = tl.load(value_ptr + offset * value_stride_t + d[None, :], mask=inside, other=0.0)
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator * decay[:, None], input_precision="ieee")
        top = new_top
    return accumulator, top, total


@triton.jit
def prefill_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cu_seqlens_ptr,
    output_ptr,
    scale_log2,
    query_stride_t,
    query_stride_h,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    output_stride_t,
    output_stride_h,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from one tile of a prompt's queries to all keys up to them."""
    b = tl.program_id(2)
    h = tl.program_id(1)
    start = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + b + 1) - start).to(tl.int32)
    # The last tiles hold the most work: they start first.
    tile = tl.cdiv(length, BLOCK_M) - 1 - tl.program_id(0)
    if tile >= 0:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        inside = (row[:, None] < length) & (d[None, :] < HEAD_DIM)
        token = start + row.to(tl.int64)
        query = tl.load(
            query_ptr + token[:, None] * query_stride_t + h * query_stride_h + d[None, :], mask=inside, other=0.0
        )
        keys = key_ptr + start * key_stride_t + (h // GROUP) * key_stride_h
        values = value_ptr + start * value_stride_t + (h // GROUP) * value_stride_h
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        diagonal = tile * BLOCK_M // BLOCK_N * BLOCK_N
        accumulator, top, total = _attend_tiles(
            accumulator, top, total, query, keys, values, key_stride_t, value_stride_t, scale_log2, row, d, length,
            0, diagonal, False, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        accumulator, top, total = _attend_tiles(
            accumulator, top, total, query, keys, values, key_stride_t, value_stride_t, scale_log2, row, d, length,
            diagonal, tl.minimum(tile * BLOCK_M + BLOCK_M, length), True, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        # Every row up to the end sees at least itself, so no total is zero.
        output = (accumulator / total[:, None]).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + token[:, None] * output_stride_t + h * output_stride_h + d[None, :], output, mask=inside)


def plan_prefill_attention(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig, *, block_m: int
) -> Launch:
    """Lay out the launch: `query` (num_tokens, num_query_heads, head_dim), `key` and `value` alike with KV heads.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    query, key, value, output = inputs["query"], inputs["key"], inputs["value"], buffers["output"]
    cu_seqlens = inputs["cu_seqlens"]
    if key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[2] != query.shape[2]:
        raise ValueError("key and value must be (num_tokens, num_kv_heads, head_dim) of the query's tokens")
    if query.shape[1] % key.shape[1]:
        raise ValueError("the number of query heads must be a multiple of that of KV heads")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError("cu_seqlens must be int32, (batch + 1,)")
    if any(tensor.stride(2) != 1 for tensor in (query, key, value, output)):
        raise ValueError("heads must be contiguous along head_dim")
    head_dim = query.shape[2]
    return Launch(
        kernel=prefill_attention_kernel,
        grid=(triton.cdiv(inputs["max_seqlen"], block_m), query.shape[1], len(cu_seqlens) - 1),
        arguments=(
            *(query, key, value, cu_seqlens, output, inputs["scale"] * math.log2(math.e)),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            *output.stride()[:2],
        ),
        options={
            "GROUP": query.shape[1] // key.shape[1],
            "HEAD_DIM": head_dim,
            "BLOCK_M": block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
