"""SnapKV's score in plain torch."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from ..reference import causal_logits, pad_scores, request_tokens


def pool_scores(scores: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    """Smooth (heads, tokens) over tokens: the mean with zeros beyond the ends, or the maximum."""
    if not scores.shape[-1]:
        return scores
    pool = functional.avg_pool1d if pooling == "average" else functional.max_pool1d
    return pool(scores, kernel_size, stride=1, padding=kernel_size // 2)


def snapkv_scores(inputs: Mapping[str, Any], kernel_size: int, pooling: str, length: int) -> torch.Tensor:
    """Average the attention of the newest queries over them and over the group, then pool; the window gets +inf."""
    rows = []
    for b, query in enumerate(inputs["query"]):
        keys = request_tokens(inputs, "key", b)
        num_kv_heads, tokens, _ = keys.shape
        scored = max(0, tokens - len(query))
        scores = keys.new_full((num_kv_heads, tokens), math.inf)
        if scored:
            received = causal_logits(query, keys, inputs["scale"]).softmax(-1).mean((1, 2))
            scores[:, :scored] = pool_scores(received[:, :scored], kernel_size, pooling)
        rows.append(scores)
    return pad_scores(rows, length)
