"""Paged split-KV decode attention in Triton: one kernel per split of the context, one to combine the splits.

Tile names: b request, h head, m query head within its group, n token within a tile, d dimension of a head,
s split. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

# Triton passes pointers and constants through unannotated, upper-case parameters; relative imports: see kernels.
# ruff: noqa: ANN001, ANN201, N803, PLR0917, TID252

import math

import torch
import triton
import triton.language as tl

from ..launches import Launch, LaunchConfig

MIN_DOT_ROWS = 16
MAX_SPLITS = 64


@triton.jit
def decode_attention_split_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    block_table_ptr,
    context_lens_ptr,
    partial_ptr,
    lse_ptr,
    scale_log2,
    num_query_heads,
    query_stride_b,
    query_stride_h,
    key_stride_block,
    key_stride_token,
    key_stride_h,
    value_stride_block,
    value_stride_token,
    value_stride_h,
    block_table_stride_b,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from one group of query heads to one split of one request; write its output and log2-sum-exp2."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.program_id(2)
    context = tl.load(context_lens_ptr + b)
    split_tokens = tl.cdiv(tl.cdiv(context, BLOCK_N), NUM_SPLITS) * BLOCK_N
    begin = s * split_tokens
    end = tl.minimum(begin + split_tokens, context)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    query_head = h * GROUP + m
    query_mask = m[:, None] < GROUP
    if HEAD_DIM < BLOCK_D:
        query_mask = query_mask & (d[None, :] < HEAD_DIM)
    query = tl.load(
        query_ptr + b * query_stride_b + query_head[:, None] * query_stride_h + d[None, :], mask=query_mask, other=0.0
    )

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    block_table_row_ptr = block_table_ptr + b.to(tl.int64) * block_table_stride_b
    # Block ids are loaded one tile ahead: a load that feeds another inside the loop would leave K and V one buffer.
    block = tl.load(block_table_row_ptr + (begin + n) // BLOCK_SIZE, mask=begin + n < end, other=0)
    for tile in range(begin, end, BLOCK_N):
        token = tile + n
        row = token % BLOCK_SIZE
        key_offset = block.to(tl.int64) * key_stride_block + row * key_stride_token + h * key_stride_h
        value_offset = block.to(tl.int64) * value_stride_block + row * value_stride_token + h * value_stride_h
        ahead = token + BLOCK_N
        block = tl.load(block_table_row_ptr + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        kv_mask = token[:, None] < end
        if HEAD_DIM < BLOCK_D:
            kv_mask = kv_mask & (d[None, :] < HEAD_DIM)

        key = tl.load(key_ptr + key_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        score = tl.where(token[None, :] < end, score, float("-inf"))
        # Every tile holds a token of the split, so the new maximum is finite.
        new_top = tl.maximum(top, tl.max(score, 1))
        decay = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        total = total * decay + tl.sum(weight, 1)
        value = tl.load(value_ptr + value_offset[:, None] + d[None, :], mask=kv_mask, other=0.0)
        accumulator = accumulator * decay[:, None]
        accumulator = tl.dot(weight.to(value.dtype), value, accumulator, input_precision="ieee")
        top = new_top

    # An empty split has total 0 and top -inf: it writes lse = -inf and leaves its output unwritten.
    divisor = tl.where(total > 0.0, total, 1.0)
    partial_row = (b * num_query_heads + query_head).to(tl.int64) * NUM_SPLITS + s
    partial = accumulator / divisor[:, None]
    tl.store(partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :], partial, mask=query_mask & (begin < end))
    tl.store(lse_ptr + partial_row, top + tl.log2(divisor), mask=m < GROUP)


@triton.jit
def decode_attention_combine_kernel(
    partial_ptr,
    lse_ptr,
    output_ptr,
    num_query_heads,
    output_stride_b,
    output_stride_h,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Average the outputs of one head's splits, weighted by their sums of exponentials."""
    b = tl.program_id(0)
    h = tl.program_id(1)
    s = tl.arange(0, NUM_SPLITS)
    d = tl.arange(0, BLOCK_D)
    partial_row = (b * num_query_heads + h).to(tl.int64) * NUM_SPLITS + s
    lse = tl.load(lse_ptr + partial_row)
    top = tl.max(lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - top)
    total = tl.sum(weight, 0)
    partial = tl.load(
        partial_ptr + partial_row[:, None] * HEAD_DIM + d[None, :],
        mask=(lse[:, None] > float("-inf")) & (d[None, :] < HEAD_DIM),
        other=0.0,
    )
    output = tl.sum(weight[:, None] * partial, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(
        output_ptr + b * output_stride_b + h * output_stride_h + d,
        output.to(output_ptr.dtype.element_ty),
        mask=d < HEAD_DIM,
    )


def default_config(backend: str, head_dim: int) -> LaunchConfig:
    """Give a tiling that compiles without spills: `backend` is Triton's ``cuda`` or ``hip``."""
    if backend == "hip":
        return LaunchConfig(block_n=32, num_warps=4, num_stages=2)
    # Two tiles each of K and V must fit the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
    return LaunchConfig(block_n=64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


def choose_num_splits(batch: int, num_kv_heads: int, max_context: int, num_multiprocessors: int, block_n: int) -> int:
    """Split the context so that two programs per multiprocessor exist, at least a tile each; a power of two."""
    wanted = math.ceil(2 * num_multiprocessors / (batch * num_kv_heads))
    tiles = max(1, math.ceil(max_context / block_n))
    return min(MAX_SPLITS, triton.next_power_of_2(min(wanted, tiles)))


def plan_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    output: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    config: LaunchConfig,
) -> tuple[Launch, Launch]:
    """Lay out the two launches that fill `output`; see `decode_attention` for the shapes.

    `partial` is fp32, (batch, num_query_heads, num_splits, head_dim), and `lse` fp32, (batch, num_query_heads,
    num_splits); both are scratch, contiguous, and need no initial values. num_splits is a power of two.
    """
    batch, num_query_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_splits = lse.shape[-1]
    _check(query, key_cache, value_cache, block_table, context_lens, partial, lse)
    group = num_query_heads // num_kv_heads
    block_d = triton.next_power_of_2(head_dim)
    split = Launch(
        kernel=decode_attention_split_kernel,
        grid=(batch, num_kv_heads, num_splits),
        arguments=(
            *(query, key_cache, value_cache, block_table, context_lens, partial, lse),
            *(scale * math.log2(math.e), num_query_heads),
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            block_table.stride(0),
        ),
        options={
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "NUM_SPLITS": num_splits,
            "BLOCK_M": max(MIN_DOT_ROWS, triton.next_power_of_2(group)),
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_d,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    combine = Launch(
        kernel=decode_attention_combine_kernel,
        grid=(batch, num_query_heads),
        arguments=(partial, lse, output, num_query_heads, *output.stride()[:2]),
        options={"HEAD_DIM": head_dim, "NUM_SPLITS": num_splits, "BLOCK_D": block_d, "num_warps": 4},
    )
    return split, combine


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float,
    num_splits: int,
    config: LaunchConfig,
) -> torch.Tensor:
    """Attend from the newest token of each request to its cached tokens.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
        fp16, bf16 or fp32, of the caches' dtype.
    key_cache, value_cache : Tensor, (num_blocks, block_size, num_kv_heads, head_dim)
        Contiguous along head_dim.
    block_table : Tensor of int32, (batch, max_blocks)
        Must name a block of the pool for each cached token; this is not checked, nor is anything beyond read.
    context_lens : Tensor of int32, (batch,)
        Cached tokens per request; zero gives a zero output.
    scale : float
        Factor of the scores before the softmax.
    num_splits : int
        Parts that each context is divided into, a power of two; `choose_num_splits` proposes one.
    config : LaunchConfig
        `default_config` proposes one.

    Returns
    -------
    Tensor like `query`

    Raises
    ------
    ValueError
        If a shape, dtype or stride is not as above.
    """
    batch, num_query_heads, head_dim = query.shape
    output = torch.empty_like(query)
    partial = query.new_empty((batch, num_query_heads, num_splits, head_dim), dtype=torch.float32)
    lse = query.new_empty((batch, num_query_heads, num_splits), dtype=torch.float32)
    inputs = (query, key_cache, value_cache, block_table, context_lens)
    for launch in plan_decode_attention(*inputs, output, partial, lse, scale=scale, config=config):
        launch.run()
    return output


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    batch, num_query_heads, head_dim = query.shape
    num_kv_heads, num_splits = key_cache.shape[2], lse.shape[-1]
    requirements = {
        "key_cache and value_cache must have one shape": key_cache.shape == value_cache.shape,
        "query and caches must have one head_dim": key_cache.shape[-1] == head_dim,
        "query and caches must have one dtype": query.dtype == key_cache.dtype == value_cache.dtype,
        "the number of query heads must be a multiple of that of KV heads": num_query_heads % num_kv_heads == 0,
        "block_table and context_lens must be int32": block_table.dtype == context_lens.dtype == torch.int32,
        "block_table and context_lens must have a row per request": len(block_table) == len(context_lens) == batch,
        "num_splits must be a power of two": num_splits > 0 and num_splits & (num_splits - 1) == 0,
        "partial must be contiguous, (batch, num_query_heads, num_splits, head_dim)": partial.is_contiguous()
        and partial.shape == (batch, num_query_heads, num_splits, head_dim),
        "lse must be contiguous, (batch, num_query_heads, num_splits)": lse.is_contiguous()
        and lse.shape == (batch, num_query_heads, num_splits),
        "the last dimension must be contiguous": all(
            tensor.stride(-1) == 1 for tensor in (query, key_cache, value_cache, block_table, context_lens)
        ),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
