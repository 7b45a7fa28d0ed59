"""H2O's scores in plain torch."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..reference import causal_logits, pad_scores, request_tokens


def h2o_step(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Add to ``inputs["scores"]`` the weights exp(logit - lse) of the newest query, summed over the group.

    ``lse`` is in log2 units, (batch, num_query_heads, splits); scores beyond a request's tokens stay as they are.
    """
    scores = inputs["scores"].clone()
    for b, query in enumerate(inputs["query"]):
        keys = request_tokens(inputs, "key", b)
        tokens = keys.shape[1]
        if tokens:
            logits = causal_logits(query, keys, inputs["scale"])[:, :, 0]
            lse = (inputs["lse"][b] * math.log(2)).logsumexp(-1).view(*logits.shape[:2], 1)
            scores[b, :, :tokens] += (logits - lse).exp().sum(1)
    return scores


def h2o_prefill(inputs: Mapping[str, Any], length: int) -> torch.Tensor:
    """Sum the columns of the causal attention of a prompt, over the group.

    ``query`` is (batch, longest, num_query_heads, head_dim), ``lse`` (batch, longest, num_query_heads) in log2 units.
    """
    rows = []
    for b, query in enumerate(inputs["query"]):
        keys = request_tokens(inputs, "key", b)
        num_kv_heads, tokens, _ = keys.shape
        if not tokens:
            rows.append(keys.new_zeros(num_kv_heads, 0))
            continue
        logits = causal_logits(query[:tokens], keys, inputs["scale"])
        lse = inputs["lse"][b, :tokens].view(tokens, num_kv_heads, -1).permute(1, 2, 0) * math.log(2)
        rows.append((logits - lse[..., None]).exp().sum((1, 2)))
    return pad_scores(rows, length)
