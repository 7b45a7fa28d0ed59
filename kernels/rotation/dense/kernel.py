"""Rows times a dense square matrix.

Tile names: r row within a tile, d element of a row, o element of a result. Suffix `_ptr`: pointer. Upper case:
compile-time.
"""

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import check_rows

MAX_RESULT_TILE = 64
"""Elements of a result per program, which keeps the matrix's tile within 32 KiB for a dim of 256."""


@triton.jit
def dense_rotation_kernel(
    rows_ptr,
    matrix_ptr,
    rotated_ptr,
    num_rows,
    scale,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Multiply a tile of rows by some rows of the matrix: result element o is ``scale`` times ``matrix[o] . row``."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.arange(0, DIM)
    row = r.to(tl.int64)[:, None] * DIM
    mask = r[:, None] < num_rows
    matrix = tl.load(matrix_ptr + o[:, None] * DIM + d[None, :])
    x = tl.load(rows_ptr + row + d[None, :], mask=mask, other=0.0).to(matrix.dtype)
    rotated = tl.dot(x, tl.trans(matrix), input_precision="ieee") * scale
    tl.store(rotated_ptr + row + o[None, :], rotated.to(rotated_ptr.dtype.element_ty), mask=mask)


def plan_dense_rotation(
    rows: torch.Tensor, matrix: torch.Tensor, rotated: torch.Tensor, config: LaunchConfig, *, scale: float = 1.0
) -> Launch:
    """Lay out ``rotated = scale * rows @ matrix.T``, in products of the matrix's dtype and fp32 sums.

    Parameters
    ----------
    rows, rotated : Tensor, (num_rows, dim)
        Contiguous; dtypes may differ.
    matrix : Tensor, (dim, dim)
    config : LaunchConfig
        Its `block_n` counts rows, at least 16.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_rows(rows, rotated)
    dim = rows.shape[-1]
    if matrix.shape != (dim, dim) or not matrix.is_contiguous():
        raise ValueError("matrix must be contiguous, (dim, dim)")
    tile = result_tile(dim)
    return Launch(
        kernel=dense_rotation_kernel,
        grid=(max(1, triton.cdiv(len(rows), config.block_n)), dim // tile),
        arguments=(rows, matrix, rotated, len(rows), scale),
        options={"DIM": dim, "BLOCK_R": config.block_n, "BLOCK_O": tile, "num_warps": config.num_warps},
    )


def result_tile(dim: int) -> int:
    """Elements of a result per program."""
    return min(dim, MAX_RESULT_TILE)
