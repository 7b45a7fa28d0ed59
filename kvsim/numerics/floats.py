"""Narrow floating-point formats: what a number becomes when it is stored in one.

E4M3, E5M2 and E2M1 are those of the OCP 8-bit Floating Point and Microscaling specifications; rounding is to nearest,
ties to even, and magnitudes beyond the largest finite one become it, as GPUs' saturating conversions do.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.arrays import DoubleArray, FloatArray

CodeBytes = NDArray[np.uint8]
FloatFormat = Literal["e4m3", "e5m2", "e2m1"]

LARGEST: Final[dict[FloatFormat, float]] = {"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}
"""Largest finite magnitude."""
MANTISSA_BITS: Final[dict[FloatFormat, int]] = {"e4m3": 3, "e5m2": 2, "e2m1": 1}
"""Stored bits of the significand: a normal number is rounded by at most ``2 ** -(bits + 1)`` of itself."""
LEVELS: Final[dict[FloatFormat, int]] = {"e4m3": 256, "e5m2": 256, "e2m1": 16}
"""Codes, NaN and both zeros among them."""


def encode_float(values: FloatArray, form: FloatFormat) -> CodeBytes:
    """Round fp32 to the bit patterns of a format, one per byte; E2M1 in the low four bits."""
    limit = np.float32(LARGEST[form])
    clipped: Any = np.clip(values, -limit, limit)
    codes: CodeBytes = clipped.astype(_dtype(form)).view(np.uint8)
    return codes


def decode_float(codes: CodeBytes, form: FloatFormat) -> FloatArray:
    """Give the fp32 values of bit patterns; exact."""
    values: FloatArray = codes.astype(np.uint8).view(_dtype(form)).astype(np.float32)
    return values


def round_float(values: FloatArray, form: FloatFormat) -> FloatArray:
    """Round fp32 to the nearest number of a format."""
    return decode_float(encode_float(values, form), form)


def round_fp16(values: FloatArray) -> FloatArray:
    """Round fp32 to IEEE half precision, saturating at 65,504."""
    limit = np.float32(65504.0)
    return np.clip(values, -limit, limit).astype(np.float16).astype(np.float32)


def round_bf16(values: FloatArray | DoubleArray) -> FloatArray:
    """Round finite numbers, brought to fp32, to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _dtype(form: FloatFormat) -> Any:
    import ml_dtypes

    return {
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
        "e2m1": ml_dtypes.float4_e2m1fn,
    }[form]
