"""What general-purpose compressors share: codes packed into bytes, one channel after the other."""

from __future__ import annotations

from kvsim.compression.codec import Coder, Symbols
from kvsim.compression.coding.base import Coding
from kvsim.numerics.byte_coders import ByteCoder, compressed_bits, pack, unpack
from kvsim.numerics.entropy import context_rows


class BytePackedCoding(Coding):
    """One compressed block per layer and K or V; no code straddles two bytes, so 3-bit codes take 4 bits before."""

    @property
    def unpriced_coder(self) -> str | None:
        return str(self.kind)


class BytePackedCoder(Coder):
    """Packs codes channel by channel, so that equal laws lie side by side, and compresses the bytes."""

    def __init__(self, compressor: ByteCoder) -> None:
        self._compressor: ByteCoder = compressor

    def code(self, symbols: Symbols) -> float:
        """Bits of the compressed block."""
        codes = context_rows(symbols.codes, "channel").ravel()
        packed = pack(codes, symbols.levels)
        self.check_equal(codes, unpack(packed, symbols.levels, len(codes)))
        return compressed_bits(packed.tobytes(), self._compressor)
