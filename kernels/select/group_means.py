"""Sums and means of the rows of each group, without atomics: two launches shared by merging and by weighted atoms.

Items are listed per (request, KV head), each with a group and a weight. Membership is written as a matrix of weights,
groups by items, so the sums are a matrix product in a fixed order: the same inputs give the same bits.

Tile names: row a (request, KV head) b, h, g group within a tile, n item within a tile, d dimension. Suffix `_ptr`:
pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launches import Launch, LaunchConfig

NO_GROUP = -1
"""Group of an item that belongs to none."""


@dataclass(frozen=True)
class Items:
    """Items of each (request, KV head) and where they belong.

    Attributes
    ----------
    lens : Tensor of int32, (batch, num_kv_heads)
        Items of each head.
    groups : Tensor of int32, (batch, num_kv_heads, max_items)
        -1: none.
    positions : Tensor of int32, as `groups`, or None
        Token of each item; None: item i is token i.
    weights : Tensor of float32, as `groups`, or None
        None: all one.
    """

    lens: torch.Tensor
    groups: torch.Tensor
    positions: torch.Tensor | None = None
    weights: torch.Tensor | None = None


@triton.jit
def load_positions(positions_row_ptr, item, end, LISTED: tl.constexpr):
    """Give the token of each item."""
    if LISTED:
        item = tl.load(positions_row_ptr + item, mask=item < end, other=0)
    return item


@triton.jit
def group_sums_kernel(
    rows_ptr,
    item_lens_ptr,
    groups_ptr,
    positions_ptr,
    weights_ptr,
    sums_ptr,
    totals_ptr,
    num_kv_heads,
    max_items,
    num_groups,
    rows_stride_b,
    rows_stride_token,
    rows_stride_h,
    LISTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the weighted rows of a tile of groups over one part of the items."""
    row = tl.program_id(0)
    part = tl.program_id(2)
    num_parts = tl.num_programs(2)
    b = row // num_kv_heads
    h = row % num_kv_heads
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    num_items = tl.load(item_lens_ptr + row)
    part_len = tl.cdiv(tl.cdiv(num_items, BLOCK_N), num_parts) * BLOCK_N
    begin = part * part_len
    end = tl.minimum(begin + part_len, num_items)

    items_row = row.to(tl.int64) * max_items
    rows_row_ptr = rows_ptr + b.to(tl.int64) * rows_stride_b + h * rows_stride_h
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    totals = tl.zeros([BLOCK_G], tl.float32)
    # Positions are loaded a tile ahead: a load that feeds a load of the same pass would take the pipeline's stages.
    token = load_positions(positions_ptr + items_row, begin + n, end, LISTED)
    for tile in range(begin, end, BLOCK_N):
        item = tile + n
        valid = item < end
        row_offset = token.to(tl.int64) * rows_stride_token
        token = load_positions(positions_ptr + items_row, item + BLOCK_N, end, LISTED)
        group = tl.load(groups_ptr + items_row + item, mask=valid, other=-1)
        member = (group[None, :] == g[:, None]).to(tl.float32)
        if WEIGHTED:
            member = member * tl.load(weights_ptr + items_row + item, mask=valid, other=0.0)[None, :]
        row_mask = valid[:, None]
        if DIM < BLOCK_D:
            row_mask = row_mask & (d[None, :] < DIM)
        values = tl.load(rows_row_ptr + row_offset[:, None] + d[None, :], mask=row_mask, other=0.0)
        sums = tl.dot(member.to(values.dtype), values, sums, input_precision="ieee")
        totals += tl.sum(member, 1)
    sums_row = (row.to(tl.int64) * num_parts + part) * num_groups + g
    sums_mask = g[:, None] < num_groups
    if DIM < BLOCK_D:
        sums_mask = sums_mask & (d[None, :] < DIM)
    tl.store(sums_ptr + sums_row[:, None] * DIM + d[None, :], sums, mask=sums_mask)
    tl.store(totals_ptr + sums_row, totals, mask=g < num_groups)


@triton.jit
def group_means_kernel(
    rows_ptr,
    group_lens_ptr,
    own_positions_ptr,
    sums_ptr,
    totals_ptr,
    means_ptr,
    log_weights_ptr,
    num_kv_heads,
    num_parts,
    num_groups,
    rows_stride_b,
    rows_stride_token,
    rows_stride_h,
    OWN_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the parts, and the groups' own rows with weight one; write means and logarithms of total weights."""
    row = tl.program_id(0)
    b = row // num_kv_heads
    h = row % num_kv_heads
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    filled = g < tl.minimum(tl.load(group_lens_ptr + row), num_groups)
    mask = filled[:, None]
    out_mask = g[:, None] < num_groups
    if DIM < BLOCK_D:
        mask = mask & (d[None, :] < DIM)
        out_mask = out_mask & (d[None, :] < DIM)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    totals = tl.zeros([BLOCK_G], tl.float32)
    group_row = row.to(tl.int64) * num_groups + g
    if OWN_ROWS:
        token = tl.load(own_positions_ptr + group_row, mask=filled, other=0).to(tl.int64)
        own_ptr = rows_ptr + b.to(tl.int64) * rows_stride_b + h * rows_stride_h + token * rows_stride_token
        sums = tl.load(own_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        totals = tl.full([BLOCK_G], 1.0, tl.float32)
    for part in range(num_parts):
        sums_row = (row.to(tl.int64) * num_parts + part) * num_groups + g
        sums += tl.load(sums_ptr + sums_row[:, None] * DIM + d[None, :], mask=mask, other=0.0)
        totals += tl.load(totals_ptr + sums_row, mask=filled, other=0.0)
    divisor = tl.where(totals > 0.0, totals, 1.0)
    means = sums / divisor[:, None]
    means_ptrs = means_ptr + group_row[:, None] * DIM + d[None, :]
    tl.store(means_ptrs, means.to(means_ptr.dtype.element_ty), mask=out_mask)
    tl.store(log_weights_ptr + group_row, tl.where(filled, tl.log(divisor), 0.0), mask=g < num_groups)


def plan_group_means(
    rows: torch.Tensor,
    items: Items,
    group_lens: torch.Tensor,
    own_positions: torch.Tensor | None,
    buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    config: LaunchConfig,
) -> tuple[Launch, Launch]:
    """Lay out the sums and the means.

    Parameters
    ----------
    rows : Tensor, (batch, tokens, num_kv_heads, dim)
    items : Items
    group_lens : Tensor of int32, (batch, num_kv_heads)
        Groups of each head that exist; means of the others are written as zero.
    own_positions : Tensor of int32, (batch, num_kv_heads, num_groups), or None
        Token that each group starts from, with weight one.
    buffers : sums, totals, means, log_weights
        (batch, num_kv_heads, num_parts, num_groups, dim) and the same without dim, in fp32; (batch, num_kv_heads,
        num_groups, dim) in the dtype of the rows; (batch, num_kv_heads, num_groups) in fp32.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    sums, totals, means, log_weights = buffers
    batch, _, num_kv_heads, dim = rows.shape
    num_parts, num_groups = sums.shape[2:4]
    lists = [tensor for tensor in (items.groups, items.positions, items.weights) if tensor is not None]
    heads = (batch, num_kv_heads)
    requirements = {
        "rows must be contiguous along the last dimension": rows.stride(-1) == 1,
        "lens must be contiguous int32, (batch, num_kv_heads)": all(
            lens.shape == heads and lens.dtype == torch.int32 and lens.is_contiguous()
            for lens in (items.lens, group_lens)
        ),
        "lists of items must be contiguous, (batch, num_kv_heads, max_items), of one shape": all(
            entry.is_contiguous() and entry.shape == (*heads, items.groups.shape[-1]) for entry in lists
        ),
        "groups and positions must be int32 and weights fp32": all(
            entry is None or entry.dtype == dtype
            for entry, dtype in (
                (items.groups, torch.int32),
                (items.positions, torch.int32),
                (items.weights, torch.float32),
                (own_positions, torch.int32),
            )
        ),
        "own_positions must be contiguous, (batch, num_kv_heads, num_groups)": own_positions is None
        or (own_positions.is_contiguous() and own_positions.shape == (*heads, num_groups)),
        "buffers must be contiguous": all(buffer.is_contiguous() for buffer in buffers),
        "buffers must fit rows and each other": sums.shape == (*heads, num_parts, num_groups, dim)
        and totals.shape == sums.shape[:-1]
        and means.shape == (*heads, num_groups, dim)
        and log_weights.shape == means.shape[:-1],
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    block_d = max(16, triton.next_power_of_2(dim))
    block_g = max(16, min(config.block_n, triton.next_power_of_2(num_groups)))
    sums_launch = Launch(
        kernel=group_sums_kernel,
        grid=(batch * num_kv_heads, triton.cdiv(num_groups, block_g), num_parts),
        arguments=(
            *(rows, items.lens, items.groups),
            items.groups if items.positions is None else items.positions,
            totals if items.weights is None else items.weights,
            *(sums, totals, num_kv_heads, items.groups.shape[-1], num_groups),
            *rows.stride()[:3],
        ),
        options={
            "LISTED": items.positions is not None,
            "WEIGHTED": items.weights is not None,
            "DIM": dim,
            "BLOCK_G": block_g,
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_d,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )
    means_block = 16
    means_launch = Launch(
        kernel=group_means_kernel,
        grid=(batch * num_kv_heads, triton.cdiv(num_groups, means_block)),
        arguments=(
            *(rows, group_lens, group_lens if own_positions is None else own_positions),
            *(sums, totals, means, log_weights, num_kv_heads, num_parts, num_groups),
            *rows.stride()[:3],
        ),
        options={
            "OWN_ROWS": own_positions is not None,
            "DIM": dim,
            "BLOCK_G": means_block,
            "BLOCK_D": block_d,
            "num_warps": 4,
        },
    )
    return sums_launch, means_launch
