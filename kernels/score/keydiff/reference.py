"""KeyDiff's score in plain torch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from ..reference import pad_scores, request_tokens


def keydiff_scores(inputs: Mapping[str, Any], length: int) -> torch.Tensor:
    """Give minus the cosine between each key and the mean of the normalised keys, (batch, num_kv_heads, length)."""
    rows = []
    for b in range(len(inputs["context_lens"])):
        keys = request_tokens(inputs, "key", b)
        anchor = functional.normalize(keys, dim=-1).mean(1, keepdim=True)
        rows.append(-functional.cosine_similarity(keys, anchor, dim=-1))
    return pad_scores(rows, length)
