"""The per-vector Shannon limit of KV tensors, and how far every encoding is from it."""

from __future__ import annotations

from kvsim.limit.answer import LimitAnswer
from kvsim.limit.find import default_strategies, find_limit
from kvsim.limit.points import EncodingPoint
from kvsim.limit.token_ids import TokenIdTier, token_id_tier

__all__ = [
    "EncodingPoint",
    "LimitAnswer",
    "TokenIdTier",
    "default_strategies",
    "find_limit",
    "token_id_tier",
]
