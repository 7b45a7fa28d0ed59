"""Projection into bases of groups of heads and expansion out of them, in fp32."""

import torch


def project_reference(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Give coordinates, (num_tokens, num_groups, rank), of rows (num_tokens, num_groups, heads * head_dim).

    `basis` is (num_groups, rank, heads * head_dim).
    """
    return torch.einsum("tgw,grw->tgr", rows.float(), basis.float())


def expand_reference(coordinates: torch.Tensor, basis: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Give each query head's values, (batch, num_query_heads, head_dim), of its coordinates.

    Query head ``h`` has the basis of KV head ``h // (num_query_heads / num_kv_heads)``, whose columns are a part of its
    group's.
    """
    batch, num_query_heads, rank = coordinates.shape
    num_groups, _, width = basis.shape
    heads = num_kv_heads // num_groups
    per_head = basis.float().view(num_groups, rank, heads, width // heads)
    grouped = coordinates.float().view(batch, num_groups, heads, num_query_heads // num_kv_heads, rank)
    return torch.einsum("bghqr,grhd->bghqd", grouped, per_head).reshape(batch, num_query_heads, width // heads)
