"""Triton pieces that read planes of TurboQuant codes slice by slice, as fp16, without integer conversion.

A slice is a run of neighbouring elements, one field of neighbouring words (see ``formats/turboquant.py``). A field is
masked in place and read as fp16 where it lies: with the exponent of a suitable power of two it is that power plus the
code; without, it is the code times a power of two below 2**-14, which a matrix product takes exactly.
"""

# Compile-time locals are upper case; Triton builds tuples by addition and resolves `if` statements when it compiles.
# ruff: noqa: N806, RUF005, SIM108

import triton
import triton.language as tl


@triton.jit
def load_slices(row_ptr, mask, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """Load the slices of rows, given pointers to their starts, (rows, 1), as a tuple of fp16 tiles."""
    w = tl.arange(0, WIDTH)
    tiles = ()
    for s in tl.static_range(SLICES):
        tiles = tiles + (tl.load(row_ptr + s * WIDTH + w[None, :], mask=mask, other=0.0).to(tl.float16),)
    return tiles


@triton.jit
def zero_slices(ROWS: tl.constexpr, SLICES: tl.constexpr, WIDTH: tl.constexpr):
    """Give a tuple of fp32 tiles of zeros, one per slice."""
    tiles = ()
    for _ in tl.static_range(SLICES):
        tiles = tiles + (tl.zeros([ROWS, WIDTH], tl.float32),)
    return tiles


@triton.jit
def nibble_steps(words, S: tl.constexpr):
    """Give the codes of slice S of a 4-bit plane less 7.5."""
    if S >= 2:
        words = words >> 8
    if S % 2 == 0:
        # 1031.5 is no fp16 number, so the half is added on its own.
        return ((words & 0xF) | 0x6400).to(tl.float16, bitcast=True) - 1032.0 + 0.5
    return ((words & 0xF0) | 0x5400).to(tl.float16, bitcast=True) - 71.5


@triton.jit
def pair_steps(words, S: tl.constexpr, OFFSET: tl.constexpr):
    """Give the codes of slice S of a 2-bit plane less OFFSET, an integer and a half."""
    PLACE: tl.constexpr = S if S < 5 else S - 4
    MASK: tl.constexpr = 3 << 2 * PLACE
    MAGIC: tl.constexpr = (25 - 2 * PLACE) << 10
    if S >= 5:
        words = words >> 8
    lifted = ((words & MASK) | MAGIC).to(tl.float16, bitcast=True)
    if PLACE == 0:
        return lifted - (1024.5 + OFFSET) + 0.5
    return lifted - (2 ** (10 - 2 * PLACE) + OFFSET)


@triton.jit
def code_steps(words, high, S: tl.constexpr, BITS: tl.constexpr):
    """Give the codes of slice S, of 2, 3 or 4 bits, less half the largest code."""
    if BITS == 4:
        return nibble_steps(words, S)
    if BITS == 2:
        return pair_steps(words, S, 1.5)
    MASK: tl.constexpr = 1 << S
    MAGIC: tl.constexpr = (27 - S) << 10
    four = ((high & MASK) | MAGIC).to(tl.float16, bitcast=True) - 2.0 ** (12 - S)
    return pair_steps(words, S, 3.5) + four


@triton.jit
def cubic_levels(words, high, S: tl.constexpr, BITS: tl.constexpr, ALPHA: tl.constexpr):
    """Give the levels of slice S, over beta."""
    t = code_steps(words, high, S, BITS)
    return t * (t * t + ALPHA)


@triton.jit
def table_levels(words, high, levels, S: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Give the levels of slice S by looking codes of 3 or 4 bits up in a table."""
    if BITS == 4:
        code = (words >> 4 * S) & 0xF
    else:
        code = ((words >> 2 * S) & 3) | (((high >> S) & 1) << 2)
    table = tl.broadcast_to(levels[None, :], [BLOCK_N, 1 << BITS])
    return tl.gather(table, code.to(tl.int32), 1)


@triton.jit
def raw_codes(words, high, S: tl.constexpr, BITS: tl.constexpr):
    """Give the codes of slice S, of 3 or 4 bits, as subnormals: over `raw_unit`."""
    if BITS == 4:
        if S >= 2:
            words = words >> 8
        MASK: tl.constexpr = 0xF << 4 * (S % 2)
        return (words & MASK).to(tl.float16, bitcast=True)
    PLACE: tl.constexpr = S if S < 5 else S - 4
    LOW: tl.constexpr = 3 << 2 * PLACE
    HIGH: tl.constexpr = 1 << S
    if S >= 5:
        words = words >> 8
    bit = (high & HIGH).to(tl.float16, bitcast=True)
    return bit * 2.0 ** (2 + 2 * PLACE - S) + (words & LOW).to(tl.float16, bitcast=True)


@triton.jit
def raw_unit(S: tl.constexpr, BITS: tl.constexpr):
    """Give what `raw_codes` must be multiplied by: fp16 bits that hold only an integer are it times 2**-24."""
    if BITS == 4:
        return 2.0 ** (24 - 4 * (S % 2))
    return 2.0 ** (24 - 2 * (S if S < 5 else S - 4))


@triton.jit
def sign_steps(bits, S: tl.constexpr):
    """Give half of +1 where the bit of slice S is set and of -1 where it is not."""
    MASK: tl.constexpr = 1 << S
    MAGIC: tl.constexpr = (25 - S) << 10
    lifted = ((bits & MASK) | MAGIC).to(tl.float16, bitcast=True)
    if S == 0:
        return lifted - 1025.0 + 0.5
    return lifted - (2.0 ** (10 - S) + 0.5)


@triton.jit
def sign_scores(query, bits):
    """Give half the score of a query, 8 slices, against vectors of +1 and -1 by the bits of a plane."""
    score = tl.dot(query[0], tl.trans(sign_steps(bits, 0)))
    for s in tl.static_range(1, 8):
        score = tl.dot(query[s], tl.trans(sign_steps(bits, s)), score)
    return score
