"""Which parts of a strategy cannot go together, whatever the model: the composition rules."""

from __future__ import annotations

from kvsim.compression.base import KvEncoding, TokenSelection
from kvsim.compression.coding.base import Coding
from kvsim.compression.reduction.base import Reduction


def conflict(selection: TokenSelection, reduction: Reduction, encoding: KvEncoding, coding: Coding) -> str | None:
    """Why these parts cannot be one strategy, or None: the first reason found."""
    refused = None if reduction.is_none else encoding.refuses(reduction)
    return refused or coding.refuses(encoding)
