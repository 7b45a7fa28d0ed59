"""Decode attention in plain torch, one request at a time, in fp32."""

import torch


def decode_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend from the newest token of each request to its cached tokens.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
        Query head ``h`` reads KV head ``h // (num_query_heads / num_kv_heads)``.
    key_cache, value_cache : Tensor, (num_blocks, block_size, num_kv_heads, head_dim)
        The block pool.
    block_table : Tensor of int32, (batch, max_blocks)
        Token ``t`` of request ``b`` lies in block ``block_table[b, t // block_size]`` at row ``t % block_size``.
    context_lens : Tensor of int32, (batch,)
        Cached tokens of each request; the output of an empty one is zero.
    scale : float
        Factor of the scores before the softmax.

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, head_dim)
    """
    batch, num_query_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    output = torch.zeros(batch, num_query_heads, head_dim, dtype=torch.float32, device=query.device)
    for b in range(batch):
        tokens = int(context_lens[b])
        if not tokens:
            continue
        position = torch.arange(tokens, device=query.device)
        block = block_table[b].long()[position // block_size]
        keys = key_cache[block, position % block_size].float()
        values = value_cache[block, position % block_size].float()
        grouped = query[b].float().view(num_kv_heads, -1, head_dim)
        scores = torch.einsum("hgd,thd->hgt", grouped, keys) * scale
        output[b] = torch.einsum("hgt,thd->hgd", scores.softmax(-1), values).reshape(num_query_heads, head_dim)
    return output
