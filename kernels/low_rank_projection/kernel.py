"""Multiply rows by one matrix per group: into a basis (project), out of it (expand), or into slots of the KV pool.

Tile names: t row, k input feature, n output feature; g group. Suffix `_ptr`: pointer; `_stride_x`: elements between
neighbours along x. Upper case: compile-time.
"""

import torch
import triton
import triton.language as tl

from ..launches import Launch
from .batch import ProjectionConfig


@triton.jit
def low_rank_projection_kernel(
    rows_ptr,
    basis_ptr,
    output_ptr,
    slots_ptr,
    num_rows,
    in_features,
    rows_stride_outer,
    rows_stride_g,
    rows_stride_inner,
    basis_stride_outer,
    basis_stride_inner,
    basis_stride_k,
    basis_stride_n,
    output_stride_outer,
    output_stride_g,
    output_stride_inner,
    OUT_FEATURES: tl.constexpr,
    ROWS_INNER: tl.constexpr,
    BASIS_INNER: tl.constexpr,
    OUTPUT_INNER: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one tile of rows of one group; row and group indices count in pairs (outer, inner) of strides."""
    g = tl.program_id(2)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t_mask = t < num_rows
    n_mask = n < OUT_FEATURES
    row_offset = (t // ROWS_INNER).to(tl.int64) * rows_stride_outer + (t % ROWS_INNER) * rows_stride_inner
    row_ptr = rows_ptr + g * rows_stride_g + row_offset[:, None] + k[None, :]
    group_ptr = basis_ptr + (g // BASIS_INNER) * basis_stride_outer + (g % BASIS_INNER) * basis_stride_inner
    matrix_ptr = group_ptr + k[:, None] * basis_stride_k + n[None, :] * basis_stride_n

    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, in_features, BLOCK_K):
        k_mask = first + k < in_features
        rows = tl.load(row_ptr + first, mask=t_mask[:, None] & k_mask[None, :], other=0.0)
        matrix = tl.load(matrix_ptr + first * basis_stride_k, mask=k_mask[:, None] & n_mask[None, :], other=0.0)
        total = tl.dot(rows, matrix, total, input_precision="ieee")

    slot = t.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + t, mask=t_mask, other=-1)
        t_mask = slot >= 0
    output_offset = (slot // OUTPUT_INNER) * output_stride_outer + (slot % OUTPUT_INNER) * output_stride_inner
    tl.store(
        output_ptr + g * output_stride_g + output_offset[:, None] + n[None, :],
        total.to(output_ptr.dtype.element_ty),
        mask=t_mask[:, None] & n_mask[None, :],
    )


def plan_project(
    rows: torch.Tensor,
    basis: torch.Tensor,
    output: torch.Tensor,
    config: ProjectionConfig,
    slots: torch.Tensor | None = None,
) -> Launch:
    """Lay out coordinates of rows: (num_tokens, num_groups, heads * head_dim) times each group's basis.

    Parameters
    ----------
    rows : Tensor, (num_tokens, num_groups, heads * head_dim)
    basis : Tensor, (num_groups, rank, heads * head_dim)
    output : Tensor, (num_tokens, num_groups, rank), or with `slots` a field, (num_blocks, block_size, num_groups, rank)
    slots : Tensor of int64, (num_tokens,), optional
        Block id times block size plus row of each token, -1 for a row that is not written.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    num_tokens, num_groups, width = rows.shape
    rank = basis.shape[1]
    inner = 1
    if slots is not None:
        inner = output.shape[1]
        if slots.dtype != torch.int64 or slots.shape != (num_tokens,) or output.ndim != 4:
            raise ValueError("slots must be int64, one per token, and the output a field of the pool")
    elif output.shape[0] != num_tokens or output.ndim != 3:
        raise ValueError("the output must be (num_tokens, num_groups, rank)")
    if basis.shape != (num_groups, rank, width) or output.shape[-2:] != (num_groups, rank):
        raise ValueError(
            "basis must be (num_groups, rank, heads * head_dim), and the output end in its groups and rank"
        )
    strides = output.stride()
    return _launch(
        (rows, basis, output, slots),
        num_tokens,
        (rows.stride(0), rows.stride(1), 0),
        (basis.stride(0), 0, basis.stride(2), basis.stride(1)),
        (strides[0], strides[-2], strides[1] if slots is not None else 0),
        {"ROWS_INNER": 1, "BASIS_INNER": 1, "OUTPUT_INNER": inner},
        (num_groups, width, rank),
        config,
    )


def plan_expand(
    coordinates: torch.Tensor, basis: torch.Tensor, output: torch.Tensor, config: ProjectionConfig, num_kv_heads: int
) -> Launch:
    """Lay out each query head's values from its coordinates in the basis of its KV head's group.

    Parameters
    ----------
    coordinates : Tensor, (batch, num_query_heads, rank)
    basis : Tensor, (num_groups, rank, heads * head_dim)
    output : Tensor, (batch, num_query_heads, head_dim)

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    batch, num_query_heads, rank = coordinates.shape
    head_dim = output.shape[-1]
    num_groups, _, width = basis.shape
    heads = num_kv_heads // num_groups
    group = num_query_heads // num_kv_heads
    if basis.shape[1] != rank or width != heads * head_dim or output.shape != (batch, num_query_heads, head_dim):
        raise ValueError("basis must be (num_groups, rank, heads * head_dim) of the coordinates and the output")
    return _launch(
        (coordinates, basis, output, None),
        batch * group,
        (coordinates.stride(0), group * coordinates.stride(1), coordinates.stride(1)),
        (basis.stride(0), head_dim * basis.stride(2), basis.stride(1), basis.stride(2)),
        (output.stride(0), group * output.stride(1), output.stride(1)),
        {"ROWS_INNER": group, "BASIS_INNER": heads, "OUTPUT_INNER": group},
        (num_kv_heads, rank, head_dim),
        config,
    )


def _launch(
    tensors: tuple[torch.Tensor | None, ...],
    num_rows: int,
    rows_strides: tuple[int, ...],
    basis_strides: tuple[int, ...],
    output_strides: tuple[int, ...],
    inner: dict[str, int],
    shape: tuple[int, int, int],
    config: ProjectionConfig,
) -> Launch:
    rows, basis, output, slots = tensors
    if rows is None or basis is None or output is None or not rows.dtype == basis.dtype == output.dtype:
        raise ValueError("rows, basis and output must have one dtype")
    if not rows.stride(-1) == output.stride(-1) == 1:
        raise ValueError("rows and output must be contiguous along their features")
    num_groups, in_features, out_features = shape
    return Launch(
        kernel=low_rank_projection_kernel,
        grid=(triton.cdiv(num_rows, config.block_n), triton.cdiv(out_features, config.block_out), num_groups),
        arguments=(
            *(rows, basis, output, slots, num_rows, in_features),
            *rows_strides,
            *basis_strides,
            *output_strides,
        ),
        options={
            "OUT_FEATURES": out_features,
            **inner,
            "HAS_SLOTS": slots is not None,
            "BLOCK_T": config.block_n,
            "BLOCK_N": config.block_out,
            "BLOCK_K": config.block_in,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
