"""What both forms of the block fp4 kernels ask of their inputs."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.block_fp4 import BlockFp4
from ..batch import DecodeBatch, check_decode_inputs


def check_block_fp4_inputs(
    kv_format: BlockFp4, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Give the key's and value's codes and scales as bytes, in the order key, key_scale, value, value_scale.

    Raises
    ------
    ValueError
        If a shape, dtype or stride does not fit.
    """
    check_decode_inputs(case, inputs, buffers)
    query, fields = inputs["query"], inputs["fields"]
    if query.dtype not in {torch.float16, torch.bfloat16}:
        raise ValueError("query must be float16 or bfloat16")
    if case.head_dim % (kv_format.block_elements):
        raise ValueError("head_dim must be a multiple of two scale blocks")
    tokens = (len(fields["key"]), case.block_size, case.num_kv_heads)
    views = []
    for name, width in (("", case.head_dim // 2), ("_scale", case.head_dim // kv_format.block_elements)):
        for vector in ("key", "value"):
            field = fields[vector + name]
            if field.shape != (*tokens, width) or field.stride(-1) != 1 or field.element_size() != 1:
                msg = f"{vector + name} must be {width} contiguous bytes per block, token and KV head"
                raise ValueError(msg)
            views.append(field.view(torch.uint8) if name else field.view(torch.int32))
    key, value, key_scale, value_scale = views
    return key, key_scale, value, value_scale
