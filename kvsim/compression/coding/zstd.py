"""Zstandard over packed codes."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvsim.compression.codec import Coder
from kvsim.compression.coding.byte_packed import BytePackedCoder, BytePackedCoding


class Zstd(BytePackedCoding):
    """Zstandard (RFC 8878, level 3): string matching, then Huffman codes and finite-state entropy."""

    names: ClassVar = {"zstd": {}}
    aliases: ClassVar = {"zstandard": "zstd"}
    summaries: ClassVar = {"zstd": "Zstandard over packed codes, for tiers and transfers; RFC 8878"}

    family: ClassVar = "entropy coding"

    kind: Literal["zstd"] = "zstd"

    def coder(self) -> Coder:
        return BytePackedCoder("zstd")
