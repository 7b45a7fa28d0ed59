"""General-purpose byte compressors over codes packed into bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from kvsim.numerics.entropy import Codes

ByteCoder = Literal["deflate", "zstd"]
DEFLATE_LEVEL: Final = 6
ZSTD_LEVEL: Final = 3
"""Defaults of the two libraries."""


def packed_width(levels: int) -> int:
    """Bits per code in a byte: 1, 2, 4 or 8, so that no code straddles two bytes.

    Raises
    ------
    ValueError
        More than 256 levels.
    """
    width = next((bits for bits in (1, 2, 4, 8) if levels <= 1 << bits), None)
    if width is None:
        msg = f"codes of {levels} levels do not fit a byte"
        raise ValueError(msg)
    return width


def pack(codes: Codes, levels: int) -> NDArray[np.uint8]:
    """Pack a row of codes, the first in the high bits; the last byte is padded with 0."""
    width = packed_width(levels)
    per_byte = 8 // width
    padded = np.zeros(-(-len(codes) // per_byte) * per_byte, dtype=np.uint8)
    padded[: len(codes)] = codes
    shifts = width * np.arange(per_byte - 1, -1, -1)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8)
    return packed


def unpack(data: NDArray[np.uint8], levels: int, count: int) -> Codes:
    """Invert `pack`."""
    width = packed_width(levels)
    shifts = width * np.arange(8 // width - 1, -1, -1)
    return ((data[:, None] >> shifts) & ((1 << width) - 1)).reshape(-1)[:count].astype(np.int32)


def compressed_bits(data: bytes, coder: ByteCoder) -> float:
    """Compress bytes as one block, decompress them again, and give the bits that they took.

    Raises
    ------
    RuntimeError
        What came back differs: a bug.
    """
    compress, decompress = _functions(coder)
    small = compress(data)
    if decompress(small) != data:
        msg = f"{coder} gave back other bytes than it was given"
        raise RuntimeError(msg)
    return 8.0 * len(small)


def _functions(coder: ByteCoder) -> tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]:
    if coder == "deflate":
        return (lambda data: zlib.compress(data, DEFLATE_LEVEL)), zlib.decompress
    import zstandard

    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress, zstandard.ZstdDecompressor().decompress
