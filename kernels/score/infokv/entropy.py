"""Entropy of the largest logits of a row, exactly, in one read of the row.

The vocabulary is read in tiles of columns. Each column keeps its four largest logits in order, and the largest that it
had to drop. The k-th largest of all that was kept, found bit by bit in registers, is the k-th largest of the row unless
some column dropped a larger one: about one row in 2,000 for independent logits, 2,048 columns and k = 256. Such a row
is marked, and a second launch counts it in memory.
"""

import torch
import triton
import triton.language as tl

from ...launches import Launch, LaunchConfig
from ..batch import check_fp32, require

_SIGNIFICANT_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}
"""Leading bits of fp32 that tell two numbers of a dtype apart."""
_LOWEST_KEY = tl.constexpr(-(1 << 31))
_MARK = tl.constexpr(-1.0)
"""In place of an entropy, which is never negative: a column dropped one of the largest."""


@triton.jit
def _order(value):
    """Map fp32 to int32 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _trial(key, step):
    """Set the next bit of a key that is being found from the highest bit on."""
    return key ^ (tl.full([], 1, tl.int32) << (31 - step))


@triton.jit
def _value(key, BITS: tl.constexpr):
    """Give back the number whose key's leading bits were found; the others are ones in keys of negative numbers."""
    key = key | ((key >> 31) & ((1 << (32 - BITS)) - 1))
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _sums_above(logit, kth, top):
    """Give which logits lie above `kth`, e^x and x e^x there, x counted from the largest logit; 0 elsewhere."""
    above = logit > kth
    distance = tl.where(above, logit - top, 0.0)
    weight = tl.where(above, tl.exp(distance), 0.0)
    return above.to(tl.int32), weight, weight * distance


@triton.jit
def _entropy(number, total, moment, kth, top, K: tl.constexpr):
    """Add the logits equal to the k-th largest, as many as are missing, and give the entropy in nats."""
    # None are added where fewer than K are above -inf: 0 ln 0 = 0.
    finite = kth > float("-inf")
    distance = tl.where(finite, kth - top, 0.0)
    ties = tl.where(finite, (K - tl.sum(number, 0)).to(tl.float32) * tl.exp(distance), 0.0)
    sum_of_weights = tl.sum(total, 0) + ties
    return tl.log(sum_of_weights) - (tl.sum(moment, 0) + ties * distance) / sum_of_weights


@triton.jit
def top_k_entropy_kernel(
    logits_ptr,
    entropy_ptr,
    vocabulary,
    logits_stride_row,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write one row's entropy, or the mark where a column dropped one of the K largest."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride_row
    n = tl.arange(0, TILE)
    first = tl.full([TILE], float("-inf"), tl.float32)
    second = first
    third = first
    fourth = first
    dropped = first
    for tile in tl.range(0, vocabulary, TILE, num_stages=NUM_STAGES):
        logit = tl.load(logits_ptr + tile + n, mask=tile + n < vocabulary, other=float("-inf")).to(tl.float32)
        lower = tl.minimum(first, logit)
        first = tl.maximum(first, logit)
        logit = tl.minimum(second, lower)
        second = tl.maximum(second, lower)
        lower = tl.minimum(third, logit)
        third = tl.maximum(third, logit)
        logit = tl.minimum(fourth, lower)
        fourth = tl.maximum(fourth, lower)
        dropped = tl.maximum(dropped, logit)

    key = tl.full([], _LOWEST_KEY, tl.int32)
    for step in range(BITS):
        trial = _trial(key, step)
        count = (_order(first) >= trial).to(tl.int32) + (_order(second) >= trial).to(tl.int32)
        count += (_order(third) >= trial).to(tl.int32) + (_order(fourth) >= trial).to(tl.int32)
        key = tl.where(tl.sum(count, 0) >= K, trial, key)
    kth = _value(key, BITS)

    top = tl.max(first, 0)
    number, total, moment = _sums_above(first, kth, top)
    number_2, total_2, moment_2 = _sums_above(second, kth, top)
    number_3, total_3, moment_3 = _sums_above(third, kth, top)
    number_4, total_4, moment_4 = _sums_above(fourth, kth, top)
    number += number_2 + number_3 + number_4
    total += total_2 + total_3 + total_4
    moment += moment_2 + moment_3 + moment_4
    entropy = _entropy(number, total, moment, kth, top, K)
    tl.store(entropy_ptr + row, tl.where(tl.max(dropped, 0) > kth, _MARK, entropy))


@triton.jit
def count_marked_rows_kernel(
    logits_ptr,
    entropy_ptr,
    vocabulary,
    logits_stride_row,
    K: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
):
    """Write the entropy of a marked row, reading it once per bit; leave other rows alone."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(entropy_ptr + row)
    if before == _MARK:
        logits_ptr += row * logits_stride_row
        n = tl.arange(0, TILE)
        key = tl.full([], _LOWEST_KEY, tl.int32)
        highest = tl.full([TILE], float("-inf"), tl.float32)
        for step in range(BITS):
            trial = _trial(key, step)
            count = tl.zeros([TILE], tl.int32)
            for tile in range(0, vocabulary, TILE):
                logit = tl.load(logits_ptr + tile + n, mask=tile + n < vocabulary, other=float("-inf")).to(tl.float32)
                count += (_order(logit) >= trial).to(tl.int32)
                highest = tl.maximum(highest, logit)
            key = tl.where(tl.sum(count, 0) >= K, trial, key)
        kth = _value(key, BITS)
        top = tl.max(highest, 0)
        number = tl.zeros([TILE], tl.int32)
        total = tl.zeros([TILE], tl.float32)
        moment = tl.zeros([TILE], tl.float32)
        for tile in range(0, vocabulary, TILE):
            logit = tl.load(logits_ptr + tile + n, mask=tile + n < vocabulary, other=float("-inf")).to(tl.float32)
            tile_number, tile_total, tile_moment = _sums_above(logit, kth, top)
            number += tile_number
            total += tile_total
            moment += tile_moment
        tl.store(entropy_ptr + row, _entropy(number, total, moment, kth, top, K))


def plan_top_k_entropy(logits: torch.Tensor, entropy: torch.Tensor, k: int, config: LaunchConfig) -> tuple[Launch, ...]:
    """Lay out the entropy over the `k` largest of each row of `logits`, (rows, vocabulary).

    Raises
    ------
    ValueError
        If shapes, dtypes or strides do not fit, or a tile holds fewer than `k` logits.
    """
    check_fp32(entropy=entropy)
    rows, vocabulary = logits.shape
    require(
        {
            "logits must be fp32, fp16 or bf16": logits.dtype in _SIGNIFICANT_BITS,
            "logits must be contiguous along the vocabulary": logits.stride(1) == 1,
            "entropy must be (rows,)": entropy.shape == (rows,),
            "block_n must be at least k": config.block_n >= k,
        }
    )
    arguments = (logits, entropy, vocabulary, logits.stride(0))
    options = {
        "K": k,
        "TILE": config.block_n,
        "BITS": _SIGNIFICANT_BITS[logits.dtype],
        "num_warps": config.num_warps,
    }
    return (
        Launch(top_k_entropy_kernel, (rows,), arguments, {**options, "NUM_STAGES": config.num_stages}),
        Launch(count_marked_rows_kernel, (rows,), arguments, options),
    )
