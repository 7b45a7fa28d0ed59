"""Attention probabilities of the newest queries in plain torch, one request at a time, in fp32."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..decode_attention.reference import gather_tokens


def request_tokens(inputs: Mapping[str, Any], field: str, b: int) -> torch.Tensor:
    """Give request `b`'s keys or values in order, fp32, (num_kv_heads, tokens, head_dim)."""
    tokens = int(inputs["context_lens"][b])
    return gather_tokens(inputs["fields"][field], inputs["block_table"][b], tokens).float().transpose(0, 1)


def causal_logits(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Give scaled products of the newest queries with all keys, -inf where a key comes after its query.

    Parameters
    ----------
    queries : Tensor, (num_queries, num_query_heads, head_dim)
        Of the newest tokens, in order; more queries than tokens are left out from the front.
    keys : Tensor, (num_kv_heads, tokens, head_dim)

    Returns
    -------
    Tensor of float32, (num_kv_heads, group, at most num_queries, tokens)
    """
    num_kv_heads, tokens, head_dim = keys.shape
    queries = queries[max(0, len(queries) - tokens) :]
    grouped = queries.float().view(len(queries), num_kv_heads, -1, head_dim)
    logits = torch.einsum("qhgd,htd->hgqt", grouped, keys) * scale
    position = torch.arange(tokens, device=keys.device)
    return logits.masked_fill(position > position[tokens - len(queries) :, None], -math.inf)


def pad_scores(scores: list[torch.Tensor], length: int) -> torch.Tensor:
    """Stack rows of scores, each (heads, tokens), with -inf beyond a request's tokens."""
    return torch.stack([torch.nn.functional.pad(row, (0, length - row.shape[-1]), value=-math.inf) for row in scores])
