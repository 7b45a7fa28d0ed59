"""Column sums of a prompt's causal attention, tile by tile, from the row sums that prefill attention leaves.

Tile names: b request, h KV head, n key token within a tile, m row within a tile (row ``m`` is query ``m // GROUP`` of
the prompt and query head ``h * GROUP + m % GROUP``), d dimension.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...decode_attention.batch import DecodeBatch
from ...decode_attention.softmax import load_block_ids
from ...launches import Launch
from ..batch import check_cache, check_fp32, require
from ..newest import RowConfig


@triton.jit
def _received(
    key,
    token,
    first,
    context,
    query_ptr,
    lse_ptr,
    rows,
    sums,
    scale_log2,
    query_stride_token,
    query_stride_h,
    lse_stride_token,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Sum the probabilities that a tile of keys receives from a tile of queries, of which `first` is the first.

    `rows` and `sums` are where that query's row and sum lie, in elements.
    """
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    present = first + m // GROUP < context
    if BLOCK_M % GROUP != 0:
        present = present & (m < BLOCK_M // GROUP * GROUP)
    mask = present[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d[None, :] < HEAD_DIM)
    row_offset = (m // GROUP) * query_stride_token + (m % GROUP) * query_stride_h
    query = tl.load(query_ptr + rows + row_offset[:, None] + d[None, :], mask=mask, other=0.0)
    # A row that is not there has the sum +inf: its weights are 0.
    lse_offset = (m // GROUP) * lse_stride_token + m % GROUP
    lse = tl.load(lse_ptr + sums + lse_offset, mask=present, other=float("inf"))
    score = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2
    weight = tl.exp2(score - lse[None, :])
    if CAUSAL:
        weight = tl.where(token[:, None] <= first + m[None, :] // GROUP, weight, 0.0)
    return tl.sum(weight, 1)


@triton.jit
def h2o_prefill_kernel(
    query_ptr,
    key_ptr,
    block_table_ptr,
    context_lens_ptr,
    lse_ptr,
    scores_ptr,
    scale_log2,
    num_tokens,
    query_stride_b,
    query_stride_token,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    block_table_stride_b,
    lse_stride_b,
    lse_stride_token,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over all rows that see a tile of keys the probability that each key receives."""
    # The first tiles have the most rows: they start first.
    first_token = tl.program_id(0) * BLOCK_N
    h = tl.program_id(1)
    b = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    context = tl.load(context_lens_ptr + b)
    token = first_token + tl.arange(0, BLOCK_N)
    block = load_block_ids(block_table_ptr + b.to(tl.int64) * block_table_stride_b, token, context, BLOCK_SIZE)
    offset = block.to(tl.int64) * key_stride_block + (token % BLOCK_SIZE) * key_stride_token + h * key_stride_h
    key_mask = (token[:, None] < context) & (d[None, :] < HEAD_DIM)
    key = tl.load(key_ptr + offset[:, None] + d[None, :], mask=key_mask, other=0.0)

    received = tl.zeros([BLOCK_N], tl.float32)
    rows = b.to(tl.int64) * query_stride_b + first_token.to(tl.int64) * query_stride_token + h * GROUP * query_stride_h
    sums = b.to(tl.int64) * lse_stride_b + first_token.to(tl.int64) * lse_stride_token + h * GROUP
    # Queries inside the tile of keys see a part of it; later ones see all of it and need no mask.
    step = BLOCK_M // GROUP
    middle = tl.minimum(first_token + tl.cdiv(BLOCK_N, step) * step, context)
    for first in range(first_token, middle, step):
        received += _received(
            *(key, token, first, context, query_ptr, lse_ptr, rows, sums, scale_log2),
            *(query_stride_token, query_stride_h, lse_stride_token, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, True),
        )
        rows += step * query_stride_token
        sums += step * lse_stride_token
    for first in range(middle, context, step):
        received += _received(
            *(key, token, first, context, query_ptr, lse_ptr, rows, sums, scale_log2),
            *(query_stride_token, query_stride_h, lse_stride_token, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, False),
        )
        rows += step * query_stride_token
        sums += step * lse_stride_token

    head = b.to(tl.int64) * tl.num_programs(1) + h
    received = tl.where(token < context, received, float("-inf"))
    tl.store(scores_ptr + head * num_tokens + token, received, mask=token < num_tokens)


def plan_h2o_prefill(
    case: DecodeBatch, inputs: Mapping[str, Any], scores: torch.Tensor, config: RowConfig
) -> tuple[Launch, ...]:
    """Lay out the column sums of each prompt's attention into `scores`, (batch, num_kv_heads, longest prompt).

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_cache(case, inputs)
    query, key, block_table, lse = inputs["query"], inputs["fields"]["key"], inputs["block_table"], inputs["lse"]
    batch, num_tokens = len(case.context_lens), max(case.context_lens)
    check_fp32(lse=lse, scores=scores)
    require(
        {
            "a tile must hold the rows of a query": case.group <= config.block_m,
            "the number of query heads must be a multiple of that of KV heads": case.num_query_heads % case.num_kv_heads
            == 0,
            "query must be (batch, longest prompt, num_query_heads, head_dim)": query.shape
            == (batch, num_tokens, case.num_query_heads, case.head_dim),
            "query must be contiguous along head_dim": query.stride(-1) == 1,
            "query and key must have one dtype": query.dtype == key.dtype,
            "lse must be (batch, longest prompt, num_query_heads)": lse.shape == query.shape[:3],
            "scores must be (batch, num_kv_heads, longest prompt)": scores.shape
            == (batch, case.num_kv_heads, num_tokens),
        }
    )
    launch = Launch(
        kernel=h2o_prefill_kernel,
        grid=(triton.cdiv(num_tokens, config.block_n), case.num_kv_heads, batch),
        arguments=(
            *(query, key, block_table, inputs["context_lens"], lse, scores),
            *(inputs["scale"] * math.log2(math.e), num_tokens),
            *query.stride()[:3],
            *key.stride()[:3],
            block_table.stride(0),
            *lse.stride()[:2],
        ),
        options={
            "GROUP": case.group,
            "HEAD_DIM": case.head_dim,
            "BLOCK_SIZE": case.block_size,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": triton.next_power_of_2(case.head_dim),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    return (launch,)
