"""Knorm's score in plain torch."""

from collections.abc import Mapping
from typing import Any

import torch

from ..reference import pad_scores, request_tokens


def knorm_scores(inputs: Mapping[str, Any], length: int) -> torch.Tensor:
    """Give minus the Euclidean norm of each key, (batch, num_kv_heads, length)."""
    rows = [-request_tokens(inputs, "key", b).norm(dim=-1) for b in range(len(inputs["context_lens"]))]
    return pad_scores(rows, length)
