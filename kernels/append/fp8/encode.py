"""Round fp32 to fp8 in integer operations, for targets without the conversion."""

import triton
import triton.language as tl


@triton.jit
def encode_fp8(values, CODE: tl.constexpr, CONVERT: tl.constexpr):
    """Give the codes, uint8, of fp32 values: nearest, ties to even, clamped to the largest finite code.

    By bits: normals round where fp32 keeps the bits that fp8 lacks, and change the exponent's bias; for subnormals,
    adding ``2^23`` of their units leaves the rounded code in the lowest bits. A NaN becomes the largest code (by
    conversion: NaN).
    """
    tl.static_assert((CODE == "e4m3") | (CODE == "e5m2"))
    limit: tl.constexpr = 448.0 if CODE == "e4m3" else 57344.0
    values = tl.minimum(tl.maximum(values, -limit), limit)
    if CONVERT:
        fp8: tl.constexpr = tl.float8e4nv if CODE == "e4m3" else tl.float8e5
        code = values.to(fp8).to(tl.uint8, bitcast=True)
    else:
        lost_bits: tl.constexpr = 20 if CODE == "e4m3" else 21
        bias_change: tl.constexpr = (127 - 7) << 3 if CODE == "e4m3" else (127 - 15) << 2
        smallest_normal: tl.constexpr = 2.0**-6 if CODE == "e4m3" else 2.0**-14
        subnormal_shift: tl.constexpr = 2.0**14 if CODE == "e4m3" else 2.0**7
        bits = values.to(tl.int32, bitcast=True)
        magnitude_bits = bits & 0x7FFFFFFF
        magnitude = magnitude_bits.to(tl.float32, bitcast=True)
        half_unit = (1 << (lost_bits - 1)) - 1 + ((magnitude_bits >> lost_bits) & 1)
        normal = ((magnitude_bits + half_unit) >> lost_bits) - bias_change
        subnormal = (magnitude + subnormal_shift).to(tl.int32, bitcast=True) & 0xFF
        magnitude_code = tl.where(magnitude < smallest_normal, subnormal, normal)
        code = (magnitude_code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code
