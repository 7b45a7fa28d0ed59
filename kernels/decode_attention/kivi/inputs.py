"""Inputs of attention over KIVI's pages and residual, and what both forms ask of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...formats.kivi import GROUP, Kivi, packed_tokens
from ..batch import DecodeBatch, check_decode_inputs, fill_pages, make_block_table


def make_kivi_inputs(kv_format: Kivi, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
    """Draw queries, the pool of packed tokens, and the residual, each with NaN where no token lies.

    ``residual_key`` and ``residual_value`` are rings (slots, residual_tokens, num_kv_heads, head_dim): the token at
    position ``t`` of request ``b`` lies at ``[residual_index[b], t % residual_tokens]`` until it is packed.
    """
    packed_lens = tuple(packed_tokens(tokens, kv_format.residual_tokens) for tokens in case.context_lens)
    packed_case = replace(case, context_lens=packed_lens)
    block_table, _, unowned = make_block_table(packed_case, seed, device)
    pages = fill_pages(kv_format, packed_case, block_table, unowned, seed=seed)
    dtype = getattr(torch, case.dtype)
    layout = kv_format.layout(
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, block_size=case.block_size, dtype=dtype
    )
    fields = layout.views(pages)
    for b, packed in enumerate(packed_lens):
        if used := packed % case.block_size:
            block = int(block_table[b, packed // case.block_size])
            for name in ("key_scale", "key_zero"):
                fields[name][block, used // GROUP :] = float("nan")

    generator = torch.Generator(device=device).manual_seed(seed + 2)
    batch, ring = len(case.context_lens), kv_format.residual_tokens
    shape = (batch + 1, ring, case.num_kv_heads, case.head_dim)
    residual_key, residual_value = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    residual_index = torch.randperm(batch + 1, generator=generator, device=device)[:batch].to(torch.int32)
    vacant = torch.ones(shape[:2], dtype=torch.bool, device=device)
    for b, (tokens, packed) in enumerate(zip(case.context_lens, packed_lens, strict=True)):
        vacant[residual_index[b], torch.arange(packed, tokens, device=device) % ring] = False
    residual_key[vacant] = residual_value[vacant] = float("nan")
    query = torch.randn(batch, case.num_query_heads, case.head_dim, generator=generator, device=device)
    return {
        "query": query.to(dtype),
        "pages": pages,
        "fields": fields,
        "residual_key": residual_key,
        "residual_value": residual_value,
        "residual_index": residual_index,
        "block_table": block_table,
        "context_lens": torch.tensor(case.context_lens, dtype=torch.int32, device=device),
        "scale": case.head_dim**-0.5,
    }


def check_kivi_inputs(
    kv_format: Kivi, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise ValueError, naming the first rule broken, unless the tensors fit the case and each other."""
    if {"partial", "lse"} <= buffers.keys():
        check_decode_inputs(case, inputs, buffers)
    query, fields, residual_key = inputs["query"], inputs["fields"], inputs["residual_key"]
    residual_index = inputs["residual_index"]
    if case.head_dim % GROUP or case.block_size % GROUP:
        msg = f"head_dim and block_size must be multiples of {GROUP}"
        raise ValueError(msg)
    expected = kv_format.layout(
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, block_size=case.block_size, dtype=query.dtype
    ).fields
    strides = {name: fields[name].stride()[:3] for name in fields}
    requirements = {
        "query and residual must have one dtype, float16 or bfloat16": query.dtype
        == residual_key.dtype
        == inputs["residual_value"].dtype
        and query.dtype in {torch.float16, torch.bfloat16},
        "fields must have the shapes and dtypes of the layout": all(
            fields[field.name].shape[1:] == field.shape and fields[field.name].dtype == field.dtype
            for field in expected
        ),
        "fields and residual must be contiguous along the last dimension": all(
            tensor.stride(-1) == 1 for tensor in (*fields.values(), residual_key, inputs["residual_value"])
        ),
        "a scale and its zero point must have one stride": strides["key_scale"] == strides["key_zero"]
        and strides["value_scale"] == strides["value_zero"],
        "key and value codes must have one stride": kv_format.packing == "sequential"
        or strides["key"] == strides["value"],
        "residual_key and residual_value must be (slots, residual_tokens, num_kv_heads, head_dim) of one stride": (
            residual_key.shape[1:] == (kv_format.residual_tokens, case.num_kv_heads, case.head_dim)
            and residual_key.shape == inputs["residual_value"].shape
            and residual_key.stride() == inputs["residual_value"].stride()
        ),
        "residual_index must be int32, one per request": residual_index.dtype == torch.int32
        and residual_index.shape == (len(query),),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
