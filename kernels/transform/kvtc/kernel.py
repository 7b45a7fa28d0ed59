"""Transform coding of rows in Triton: project and quantise in one pass, dequantise and project back in another.

Tile names: t row (token), c channel of the row, r component of the transform.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig

BLOCK_R = 64
BLOCK_C = 64


@triton.jit
def kvtc_encode_kernel(
    rows_ptr,
    mean_ptr,
    basis_ptr,
    step_ptr,
    levels_ptr,
    codes_ptr,
    num_rows,
    num_components,
    rows_stride,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give the codes of a tile of rows and components: ``floor(((x - mean) @ basis) / step) + levels / 2``, clamped."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    coordinates = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for first in range(0, NUM_CHANNELS, BLOCK_C):
        channel = first + c
        inside = channel < NUM_CHANNELS
        rows = tl.load(
            rows_ptr + t.to(tl.int64)[:, None] * rows_stride + channel[None, :],
            mask=(t[:, None] < num_rows) & inside[None, :],
            other=0.0,
        )
        mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
        basis = tl.load(
            basis_ptr + channel[:, None] * num_components + r[None, :],
            mask=inside[:, None] & (r[None, :] < num_components),
            other=0.0,
        )
        centred = (rows.to(tl.float32) - mean[None, :]).to(basis.dtype)
        coordinates = tl.dot(centred, basis, coordinates, input_precision="ieee")
    step = tl.load(step_ptr + r, mask=r < num_components, other=1.0)
    levels = tl.load(levels_ptr + r, mask=r < num_components, other=2)
    code = tl.floor(coordinates / step[None, :]) + (levels // 2).to(tl.float32)[None, :]
    code = tl.minimum(tl.maximum(code, 0.0), (levels - 1).to(tl.float32)[None, :])
    tl.store(
        codes_ptr + t.to(tl.int64)[:, None] * num_components + r[None, :],
        code.to(tl.uint8),
        mask=(t[:, None] < num_rows) & (r[None, :] < num_components),
    )


@triton.jit
def kvtc_decode_kernel(
    codes_ptr,
    mean_ptr,
    basis_ptr,
    step_ptr,
    levels_ptr,
    rows_ptr,
    num_rows,
    num_components,
    rows_stride,
    NUM_CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give a tile of rows and channels back: ``((code - levels / 2 + 1/2) * step) @ basis^T + mean``."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < NUM_CHANNELS
    rows = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for first in range(0, num_components, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        kept = r < num_components
        code = tl.load(
            codes_ptr + t.to(tl.int64)[:, None] * num_components + r[None, :],
            mask=(t[:, None] < num_rows) & kept[None, :],
            other=0,
        )
        # Components beyond the last have step 0 and add nothing.
        step = tl.load(step_ptr + r, mask=kept, other=0.0)
        levels = tl.load(levels_ptr + r, mask=kept, other=2)
        middle = (levels // 2).to(tl.float32) - 0.5
        basis = tl.load(
            basis_ptr + c[None, :] * num_components + r[:, None],
            mask=inside[None, :] & kept[:, None],
            other=0.0,
        )
        coordinates = (code.to(tl.float32) - middle[None, :]) * step[None, :]
        rows = tl.dot(coordinates.to(basis.dtype), basis, rows, input_precision="ieee")
    rows += tl.load(mean_ptr + c, mask=inside, other=0.0)[None, :]
    tl.store(
        rows_ptr + t.to(tl.int64)[:, None] * rows_stride + c[None, :],
        rows.to(rows_ptr.dtype.element_ty),
        mask=(t[:, None] < num_rows) & inside[None, :],
    )


def plan_kvtc(
    rows: torch.Tensor, codes: torch.Tensor, transform: Mapping[str, Any], config: LaunchConfig, *, decode: bool
) -> Launch:
    """Lay out one direction; `block_n` is the tile of rows, at least 16.

    Parameters
    ----------
    rows : Tensor, (num_rows, num_channels)
        bf16, fp16 or fp32, contiguous along channels: all KV heads of one token in one layer, keys before RoPE.
    codes : Tensor of uint8, (num_rows, num_components)
    transform : dict
        ``mean`` fp32, ``basis`` of the dtype that the product runs in, ``step`` fp32, ``levels`` int32.

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit.
    """
    mean, basis, step, levels = (transform[name] for name in ("mean", "basis", "step", "levels"))
    num_rows, num_channels = rows.shape
    num_components = basis.shape[1]
    if mean.shape != (num_channels,) or basis.shape[0] != num_channels:
        raise ValueError("mean must be (num_channels,) and basis (num_channels, num_components)")
    if step.shape != levels.shape or step.shape != (num_components,) or levels.dtype != torch.int32:
        raise ValueError("step and levels (int32) must be (num_components,)")
    if codes.dtype != torch.uint8 or codes.shape != (num_rows, num_components):
        raise ValueError("codes must be uint8, (num_rows, num_components)")
    if rows.stride(1) != 1 or not codes.is_contiguous() or not basis.is_contiguous():
        raise ValueError("rows must be contiguous along channels; codes and basis contiguous")
    columns = (num_channels, BLOCK_C) if decode else (num_components, BLOCK_R)
    return Launch(
        kernel=kvtc_decode_kernel if decode else kvtc_encode_kernel,
        grid=(triton.cdiv(num_rows, config.block_n), triton.cdiv(*columns)),
        arguments=(
            *((codes, mean, basis, step, levels, rows) if decode else (rows, mean, basis, step, levels, codes)),
            *(num_rows, num_components, rows.stride(0)),
        ),
        options={
            "NUM_CHANNELS": num_channels,
            "BLOCK_T": config.block_n,
            "BLOCK_R": BLOCK_R,
            "BLOCK_C": BLOCK_C,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
