"""The second stage of split-KV attention: average a head's splits, weighted by their sums of exponentials."""

import torch
import triton
import triton.language as tl

from ..launches import Launch


@triton.jit
def decode_attention_combine_kernel(
    partial_ptr,
    lse_ptr,
    output_ptr,
    num_query_heads,
    output_stride_b,
    output_stride_h,
    VALUE_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Combine one head's splits; an empty split has lse -inf and an unwritten partial output."""
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
        partial_ptr + partial_row[:, None] * VALUE_DIM + d[None, :],
        mask=(lse[:, None] > float("-inf")) & (d[None, :] < VALUE_DIM),
        other=0.0,
    )
    output = tl.sum(weight[:, None] * partial, 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(
        output_ptr + b * output_stride_b + h * output_stride_h + d,
        output.to(output_ptr.dtype.element_ty),
        mask=d < VALUE_DIM,
    )


def plan_combine(partial: torch.Tensor, lse: torch.Tensor, output: torch.Tensor) -> Launch:
    """Lay out the combination of `partial`, (batch, num_query_heads, num_splits, value_dim), into `output`."""
    batch, num_query_heads, num_splits, value_dim = partial.shape
    return Launch(
        kernel=decode_attention_combine_kernel,
        grid=(batch, num_query_heads),
        arguments=(partial, lse, output, num_query_heads, *output.stride()[:2]),
        options={
            "VALUE_DIM": value_dim,
            "NUM_SPLITS": num_splits,
            "BLOCK_D": triton.next_power_of_2(value_dim),
            "num_warps": 4,
        },
    )
