"""InfoKV's signals and score in plain torch."""

from collections.abc import Sequence

import torch
from torch.nn import functional


def top_k_entropy(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Give the entropy, in nats, of the softmax over each row's `k` largest logits (all, if there are fewer).

    Parameters
    ----------
    logits : Tensor, (rows, vocabulary)

    Returns
    -------
    Tensor of float32, (rows,)
    """
    log_p = logits.float().topk(min(k, logits.shape[-1]), dim=-1).values.log_softmax(-1)
    # 0 ln 0 = 0, where a candidate is masked out by a logit of -inf.
    return -torch.where(log_p.isfinite(), log_p * log_p.exp(), 0.0).sum(-1)


def weighted_entropy(
    hidden: torch.Tensor, last_hidden: torch.Tensor, entropy: torch.Tensor, tau: float
) -> torch.Tensor:
    """Give (1 - cos(hidden, last_hidden) + tau) * entropy, fp32, (tokens,)."""
    cosine = functional.cosine_similarity(hidden.float(), last_hidden.float(), dim=-1)
    return (1.0 - cosine + tau) * entropy


def mixed_scores(
    attention: torch.Tensor, weighted: torch.Tensor, context_lens: Sequence[int], alpha: float
) -> torch.Tensor:
    """Give alpha * attention + (1 - alpha) * softmax(weighted), the softmax over each request's tokens.

    Parameters
    ----------
    attention : Tensor of float32, (batch, num_kv_heads, tokens)
    weighted : Tensor of float32, (batch, tokens)

    Returns
    -------
    Tensor of float32, (batch, num_kv_heads, tokens); -inf beyond a request's tokens.
    """
    scores = torch.full_like(attention, -torch.inf)
    for b, tokens in enumerate(context_lens):
        share = weighted[b, :tokens].softmax(-1)
        scores[b, :, :tokens] = alpha * attention[b, :, :tokens] + (1.0 - alpha) * share
    return scores
