"""Decode attention over KIVI's pages and residual in plain torch, in fp32."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.kivi import Kivi, packed_tokens
from ..reference import attend, gather_tokens


def kivi_decode_attention_reference(kv_format: Kivi, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Attend from each request's newest token to its packed tokens and then its residual.

    Returns
    -------
    Tensor of float32, (batch, num_query_heads, head_dim)
    """
    query, ring = inputs["query"], kv_format.residual_tokens
    pools = kv_format.decode(inputs["fields"], query.shape[-1])
    outputs = []
    for b, tokens in enumerate(inputs["context_lens"].tolist()):
        packed = packed_tokens(tokens, ring)
        rows = torch.arange(packed, tokens, device=query.device) % ring
        keys, values = (
            torch.cat(
                (gather_tokens(pool, inputs["block_table"][b], packed), residual[inputs["residual_index"][b], rows])
            )
            for pool, residual in zip(pools, (inputs["residual_key"], inputs["residual_value"]), strict=True)
        )
        outputs.append(attend(query[b], keys, values, inputs["scale"]))
    return torch.stack(outputs)
