"""Exact top-k by radix selection: histograms of the scores' bits, digit by digit, then ordered compaction.

Tile names: row a (request, KV head), part a run of a row that one program owns, bin a value of a digit. Suffix
`_ptr`: pointer; `_stride_x`: elements between neighbours along x. Upper case: compile-time.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig

DIGIT_BITS = tl.constexpr(8)
NUM_BINS = tl.constexpr(256)
SIGN_BIT = tl.constexpr(-2147483648)
PARTS_PER_STEP = tl.constexpr(8)
MAX_PARTS = 64
NUM_DIGITS = {torch.float32: 4, torch.float16: 3, torch.bfloat16: 2}
"""Leading bytes of the key that tell all values of a dtype apart, once widened to fp32."""


@triton.jit
def sort_key(score):
    """Give unsigned integers in the order of the scores; both zeros are one key. NaN has no order."""
    score = score.to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | SIGN_BIT)).to(tl.uint32, bitcast=True)


@triton.jit
def part_range(row_len, part, num_parts, BLOCK: tl.constexpr):
    """Give begin and end of a part: whole tiles, the last one cut at the row's end."""
    part_len = tl.cdiv(tl.cdiv(row_len, BLOCK), num_parts) * BLOCK
    begin = part * part_len
    return begin, tl.minimum(begin + part_len, row_len)


@triton.jit
def pick_digit(histograms_ptr, num_parts, remaining):
    """Give the digit in which the remaining-th largest key lies, and how many of the keys lie in higher digits.

    Digit 0 where there are fewer keys than wanted.
    """
    bin_ = tl.arange(0, NUM_BINS)
    step = tl.arange(0, PARTS_PER_STEP)
    counts = tl.zeros([NUM_BINS], tl.int32)
    for first in range(0, num_parts, PARTS_PER_STEP):
        part = first + step
        tile = tl.load(
            histograms_ptr + part[:, None] * NUM_BINS + bin_[None, :], mask=part[:, None] < num_parts, other=0
        )
        counts += tl.sum(tile, 0)
    at_or_above = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.maximum(tl.sum((at_or_above >= remaining).to(tl.int32), 0) - 1, 0)
    return digit, tl.sum(tl.where(bin_ > digit, counts, 0), 0)


@triton.jit
def top_k_histogram_kernel(
    scores_ptr,
    row_lens_ptr,
    budgets_ptr,
    histograms_ptr,
    prefixes_ptr,
    remaining_ptr,
    above_ptr,
    scores_stride_row,
    DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count one digit of those keys of a part whose higher digits are the threshold's.

    The histograms of the digit before tell the threshold's next digit, which every program of the row works out again.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    num_rows = tl.num_programs(0)
    bin_ = tl.arange(0, NUM_BINS)
    begin, end = part_range(tl.load(row_lens_ptr + row), part, num_parts, BLOCK)
    prefix = 0
    if DIGIT == 0:
        if part == 0:
            tl.store(prefixes_ptr + row, 0)
            tl.store(remaining_ptr + row, tl.load(budgets_ptr + row))
    else:
        before = (DIGIT - 1) * num_rows + row
        remaining = tl.load(remaining_ptr + before)
        row_histograms_ptr = histograms_ptr + before.to(tl.int64) * num_parts * NUM_BINS
        digit, higher = pick_digit(row_histograms_ptr, num_parts, remaining)
        prefix = (tl.load(prefixes_ptr + before) << DIGIT_BITS) | digit
        own = tl.load(row_histograms_ptr + part * NUM_BINS + bin_)
        tl.store(above_ptr + before * num_parts + part, tl.sum(tl.where(bin_ > digit, own, 0), 0))
        if part == 0:
            tl.store(prefixes_ptr + before + num_rows, prefix)
            tl.store(remaining_ptr + before + num_rows, remaining - higher)

    counts = tl.zeros([NUM_BINS], tl.int32)
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride_row
    for tile in range(begin, end, BLOCK):
        column = tile + tl.arange(0, BLOCK)
        counted = column < end
        key = sort_key(tl.load(scores_row_ptr + column, mask=counted, other=0.0))
        if DIGIT > 0:
            counted = counted & ((key >> (32 - DIGIT_BITS * DIGIT)).to(tl.int32) == prefix)
        digits = (key >> (32 - DIGIT_BITS * (DIGIT + 1))) & (NUM_BINS - 1)
        counts += tl.histogram(digits.to(tl.int32), NUM_BINS, mask=counted)
    histogram = ((DIGIT * num_rows + row) * num_parts + part).to(tl.int64) * NUM_BINS
    tl.store(histograms_ptr + histogram + bin_, counts)


@triton.jit
def top_k_compact_kernel(
    scores_ptr,
    row_lens_ptr,
    budgets_ptr,
    histograms_ptr,
    prefixes_ptr,
    remaining_ptr,
    above_ptr,
    indices_ptr,
    kept_lens_ptr,
    scores_stride_row,
    max_budget,
    NUM_DIGITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the positions of a part's keys above the threshold, and of the first ones equal to it, in order."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    num_parts = tl.num_programs(1)
    num_rows = tl.num_programs(0)
    bin_ = tl.arange(0, NUM_BINS)
    row_len = tl.load(row_lens_ptr + row)
    kept_len = tl.minimum(row_len, tl.load(budgets_ptr + row))
    last = (NUM_DIGITS - 1) * num_rows + row
    row_histograms_ptr = histograms_ptr + last.to(tl.int64) * num_parts * NUM_BINS
    remaining = tl.load(remaining_ptr + last)
    digit, higher = pick_digit(row_histograms_ptr, num_parts, remaining)
    threshold = ((tl.load(prefixes_ptr + last).to(tl.uint32, bitcast=True)) << DIGIT_BITS) | digit.to(tl.uint32)
    ties = remaining - higher

    # What the parts before this one keep: keys above the threshold, by the digit that decided, and equal ones.
    greater = 0
    equal = 0
    step = tl.arange(0, PARTS_PER_STEP)
    for first in range(0, part, PARTS_PER_STEP):
        other = first + step[:, None]
        tile = tl.load(row_histograms_ptr + other * NUM_BINS + bin_[None, :], mask=other < part, other=0)
        greater += tl.sum(tl.sum(tl.where(bin_[None, :] > digit, tile, 0), 1), 0)
        equal += tl.sum(tl.sum(tl.where(bin_[None, :] == digit, tile, 0), 1), 0)
    other = tl.arange(0, BLOCK_P)
    for earlier_digit in range(NUM_DIGITS - 1):
        above_row_ptr = above_ptr + (earlier_digit * num_rows + row) * num_parts
        greater += tl.sum(tl.load(above_row_ptr + other, mask=other < part, other=0), 0)
    kept = greater + tl.minimum(equal, ties)

    begin, end = part_range(row_len, part, num_parts, BLOCK)
    scores_row_ptr = scores_ptr + row.to(tl.int64) * scores_stride_row
    indices_row_ptr = indices_ptr + row.to(tl.int64) * max_budget
    for tile in range(begin, end, BLOCK):
        column = tile + tl.arange(0, BLOCK)
        inside = column < end
        key = sort_key(tl.load(scores_row_ptr + column, mask=inside, other=0.0)) >> (32 - DIGIT_BITS * NUM_DIGITS)
        is_equal = (inside & (key == threshold)).to(tl.int32)
        rank = equal + tl.cumsum(is_equal, 0) - is_equal
        is_kept = (inside & ((key > threshold) | ((is_equal > 0) & (rank < ties)))).to(tl.int32)
        tl.store(indices_row_ptr + kept + tl.cumsum(is_kept, 0) - is_kept, column, mask=is_kept > 0)
        equal += tl.sum(is_equal, 0)
        kept += tl.sum(is_kept, 0)

    for first in range(part * BLOCK, max_budget, num_parts * BLOCK):
        slot = first + tl.arange(0, BLOCK)
        tl.store(indices_row_ptr + slot, tl.full([BLOCK], -1, tl.int32), mask=(slot >= kept_len) & (slot < max_budget))
    if part == 0:
        tl.store(kept_lens_ptr + row, kept_len)


def plan_top_k(
    inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
) -> tuple[Launch, ...]:
    """Lay out a histogram per digit, and the compaction.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    scores, row_lens, budgets = inputs["scores"], inputs["row_lens"], inputs["budgets"]
    indices, histograms = buffers["indices"], buffers["histograms"]
    num_rows = len(scores)
    requirements = {
        "scores must be fp32, fp16 or bf16": scores.dtype in NUM_DIGITS,
        "scores must be (num_rows, num_columns), contiguous along the columns": scores.dim() == 2
        and scores.stride(-1) == 1,
        "row_lens and budgets must be int32, one per row": row_lens.dtype == budgets.dtype == torch.int32
        and row_lens.shape == budgets.shape == (num_rows,),
        "indices must be contiguous int32, (num_rows, max_budget)": indices.dtype == torch.int32
        and indices.is_contiguous()
        and len(indices) == num_rows,
        "histograms must be (num_digits, num_rows, num_parts, 256)": histograms.shape
        == (NUM_DIGITS.get(scores.dtype), num_rows, histograms.shape[2], NUM_BINS.value),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
    num_digits, _, num_parts, _ = histograms.shape
    state = (histograms, buffers["prefixes"], buffers["remaining"], buffers["above"])
    options = {"BLOCK": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages}
    histogram_launches = [
        Launch(
            kernel=top_k_histogram_kernel,
            grid=(num_rows, num_parts),
            arguments=(scores, row_lens, budgets, *state, scores.stride(0)),
            options={**options, "DIGIT": digit},
        )
        for digit in range(num_digits)
    ]
    compact = Launch(
        kernel=top_k_compact_kernel,
        grid=(num_rows, num_parts),
        arguments=(
            *(scores, row_lens, budgets, *state, indices, buffers["kept_lens"]),
            *(scores.stride(0), indices.shape[1]),
        ),
        options={**options, "NUM_DIGITS": num_digits, "BLOCK_P": triton.next_power_of_2(num_parts)},
    )
    return (*histogram_launches, compact)
