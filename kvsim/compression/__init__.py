"""KV compression = token selection x reduction x KV encoding x coding."""

from __future__ import annotations

from kvsim.compression.base import KvEncoding
from kvsim.compression.parse import STRATEGIES, NamedCompression, describe_strategy, parse_compression
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.stored import stored_bytes
from kvsim.compression.strategy import (
    CODINGS,
    ENCODINGS,
    PLANS,
    REDUCTIONS,
    SELECTIONS,
    AnyEncoding,
    AnySelection,
    Compression,
)

__all__ = [
    "CODINGS",
    "ENCODINGS",
    "PLANS",
    "REDUCTIONS",
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
