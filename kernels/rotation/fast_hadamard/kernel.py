"""Fast Walsh-Hadamard transform of rows.

Tile names: r row within a tile, d element. Suffix `_ptr`: pointer. Upper case: compile-time.
"""

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import check_rows


@triton.jit
def transform(x, ROWS: tl.constexpr, DIM: tl.constexpr, STAGES: tl.constexpr):
    """Multiply each row by Sylvester's Hadamard matrix; `STAGES` is log2 of `DIM`.

    Each stage adds and subtracts neighbours and puts sums before differences, which turns the index by one bit; after
    all stages the order is the first again.
    """
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x, [ROWS, DIM // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [ROWS, DIM])
    return x


@triton.jit
def fast_hadamard_kernel(
    rows_ptr,
    signs_ptr,
    rotated_ptr,
    num_rows,
    SCALE: tl.constexpr,
    SIGNS_FIRST: tl.constexpr,
    SIGNS_LAST: tl.constexpr,
    DIM: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Transform a tile of rows in fp32, times signs before or after, and times `SCALE`."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, DIM)
    offset = r.to(tl.int64)[:, None] * DIM + d[None, :]
    mask = r[:, None] < num_rows
    x = tl.load(rows_ptr + offset, mask=mask, other=0.0).to(tl.float32) * SCALE
    if SIGNS_FIRST:
        x = x * tl.load(signs_ptr + d)[None, :]
    x = transform(x, BLOCK_R, DIM, STAGES)
    if SIGNS_LAST:
        x = x * tl.load(signs_ptr + d)[None, :]
    tl.store(rotated_ptr + offset, x.to(rotated_ptr.dtype.element_ty), mask=mask)


def plan_fast_hadamard(
    rows: torch.Tensor,
    rotated: torch.Tensor,
    config: LaunchConfig,
    *,
    signs_first: torch.Tensor | None = None,
    signs_last: torch.Tensor | None = None,
) -> Launch:
    """Lay out the transform, scaled so that lengths stay.

    Parameters
    ----------
    rows, rotated : Tensor, (num_rows, dim)
        Contiguous; dtypes may differ.
    config : LaunchConfig
        Its `block_n` counts rows.
    signs_first, signs_last : Tensor of float32, (dim,), or None
        Multiplied into each row before or after; at most one of them.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_rows(rows, rotated)
    dim = rows.shape[-1]
    signs = signs_last if signs_first is None else signs_first
    if signs is not None and (signs.shape != (dim,) or signs.dtype != torch.float32 or signs.stride(0) != 1):
        raise ValueError("signs must be float32, (dim,), contiguous")
    if signs_first is not None and signs_last is not None:
        raise ValueError("signs are multiplied in before or after, not both")
    return Launch(
        kernel=fast_hadamard_kernel,
        grid=(max(1, triton.cdiv(len(rows), config.block_n)),),
        arguments=(rows, rows if signs is None else signs, rotated, len(rows)),
        options={
            "SCALE": dim**-0.5,
            "SIGNS_FIRST": signs_first is not None,
            "SIGNS_LAST": signs_last is not None,
            "DIM": dim,
            "STAGES": dim.bit_length() - 1,
            "BLOCK_R": config.block_n,
            "num_warps": config.num_warps,
        },
    )
