"""Decode attention over selected pages, in plain torch, in fp32."""

import torch


def page_sparse_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    selected_pages: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attend from the newest token of each request to the tokens of the pages that each KV head selected.

    Parameters
    ----------
    query : Tensor, (batch, num_query_heads, head_dim)
    keys, values : Tensor, (num_blocks, block_size, num_kv_heads, head_dim)
    block_table : Tensor of int32, (batch, max_blocks)
    context_lens : Tensor of int32, (batch,)
    selected_pages : Tensor of int32, (batch, num_kv_heads, num_selected)
        Logical pages; -1: none. A page past the context holds no token.

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, head_dim); zero where no token is selected.
    """
    batch, num_kv_heads = selected_pages.shape[:2]
    block_size = keys.shape[1]
    row = torch.arange(block_size, device=query.device)
    grouped = query.float().unflatten(1, (num_kv_heads, -1))
    output = torch.zeros_like(grouped)
    for b in range(batch):
        for h in range(num_kv_heads):
            pages = selected_pages[b, h].long()
            pages = pages[pages >= 0]
            position = (pages[:, None] * block_size + row).flatten()
            position = position[position < int(context_lens[b])]
            if not len(position):
                continue
            at = (block_table[b].long()[position // block_size], position % block_size, h)
            scores = grouped[b, h] @ keys[at].float().T * scale
            output[b, h] = scores.softmax(-1) @ values[at].float()
    return output.flatten(1, 2)
