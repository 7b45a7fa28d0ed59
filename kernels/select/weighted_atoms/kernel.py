"""Balanced assignment of tokens to centres in rounds, in parallel-prefix form; atoms are then the means of clusters.

Tile names: row a (request, KV head), part a run of tokens that one program owns, t token within a tile, c centre,
f feature. Suffix `_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..group_means import Items, plan_group_means

UNASSIGNED = tl.constexpr(-1)
MAX_CENTRES = 256
"""Centres of one row: their features and their counts stay in one program's registers."""


@triton.jit
def part_range(row_len, part, num_parts, BLOCK_T: tl.constexpr):
    """Give begin and end of a part: whole tiles, the last one cut at the row's end."""
    part_len = tl.cdiv(tl.cdiv(row_len, BLOCK_T), num_parts) * BLOCK_T
    begin = part * part_len
    return begin, tl.minimum(begin + part_len, row_len)


@triton.jit
def load_seats(seats_ptr, row, row_len, num_centres, c, FIRST: tl.constexpr):
    """Load the free seats of each centre; at first the sizes of a balanced division, the larger ones at the front."""
    if FIRST:
        seats = row_len // num_centres + (c < row_len % num_centres).to(tl.int32)
        seats = tl.where(c < num_centres, seats, 0)
    else:
        seats = tl.load(seats_ptr + row * num_centres + c, mask=c < num_centres, other=0)
    return seats


@triton.jit
def propose_kernel(
    features_ptr,
    centres_ptr,
    row_lens_ptr,
    assignment_ptr,
    seats_ptr,
    choice_ptr,
    counts_ptr,
    max_tokens,
    num_centres,
    features_stride_row,
    features_stride_token,
    centres_stride_row,
    centres_stride_c,
    FIRST: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Let each token without a seat choose the nearest centre that has one, the first of equals; count choices."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    t = tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    f = tl.arange(0, BLOCK_F)
    row_len = tl.load(row_lens_ptr + row)
    begin, end = part_range(row_len, part, num_parts, BLOCK_T)
    seats = load_seats(seats_ptr, row, row_len, num_centres, c, FIRST)
    centres = tl.load(
        centres_ptr + row.to(tl.int64) * centres_stride_row + c[:, None] * centres_stride_c + f[None, :],
        mask=(c[:, None] < num_centres) & (f[None, :] < NUM_FEATURES),
        other=0.0,
    )
    # |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2), so the nearest centre has the largest bracket.
    wide = centres.to(tl.float32)
    offset = tl.where(seats > 0, -0.5 * tl.sum(wide * wide, 1), float("-inf"))

    counts = tl.zeros([BLOCK_C], tl.int32)
    features_row_ptr = features_ptr + row.to(tl.int64) * features_stride_row
    token_row = row.to(tl.int64) * max_tokens
    for tile in range(begin, end, BLOCK_T):
        token = tile + t
        features = tl.load(
            features_row_ptr + token[:, None] * features_stride_token + f[None, :],
            mask=(token[:, None] < end) & (f[None, :] < NUM_FEATURES),
            other=0.0,
        )
        closeness = tl.dot(features, tl.trans(centres), input_precision="ieee") + offset[None, :]
        top = tl.max(closeness, 1)
        choice = tl.min(tl.where(closeness == top[:, None], c[None, :], BLOCK_C), 1)
        chooses = (token < end) & (top > float("-inf"))
        if not FIRST:
            chooses = chooses & (tl.load(assignment_ptr + token_row + token, mask=token < end, other=0) == UNASSIGNED)
        choice = tl.where(chooses, choice, UNASSIGNED)
        tl.store(choice_ptr + token_row + token, choice, mask=token < end)
        counts += tl.sum((choice[:, None] == c[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + (row * num_parts + part) * num_centres + c, counts, mask=c < num_centres)


@triton.jit
def accept_kernel(
    row_lens_ptr,
    assignment_ptr,
    seats_ptr,
    next_seats_ptr,
    choice_ptr,
    counts_ptr,
    waiting_ptr,
    max_tokens,
    num_centres,
    FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Seat the first tokens that chose each centre, as many as it has seats; count those left waiting."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    t = tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    row_len = tl.load(row_lens_ptr + row)
    begin, end = part_range(row_len, part, num_parts, BLOCK_T)
    seats = load_seats(seats_ptr, row, row_len, num_centres, c, FIRST)
    ahead = tl.zeros([BLOCK_C], tl.int32)
    chosen = tl.zeros([BLOCK_C], tl.int32)
    for other in range(num_parts):
        counts = tl.load(counts_ptr + (row * num_parts + other) * num_centres + c, mask=c < num_centres, other=0)
        ahead += tl.where(other < part, counts, 0)
        chosen += counts
    if part == 0:
        left = seats - tl.minimum(chosen, seats)
        tl.store(next_seats_ptr + row * num_centres + c, left, mask=c < num_centres)

    waiting = 0
    token_row = row.to(tl.int64) * max_tokens
    for tile in range(begin, end, BLOCK_T):
        token = tile + t
        choice = tl.load(choice_ptr + token_row + token, mask=token < end, other=UNASSIGNED)
        chose = (choice[:, None] == c[None, :]).to(tl.int32)
        rank = ahead[None, :] + tl.cumsum(chose, 0) - chose
        seated = tl.sum(chose * (rank < seats[None, :]).to(tl.int32), 1) > 0
        assigned = tl.where(seated, choice, UNASSIGNED)
        if FIRST:
            tl.store(assignment_ptr + token_row + token, assigned, mask=token < end)
            waits = (token < end) & (assigned == UNASSIGNED)
        else:
            tl.store(assignment_ptr + token_row + token, assigned, mask=(token < end) & seated)
            waits = (choice != UNASSIGNED) & (assigned == UNASSIGNED)
        ahead += tl.sum(chose, 0)
        waiting += tl.sum(waits.to(tl.int32), 0)
    tl.store(waiting_ptr + row * num_parts + part, waiting)


@triton.jit
def fill_kernel(
    row_lens_ptr,
    assignment_ptr,
    seats_ptr,
    waiting_ptr,
    max_tokens,
    num_centres,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Give the tokens still waiting, in order, the free seats, in order of centres."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    t = tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_C)
    other = tl.arange(0, BLOCK_P)
    begin, end = part_range(tl.load(row_lens_ptr + row), part, num_parts, BLOCK_T)
    seats = tl.load(seats_ptr + row * num_centres + c, mask=c < num_centres, other=0)
    seats_up_to = tl.cumsum(seats, 0)
    ahead = tl.sum(tl.load(waiting_ptr + row * num_parts + other, mask=other < part, other=0), 0)
    token_row = row.to(tl.int64) * max_tokens
    for tile in range(begin, end, BLOCK_T):
        token = tile + t
        assigned = tl.load(assignment_ptr + token_row + token, mask=token < end, other=0)
        waits = (assigned == UNASSIGNED).to(tl.int32)
        rank = ahead + tl.cumsum(waits, 0) - waits
        centre = tl.sum((seats_up_to[None, :] <= rank[:, None]).to(tl.int32), 1)
        tl.store(assignment_ptr + token_row + token, centre, mask=(token < end) & (waits > 0))
        ahead += tl.sum(waits, 0)
    # Places beyond the row's end belong to no cluster.
    last = part == num_parts - 1
    for tile in range(end, tl.where(last, max_tokens, end), BLOCK_T):
        tl.store(assignment_ptr + token_row + tile + t, tl.full([BLOCK_T], -1, tl.int32), mask=tile + t < max_tokens)


def plan_assignment(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], num_rounds: int, config: LaunchConfig
) -> tuple[Launch, ...]:
    """Lay out `num_rounds` rounds of choosing and seating, and the filling of what is left.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    features, centres, row_lens = inputs["features"], inputs["centres"], inputs["row_lens"]
    assignment, choice, seats = buffers["assignment"], buffers["choice"], buffers["seats"]
    counts, waiting = buffers["counts"], buffers["waiting"]
    batch, num_kv_heads, max_tokens, num_features = features.shape
    num_centres, num_parts = centres.shape[2], waiting.shape[-1]
    num_rows = batch * num_kv_heads
    requirements = {
        "features must be contiguous, (batch, num_kv_heads, max_tokens, num_features)": features.is_contiguous(),
        "centres must be contiguous, (batch, num_kv_heads, num_centres, num_features)": centres.is_contiguous()
        and centres.shape == (batch, num_kv_heads, num_centres, num_features),
        "features and centres must have one dtype": features.dtype == centres.dtype,
        f"there must be 1 to {MAX_CENTRES} centres": 1 <= num_centres <= MAX_CENTRES,
        "row_lens must be contiguous int32, (batch, num_kv_heads)": row_lens.dtype == torch.int32
        and row_lens.is_contiguous()
        and row_lens.shape == (batch, num_kv_heads),
        "assignment and choice must be contiguous int32, (batch, num_kv_heads, max_tokens)": all(
            tensor.dtype == torch.int32 and tensor.is_contiguous() and tensor.shape == features.shape[:3]
            for tensor in (assignment, choice)
        ),
        "seats must be (num_rounds, num_rows, num_centres)": seats.shape == (num_rounds, num_rows, num_centres),
        "at least one round is needed": num_rounds >= 1,
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    block_c = max(16, triton.next_power_of_2(num_centres))
    tiles = {"BLOCK_T": config.block_n, "BLOCK_C": block_c, "num_warps": config.num_warps}
    grid = (num_rows, num_parts)
    launches = []
    for index in range(num_rounds):
        # The first round's seats follow from the length alone, and are not read.
        free, left = seats[max(0, index - 1)], seats[index]
        launches += [
            Launch(
                kernel=propose_kernel,
                grid=grid,
                arguments=(
                    *(features, centres, row_lens, assignment, free, choice, counts, max_tokens, num_centres),
                    *(features.stride(1), features.stride(2), centres.stride(1), centres.stride(2)),
                ),
                options={
                    **tiles,
                    "FIRST": index == 0,
                    "NUM_FEATURES": num_features,
                    "BLOCK_F": max(16, triton.next_power_of_2(num_features)),
                    "num_stages": config.num_stages,
                },
            ),
            Launch(
                kernel=accept_kernel,
                grid=grid,
                arguments=(row_lens, assignment, free, left, choice, counts, waiting, max_tokens, num_centres),
                options={**tiles, "FIRST": index == 0},
            ),
        ]
    fill = Launch(
        kernel=fill_kernel,
        grid=grid,
        arguments=(row_lens, assignment, seats[-1], waiting, max_tokens, num_centres),
        options={**tiles, "BLOCK_P": triton.next_power_of_2(num_parts)},
    )
    return (*launches, fill)


def plan_weighted_atoms(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], num_rounds: int, config: LaunchConfig
) -> tuple[Launch, ...]:
    """Lay out the assignment, then the mean key, mean value and log-size of each cluster.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    assignment = plan_assignment(inputs, buffers, num_rounds, config)
    row_lens = inputs["row_lens"]
    items = Items(row_lens, buffers["assignment"])
    # Centres from the number of tokens on have no member.
    scratch = (buffers["sums"], buffers["totals"])
    means = []
    for name in ("key", "value"):
        outputs = (buffers[f"atom_{name}"], buffers["log_weight"])
        means += plan_group_means(inputs[name], items, row_lens, None, (*scratch, *outputs), config)
    return (*assignment, *means)
