"""Expected Attention's score in plain torch."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..reference import pad_scores, request_tokens


def expected_logits(mean: torch.Tensor, covariance: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Give ln E[exp(scale * q . k)] for q from N(mean, covariance): scale * k.mu + scale^2 / 2 * k^T Sigma k.

    Parameters
    ----------
    mean, covariance : Tensor, (num_query_heads, head_dim) and (num_query_heads, head_dim, head_dim)
    keys : Tensor, (num_kv_heads, tokens, head_dim)

    Returns
    -------
    Tensor of float32, (num_kv_heads, group, tokens)
    """
    num_kv_heads, _, head_dim = keys.shape
    mean = mean.float().view(num_kv_heads, -1, head_dim)
    covariance = covariance.float().view(*mean.shape, head_dim)
    linear = torch.einsum("hgd,htd->hgt", mean, keys)
    # The products by twos keep a long context's intermediates to one head's rotated keys at a time.
    quadratic = torch.stack(
        [
            torch.stack([((head_keys @ matrix) * head_keys).sum(-1) for matrix in group])
            for head_keys, group in zip(keys, covariance, strict=True)
        ]
    )
    return scale * linear + 0.5 * scale**2 * quadratic


def expected_attention_scores(inputs: Mapping[str, Any], num_sinks: int, length: int) -> torch.Tensor:
    """Softmax the expected logits over the tokens after the sinks, average the group, scale by |v|; sinks get +inf."""
    rows = []
    for b, (mean, covariance) in enumerate(zip(inputs["query_mean"], inputs["query_covariance"], strict=True)):
        keys, values = request_tokens(inputs, "key", b), request_tokens(inputs, "value", b)
        scores = keys.new_full(keys.shape[:2], math.inf)
        if keys.shape[1] > num_sinks:
            logits = expected_logits(mean, covariance, keys[:, num_sinks:], inputs["scale"])
            scores[:, num_sinks:] = logits.softmax(-1).mean(1) * values[:, num_sinks:].norm(dim=-1)
        rows.append(scores)
    return pad_scores(rows, length)
