"""TOVA's score in plain torch."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..reference import causal_logits, pad_scores, request_tokens


def tova_scores(inputs: Mapping[str, Any], length: int) -> torch.Tensor:
    """Average over query heads the weight exp(logit - lse) of every token but the newest, which gets +inf.

    ``inputs["lse"]`` is in log2 units, (batch, num_query_heads, splits).
    """
    rows = []
    for b, query in enumerate(inputs["query"]):
        keys = request_tokens(inputs, "key", b)
        if not keys.shape[1]:
            rows.append(keys.new_zeros(1, 0))
            continue
        logits = causal_logits(query, keys, inputs["scale"])[:, :, 0]
        lse = (inputs["lse"][b] * math.log(2)).logsumexp(-1).view(*logits.shape[:2], 1)
        score = (logits - lse).exp().mean((0, 1))
        score[-1] = math.inf
        rows.append(score[None])
    return pad_scores(rows, length)
