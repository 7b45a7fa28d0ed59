"""Turn packed codes into halves with few instructions.

Codes are read in words of 16 bits, the width of a transposing load from shared memory and of a matrix operand, so that
no byte has to be moved. Unsigned codes become halves without an integer conversion: the bits of a code below 2^10 are
the half ``code * 2^-24``, a subnormal, and a multiplication by a power of two makes it normal. That multiplication is
also what makes LLVM keep two halves in one register; without it each is masked, shifted and packed by itself.
"""

import triton
import triton.language as tl


@triton.jit
def half(bits, factor):
    """Read 16-bit words as halves and multiply."""
    return (bits.to(tl.float16, bitcast=True) * factor).to(tl.float16)


@triton.jit
def convert_code(code, CODE: tl.constexpr):
    """Convert bytes of fp8 to halves by the target's instruction."""
    tl.static_assert((CODE == "e4m3") | (CODE == "e5m2"))
    fp8: tl.constexpr = tl.float8e4nv if CODE == "e4m3" else tl.float8e5
    return code.to(fp8, bitcast=True).to(tl.float16)


@triton.jit
def byte_planes(words, CODE: tl.constexpr, CONVERT: tl.constexpr):
    """Give the halves of the even (low) and of the odd (high) bytes.

    e4m3: the value, by conversion, or by moving sign, exponent and mantissa to the top of a half, whose exponent bias
    is 8 greater; subnormals come out right, NaN codes (0x7f, 0xff) come out as 480 and -480. e5m2: the value; the code
    is the upper byte of a half, and infinity and NaN stay what they are. int8, stored as code + 128: ``code * 2^-9``,
    which is (bits * 2^-24) * 2^15 - 2^-2.
    """
    if CODE == "e5m2":
        even = (words << 8).to(tl.float16, bitcast=True)
        odd = (words & 0xFF00).to(tl.float16, bitcast=True)
    elif CODE == "int8":
        even = (half(words & 0xFF, 32768.0) - 0.25).to(tl.float16)
        odd = (half(words >> 8, 32768.0) - 0.25).to(tl.float16)
    elif CONVERT:
        even = convert_code(words.to(tl.uint8), CODE)
        odd = convert_code((words >> 8).to(tl.uint8), CODE)
    else:
        tl.static_assert(CODE == "e4m3")
        even = half(((words & 0x80) << 8) | ((words & 0x7F) << 7), 256.0)
        odd = half((words & 0x8000) | ((words & 0x7F00) >> 1), 256.0)
    return even, odd


@triton.jit
def nibble_planes(words):
    """Give the halves of the four nibbles of 16-bit words, lowest first: ``code * 2^-12``, of high nibbles ``2^-8``.

    High nibbles are masked where they lie, which is why they are 16 times larger.
    """
    upper = words >> 8
    low, low_16 = half(words & 0x0F, 4096.0), half(words & 0xF0, 4096.0)
    high, high_16 = half(upper & 0x0F, 4096.0), half(upper & 0xF0, 4096.0)
    return low, low_16, high, high_16
