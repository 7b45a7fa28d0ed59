"""DEFLATE over packed codes."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvsim.compression.codec import Coder
from kvsim.compression.coding.byte_packed import BytePackedCoder, BytePackedCoding


class Deflate(BytePackedCoding):
    """DEFLATE (RFC 1951 in zlib's frame, level 6): string matching, then Huffman codes; what kvtc ends with."""

    names: ClassVar = {"deflate": {}}
    summaries: ClassVar = {"deflate": "DEFLATE over packed codes, for tiers and transfers; RFC 1951"}

    family: ClassVar = "entropy coding"

    kind: Literal["deflate"] = "deflate"

    def coder(self) -> Coder:
        return BytePackedCoder("deflate")
