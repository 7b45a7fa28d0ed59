"""Triton pieces of the scores: the sum of exponentials over splits, norms that never divide by zero, unused rows."""

import triton
import triton.language as tl

from ..decode_attention.softmax import split_range

LOWEST = tl.constexpr(-1e30)
"""Start of a running maximum: below every score, yet finite, so that a tile without a visible key leaves no NaN."""


@triton.jit
def combine_lse(lse_ptr, mask, NUM_SPLITS: tl.constexpr):
    """Give the log2-sum-exp2 of rows from those of their splits, at `lse_ptr` (rows) + split.

    A row that the mask excludes, or that saw no key, gets +inf: its weights exp2(score - lse) are then 0.
    """
    s = tl.arange(0, NUM_SPLITS)
    lse = tl.load(lse_ptr[:, None] + s[None, :], mask=mask[:, None], other=float("-inf"))
    top = tl.max(lse, 1)
    finite_top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse - finite_top[:, None]), 1)
    return tl.where(total > 0.0, finite_top + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))


@triton.jit
def fill_beyond(scores_row_ptr, used, length, split, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write -inf to a split's share of a row of scores from `used` to `length`."""
    n = tl.arange(0, BLOCK_N)
    begin, end = split_range(length - used, split, NUM_SPLITS, BLOCK_N)
    for tile in range(begin, end, BLOCK_N):
        tl.store(scores_row_ptr + used + tile + n, tl.full([BLOCK_N], float("-inf"), tl.float32), mask=tile + n < end)
