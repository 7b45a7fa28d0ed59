"""Which parts of a strategy cannot go together, whatever the model: the composition rules."""

from __future__ import annotations

from kvsim.compression.base import KvEncoding, TokenSelection
from kvsim.compression.coding.base import Coding
from kvsim.compression.reduction.base import Reduction


def conflict(selection: TokenSelection, reduction: Reduction, encoding: KvEncoding, coding: Coding) -> str | None:
    """Why these parts cannot be one strategy, or None: the first reason found."""
    return _tokens_differ(selection, reduction) or coding.refuses(encoding)


def _tokens_differ(selection: TokenSelection, reduction: Reduction) -> str | None:
    """What is stored together must be the same tokens."""
    if reduction.is_replicated and selection.kind != "keep_all":
        return (
            f"{selection.kind} chooses tokens by K and V per head, but {reduction.kind} leaves one latent vector for "
            "all heads; it keeps all tokens"
        )
    if reduction.joins_layers and selection.evicts and selection.granularity != "none":
        return (
            f"{reduction.kind} stores the same tokens of several layers together, but {selection.kind} keeps other "
            f"tokens in each {selection.granularity}; streaming_llm and quest leave layers alike"
        )
    return None
