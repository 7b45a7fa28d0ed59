"""Batches of new tokens for a cache with a residual window, their inputs, and the reference."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ...formats.kivi import GROUP, Kivi, packed_tokens
from ...formats.pages import PageLayout


@dataclass(frozen=True)
class ResidualAppendBatch:
    """New tokens at the end of some requests.

    Attributes
    ----------
    dtype : str
        The model's, of the new keys and values and of the residual.
    context_lens : tuple of int
        Cached tokens of each request before the new ones.
    new_tokens : tuple of int
        Tokens that each request gains.
    """

    name: str
    dtype: str
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    new_tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """New tokens of the batch."""
        return sum(self.new_tokens)

    def packed_before_and_after(self, kv_format: Kivi) -> list[tuple[int, int]]:
        """Quantised tokens of each request before and after the new ones."""
        return [
            (packed_tokens(before, kv_format.residual_tokens), packed_tokens(before + new, kv_format.residual_tokens))
            for before, new in zip(self.context_lens, self.new_tokens, strict=True)
        ]


CORRECTNESS_BATCHES = (
    ResidualAppendBatch("first-tokens", "float16", 2, 64, 32, (0, 0), (1, 33)),
    ResidualAppendBatch("around-a-full-residual", "float16", 1, 64, 32, (127, 128, 129, 159, 160), (1, 1, 1, 1, 1)),
    ResidualAppendBatch("chunk-bf16", "bfloat16", 2, 128, 64, (100,), (190,)),
    ResidualAppendBatch("prefill-head-dim-96", "float16", 1, 96, 96, (0, 31), (300, 0)),
    ResidualAppendBatch("several-per-step-bf16", "bfloat16", 1, 32, 32, (126, 158), (5, 4)),
)

COMPILE_BATCH = ResidualAppendBatch("llama-3-8b", "bfloat16", 8, 128, 32, (128, 200), (1, 40))

TIMING_BATCHES = (
    *(
        ResidualAppendBatch(f"llama-3-8b-decode-{batch}", "bfloat16", 8, 128, 32, (2048,) * batch, (1,) * batch)
        for batch in (1, 16, 128)
    ),
    *(
        ResidualAppendBatch(f"llama-3-8b-prefill-{tokens}", "bfloat16", 8, 128, 32, (0,), (tokens,))
        for tokens in (512, 2048, 16384)
    ),
)
"""Decode steps in which every request's residual is full and gives up a group, and prefills."""


def layout_of(kv_format: Kivi, case: ResidualAppendBatch) -> PageLayout:
    """Give the pool's layout."""
    return kv_format.layout(
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_size=case.block_size,
        dtype=getattr(torch, case.dtype),
    )


def make_append_inputs(kv_format: Kivi, case: ResidualAppendBatch, *, seed: int, device: str) -> dict[str, Any]:
    """Draw new K and V, rings, and a pool of random bytes.

    New tokens of request ``b`` are rows ``query_start[b]`` to ``query_start[b + 1]`` of ``key`` and ``value``; rings
    and block table are those of decode attention.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    batch, ring = len(case.context_lens), kv_format.residual_tokens
    shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    key, value = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    ring_shape = (batch + 1, ring, *shape[1:])
    residual_key, residual_value = (
        torch.randn(ring_shape, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    blocks = [-(-after // case.block_size) for _, after in case.packed_before_and_after(kv_format)]
    pages = torch.randint(
        0, 256, (sum(blocks) + 1, layout_of(kv_format, case).page_bytes), generator=generator, device=device
    )
    order = torch.randperm(sum(blocks) + 1, generator=generator, device=device).to(torch.int32)
    block_table = torch.full((batch, max(1, *blocks)), int(order[-1]), dtype=torch.int32, device=device)
    for b, (first, count) in enumerate(zip(accumulate(blocks, initial=0), blocks, strict=False)):
        block_table[b, :count] = order[first : first + count]
    starts = list(accumulate(case.new_tokens, initial=0))
    return {
        "key": key,
        "value": value,
        "query_start": torch.tensor(starts, dtype=torch.int32, device=device),
        "context_lens": torch.tensor(case.context_lens, dtype=torch.int32, device=device),
        "residual_key": residual_key,
        "residual_value": residual_value,
        "residual_index": torch.randperm(batch + 1, generator=generator, device=device)[:batch].to(torch.int32),
        "block_table": block_table,
        "pages": pages.to(torch.uint8),
    }


def append_reference(kv_format: Kivi, case: ResidualAppendBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Quantise the groups that leave the residual, and write the new tokens that stay in it.

    Returns
    -------
    dict of str to Tensor
        The pool's fields, ``residual_key`` and ``residual_value``, after.
    """
    pages = inputs["pages"].clone()
    fields = layout_of(kv_format, case).views(pages)
    rings = {name: inputs[f"residual_{name}"].clone() for name in ("key", "value")}
    size = kv_format.residual_tokens
    for b, (packed_before, packed_after) in enumerate(case.packed_before_and_after(kv_format)):
        before, new = case.context_lens[b], case.new_tokens[b]
        slot, start = int(inputs["residual_index"][b]), int(inputs["query_start"][b])
        leaving, staying = {}, torch.arange(max(before, packed_after), before + new, device=pages.device)
        for name, ring in rings.items():
            old = ring[slot, torch.arange(packed_before, before, device=pages.device) % size]
            native = torch.cat((old, inputs[name][start : start + new]))
            leaving[name] = native[: packed_after - packed_before].unflatten(0, (-1, GROUP))
            ring[slot, staying % size] = inputs[name][start + staying - before]
        encoded = kv_format.encode(leaving["key"], leaving["value"])
        for group, first in enumerate(range(packed_before, packed_after, GROUP)):
            block = inputs["block_table"][b, first // case.block_size].long()
            row = first % case.block_size
            for name, field in fields.items():
                per_group = field.shape[1] == case.block_size // GROUP
                rows = slice(row // GROUP, row // GROUP + 1) if per_group else slice(row, row + GROUP)
                field[block, rows] = encoded[name][group]
    return {**fields, **{f"residual_{name}": ring for name, ring in rings.items()}}
