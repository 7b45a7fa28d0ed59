"""Decode attention over heads of unequal length, and with weighted entries, in plain torch, in fp32."""

import torch

from ..reference import gather_tokens


def ragged_heads_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    head_lens: torch.Tensor,
    scale: float,
    log_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from the newest token of each request to what each KV head keeps.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
    keys, values : Tensor, (num_blocks, block_size, 1, head_dim)
        A pool whose blocks hold tokens of one head.
    block_table : Tensor of int32, (batch, num_kv_heads, max_blocks)
    head_lens : Tensor of int32, (batch, num_kv_heads)
    log_weight : Tensor, (num_blocks, block_size, 1, 1), optional
        Added to the scaled scores of an entry.

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, head_dim); zero where a head keeps no token.
    """
    batch, num_kv_heads = head_lens.shape
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    output = torch.zeros_like(grouped)
    for b in range(batch):
        for h in range(num_kv_heads):
            tokens = int(head_lens[b, h])
            if not tokens:
                continue
            key, value = (gather_tokens(pool, block_table[b, h], tokens)[:, 0].float() for pool in (keys, values))
            scores = grouped[b, h] @ key.T * scale
            if log_weight is not None:
                scores += gather_tokens(log_weight, block_table[b, h], tokens)[:, 0, 0]
            output[b, h] = scores.softmax(-1) @ value
    return output.flatten(1, 2)
