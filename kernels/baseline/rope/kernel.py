"""Rotary position embedding in Triton: one program per token tile and head."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig


@triton.jit
def rope_kernel(
    x_ptr,
    positions_ptr,
    cos_sin_ptr,
    output_ptr,
    num_tokens,
    x_stride_t,
    x_stride_h,
    output_stride_t,
    output_stride_h,
    ROTARY_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Turn the pairs (x_i, x_{i + ROTARY_DIM / 2}) of one head by the angle of each token's position."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    half: tl.constexpr = ROTARY_DIM // 2
    inside = (t[:, None] < num_tokens) & (d[None, :] < half)
    position = tl.load(positions_ptr + t, mask=t < num_tokens, other=0)
    table = cos_sin_ptr + position[:, None] * ROTARY_DIM + d[None, :]
    cos = tl.load(table, mask=inside, other=1.0)
    sin = tl.load(table + half, mask=inside, other=0.0)
    row = t.to(tl.int64)[:, None] * x_stride_t + h * x_stride_h + d[None, :]
    first = tl.load(x_ptr + row, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + row + half, mask=inside, other=0.0).to(tl.float32)
    out_row = t.to(tl.int64)[:, None] * output_stride_t + h * output_stride_h + d[None, :]
    dtype = output_ptr.dtype.element_ty
    tl.store(output_ptr + out_row, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(output_ptr + out_row + half, (second * cos + first * sin).to(dtype), mask=inside)


def plan_rope(inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig) -> Launch:
    """Lay out the launch over `x` (num_tokens, num_heads, head_dim); `block_n` is the tile of tokens.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    x, positions, cos_sin, output = inputs["x"], inputs["positions"], inputs["cos_sin"], buffers["output"]
    head_dim = x.shape[2]
    if head_dim % 2 or cos_sin.shape[1:] != (head_dim,):
        raise ValueError("head_dim must be even and cos_sin (max_positions, head_dim)")
    if positions.dtype != torch.int64 or positions.shape != x.shape[:1]:
        raise ValueError("positions must be int64, one per token")
    if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous() or x.stride(2) != 1 or output.stride(2) != 1:
        raise ValueError("cos_sin must be contiguous fp32, and heads contiguous")
    return Launch(
        kernel=rope_kernel,
        grid=(triton.cdiv(len(x), config.block_n), x.shape[1]),
        arguments=(x, positions, cos_sin, output, len(x), *x.stride()[:2], *output.stride()[:2]),
        options={
            "ROTARY_DIM": head_dim,
            "BLOCK_T": config.block_n,
            "BLOCK_D": triton.next_power_of_2(head_dim // 2),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
