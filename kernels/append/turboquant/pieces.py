"""Triton pieces that turn tiles of vectors into TurboQuant codes and planes."""

# Compile-time locals are upper case.
# ruff: noqa: N806

import triton
import triton.language as tl


@triton.jit
def rotate_rows(row_ptr, mask, matrix_ptr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr):
    """Multiply 16-bit rows by a matrix of +1 and -1, whose products are exact; give results and squared lengths.

    Parameters
    ----------
    row_ptr : pointer tensor, (rows, 1)
    matrix_ptr : pointer
        To (HEAD_DIM, HEAD_DIM) of the rows' dtype, input element by result element.
    """
    k = tl.arange(0, CHUNK)
    d = tl.arange(0, HEAD_DIM)
    rotated = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    square = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, HEAD_DIM, CHUNK):
        x = tl.load(row_ptr + first + k[None, :], mask=mask, other=0.0)
        matrix = tl.load(matrix_ptr + (first + k)[:, None] * HEAD_DIM + d[None, :])
        rotated = tl.dot(x, matrix, rotated)
        wide = x.to(tl.float32)
        square += tl.sum(wide * wide, 1)
    return rotated, square


@triton.jit
def quantize_symmetric(x, THRESHOLDS: tl.constexpr, LEVELS: tl.constexpr, HALF: tl.constexpr):
    """Give codes and levels of the nearest levels; only the positive thresholds and levels are passed."""
    magnitude = tl.abs(x)
    step = tl.zeros_like(x).to(tl.int32)
    level = tl.full(x.shape, LEVELS[0], tl.float32)
    for i in tl.static_range(HALF - 1):
        above = magnitude >= THRESHOLDS[i]
        step += above.to(tl.int32)
        level = tl.where(above, LEVELS[i + 1], level)
    positive = x >= 0.0
    return tl.where(positive, HALF + step, HALF - 1 - step), tl.where(positive, level, -level)


@triton.jit
def gather_slices(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, BITS: tl.constexpr):
    """Put code ``j + i WIDTH`` of each row into bits ``i BITS`` up of word ``j``."""
    shift = BITS * tl.arange(0, SLICES)
    return tl.sum(tl.reshape(codes, [ROWS, SLICES, WIDTH]) << shift[None, :, None], 1)


@triton.jit
def store_planes(
    codes_ptr, high_ptr, codes, page, row, mask, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BITS: tl.constexpr
):
    """Pack codes and store them: `page` in units of two bytes, `row` counts tokens and heads within the block."""
    EIGHTH: tl.constexpr = HEAD_DIM // 8
    w = tl.arange(0, EIGHTH)
    byte_offset = (2 * page + row * EIGHTH)[:, None] + w[None, :]
    word_offset = (page + row * EIGHTH)[:, None] + w[None, :]
    if BITS == 4:
        quarter = tl.arange(0, HEAD_DIM // 4)
        words = gather_slices(codes, ROWS, HEAD_DIM // 4, 4, 4)
        offset = (page + row * (HEAD_DIM // 4))[:, None] + quarter[None, :]
        tl.store(codes_ptr + offset, words.to(tl.uint16), mask=mask[:, None])
    if BITS == 3:
        words = gather_slices(codes & 3, ROWS, EIGHTH, 8, 2)
        tl.store(codes_ptr + word_offset, words.to(tl.uint16), mask=mask[:, None])
        high = gather_slices(codes >> 2, ROWS, EIGHTH, 8, 1)
        tl.store(high_ptr + byte_offset, high.to(tl.uint8), mask=mask[:, None])
    if BITS == 2:
        words = gather_slices(codes, ROWS, EIGHTH, 8, 2)
        tl.store(codes_ptr + word_offset, words.to(tl.uint16), mask=mask[:, None])
    if BITS == 1:
        words = gather_slices(codes, ROWS, EIGHTH, 8, 1)
        tl.store(codes_ptr + byte_offset, words.to(tl.uint8), mask=mask[:, None])
