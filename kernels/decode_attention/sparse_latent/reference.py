"""Attention over chosen tokens of a latent cache, in fp32."""

import torch

from ..reference import attend


def sparse_latent_attention_reference(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend from the newest token of each request to the tokens in its slots.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
    keys, values : Tensor, (num_blocks, block_size, 1, head_dim) and (num_blocks, block_size, 1, latent_dim)
        The decoded block pool.
    slots : Tensor of int32, (batch, topk)
        Block id times block size plus row, in any order; -1 where there is no token.

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, latent_dim)
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    chosen = [row[row >= 0].long() for row in slots]
    return torch.stack([attend(query[b], keys[row], values[row], scale) for b, row in enumerate(chosen)])
