"""Decode attention in plain torch, one request at a time, in fp32."""

import torch


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend from one request's query heads to its tokens.

    Parameters
    ----------
    query : Tensor, (num_query_heads, head_dim)
        Query head ``h`` reads KV head ``h // (num_query_heads / num_kv_heads)``.
    keys, values : Tensor, (tokens, num_kv_heads, head_dim) and (tokens, num_kv_heads, value_dim)
    scale : float
        Factor of the scores before the softmax.

    Returns
    -------
    Tensor of float32, (num_query_heads, value_dim); zero where there are no tokens.
    """
    num_query_heads, head_dim = query.shape
    tokens, num_kv_heads, value_dim = values.shape
    if not tokens:
        return torch.zeros(num_query_heads, value_dim, dtype=torch.float32, device=query.device)
    grouped = query.float().view(num_kv_heads, -1, head_dim)
    scores = torch.einsum("hgd,thd->hgt", grouped, keys.float()) * scale
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), values.float()).reshape(num_query_heads, value_dim)


def gather_tokens(blocks: torch.Tensor, block_ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Give a request's tokens in order, (tokens, ...), from a pool (num_blocks, block_size, ...)."""
    block_size = blocks.shape[1]
    position = torch.arange(tokens, device=blocks.device)
    return blocks[block_ids.long()[position // block_size], position % block_size]


def decode_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend from the newest token of each request to its cached tokens.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
    keys, values : Tensor, (num_blocks, block_size, num_kv_heads, head_dim)
        The decoded block pool.
    block_table : Tensor of int32, (batch, max_blocks)
        Token ``t`` of request ``b`` lies in block ``block_table[b, t // block_size]`` at row ``t % block_size``.
    context_lens : Tensor of int32, (batch,)

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, value_dim)
    """
    return torch.stack(
        [
            attend(
                query[b],
                gather_tokens(keys, block_table[b], int(tokens)),
                gather_tokens(values, block_table[b], int(tokens)),
                scale,
            )
            for b, tokens in enumerate(context_lens)
        ]
    )
