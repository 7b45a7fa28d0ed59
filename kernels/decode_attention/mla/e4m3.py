"""fp8 e4m3 to fp16 in Triton, also where the compiler has no conversion for it."""

from typing import Final

import torch
import triton
import triton.language as tl

BITS_FACTOR: Final = 2.0**-8
"""What a value is multiplied by if its bits are moved: the exponent biases are 7 (e4m3) and 15 (fp16)."""
NATIVE_CONVERSION: Final = ("sm_90", "sm_100", "sm_120")
"""Targets with an instruction for e4m3 to fp16. Triton 3.6 refuses it for sm_80 and emulates it on gfx942."""


@triton.jit
def e4m3_to_fp16(code, BY_BITS: tl.constexpr):
    """Convert a tile of codes; by bits, `code` is int8 and the result is smaller by `BITS_FACTOR`, subnormals too.

    ``s eeee mmm`` becomes ``s 0eeee mmm0000000``: the sign-extended byte moved by 7 has the sign twice, and the mask
    drops the lower one. NaN (0x7F) would become 480 * 2**-8; the encoder never writes it.
    """
    if BY_BITS:
        half = (code.to(tl.int16) << 7) & -16385
        return half.to(tl.float16, bitcast=True)
    else:
        return code.to(tl.float16)


def codes_for(latent: torch.Tensor, by_bits: bool) -> tuple[torch.Tensor, float]:
    """Give e4m3 codes as the kernel wants them, and the factor that its fp16 values must be multiplied by."""
    return (latent.view(torch.int8), 1.0 / BITS_FACTOR) if by_bits else (latent, 1.0)


@triton.jit
def fp32_to_e4m3(value, BY_BITS: tl.constexpr):
    """Round a tile of fp32 within 448 to e4m3, to nearest even; by bits, the result is uint8.

    Normal numbers lose 20 bits of the significand by an integer addition that carries into the exponent; for those
    below 2**-6, adding 2**14 leaves the multiple of 2**-9, the smallest subnormal, in the lowest bits.
    """
    if BY_BITS:
        bits = value.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        magnitude = size.to(tl.float32, bitcast=True)
        subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        return (sign | tl.where(magnitude < 0.015625, subnormal, normal)).to(tl.uint8)
    else:
        return value.to(tl.float8e4nv)
