"""Causal attention over prompts in plain torch, one prompt at a time, in fp32."""

import torch


def prefill_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend from each token to those before it and itself.

    Parameters
    ----------
    query : Tensor, (num_tokens, num_query_heads, head_dim)
    key, value : Tensor, (num_tokens, num_kv_heads, head_dim)
    cu_seqlens : Tensor of int32, (batch + 1,)
        First token of each prompt, and the number of tokens.

    Returns
    -------
    Tensor of float32, shaped as `query`
    """
    output = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    num_query_heads, head_dim = query.shape[1:]
    num_kv_heads = key.shape[1]
    group = num_query_heads // num_kv_heads
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        grouped = query[begin:end].float().view(end - begin, num_kv_heads, group, head_dim)
        scores = torch.einsum("mhgd,nhd->hgmn", grouped, key[begin:end].float()) * scale
        future = torch.ones(end - begin, end - begin, dtype=torch.bool, device=query.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        attended = torch.einsum("hgmn,nhd->mhgd", weights, value[begin:end].float())
        output[begin:end] = attended.reshape(end - begin, num_query_heads, head_dim)
    return output
