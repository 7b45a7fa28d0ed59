"""Attention over keys that are rebuilt, then rotated, in fp32."""

import torch

from ..reference import attend, gather_tokens
from .rope import rotate


def low_rank_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rope_table: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend from the newest token of each request to its cached tokens.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
        With RoPE.
    keys, values : Tensor, (num_blocks, block_size, num_kv_heads, head_dim)
        The decoded block pool; keys without RoPE, values expanded.
    rope_table : Tensor, (num_positions, head_dim)
    block_table : Tensor of int32, (batch, max_blocks)
    context_lens : Tensor of int32, (batch,)

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, head_dim)
    """
    outputs = []
    for b, tokens in enumerate(context_lens.tolist()):
        rebuilt = rotate(gather_tokens(keys, block_table[b], tokens), rope_table)
        outputs.append(attend(query[b], rebuilt, gather_tokens(values, block_table[b], tokens), scale))
    return torch.stack(outputs)
