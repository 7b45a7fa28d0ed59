"""RMSNorm in Triton: one program per row, the row in registers."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, output_ptr, epsilon, x_stride, output_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    """Scale one row to unit root mean square, in fp32, and weigh its elements."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + epsilon)
    output = x * scale * weight
    tl.store(output_ptr + row * output_stride + column, output.to(output_ptr.dtype.element_ty), mask=inside)


def plan_rms_norm(inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig) -> Launch:
    """Lay out the launch: `x` (tokens, hidden_size), `weight` (hidden_size,), `epsilon`; fills `output`.

    Raises
    ------
    ValueError
        If shapes or strides do not fit.
    """
    x, weight, output = inputs["x"], inputs["weight"], buffers["output"]
    if weight.shape != x.shape[1:] or output.shape != x.shape:
        raise ValueError("weight must be (hidden_size,) and output shaped as x")
    if not x.stride(1) == weight.stride(0) == output.stride(1) == 1:
        raise ValueError("rows must be contiguous")
    return Launch(
        kernel=rms_norm_kernel,
        grid=(len(x),),
        arguments=(x, weight, output, inputs["epsilon"], x.stride(0), output.stride(0)),
        options={
            "HIDDEN": x.shape[1],
            "BLOCK": triton.next_power_of_2(x.shape[1]),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
