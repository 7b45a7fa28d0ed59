"""KV compression = token selection x KV encoding."""

from __future__ import annotations

from kvsim.compression.base import KvEncoding, TokenSelection
from kvsim.compression.pair import ENCODINGS, SELECTIONS, AnyEncoding, AnySelection, Compression
from kvsim.compression.parse import STRATEGIES, NamedCompression, describe_strategy, parse_compression
from kvsim.compression.stored import stored_bytes

__all__ = [
    "ENCODINGS",
    "SELECTIONS",
    "STRATEGIES",
    "AnyEncoding",
    "AnySelection",
    "Compression",
    "KvEncoding",
    "NamedCompression",
    "TokenSelection",
    "describe_strategy",
    "parse_compression",
    "stored_bytes",
]
