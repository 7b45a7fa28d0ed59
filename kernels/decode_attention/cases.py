"""Shapes to check and to time decode attention with, their inputs, tolerances and bytes."""

from dataclasses import dataclass
from typing import Any

import torch

TOLERANCES = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest absolute error against fp32, for inputs from N(0, 1); in 16 bits, the spacing of outputs above 2."""


@dataclass(frozen=True)
class DecodeAttentionCase:
    """One decode batch."""

    name: str
    dtype: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    context_lens: tuple[int, ...]
    num_splits: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that the batch must read once."""
        element_bytes = 4 if self.dtype == "float32" else 2
        return 2 * sum(self.context_lens) * self.num_kv_heads * self.head_dim * element_bytes


CORRECTNESS_CASES = (
    DecodeAttentionCase("one-token", "float16", 4, 2, 64, 16, (1,), 1),
    DecodeAttentionCase("ragged-gqa", "float16", 8, 2, 64, 16, (1, 15, 16, 17, 130, 0, 63), 4),
    DecodeAttentionCase("ragged-gqa-bf16", "bfloat16", 8, 2, 64, 16, (1, 15, 16, 17, 130, 0, 63), 4),
    DecodeAttentionCase("ragged-gqa-fp32", "float32", 8, 2, 64, 16, (1, 15, 16, 17, 130, 0, 63), 4),
    DecodeAttentionCase("multi-head", "float16", 3, 3, 32, 16, (65, 64), 2),
    DecodeAttentionCase("multi-query-71-heads", "float16", 71, 1, 64, 16, (77,), 2),
    DecodeAttentionCase("odd-group-odd-head-dim", "float32", 21, 3, 80, 16, (97, 33), 2),
    DecodeAttentionCase("head-dim-96", "float16", 4, 2, 96, 32, (100,), 8),
    DecodeAttentionCase("block-of-1", "float32", 2, 1, 16, 1, (37, 5), 2),
    DecodeAttentionCase("block-larger-than-tile", "float32", 2, 1, 32, 256, (300, 256), 4),
    DecodeAttentionCase("block-no-power-of-two", "float32", 4, 1, 32, 48, (100, 49, 48), 2),
    DecodeAttentionCase("more-splits-than-tiles", "float16", 4, 1, 128, 16, (40, 200), 16),
    DecodeAttentionCase("all-empty", "float16", 4, 1, 32, 16, (0, 0), 2),
    DecodeAttentionCase("head-dim-256", "float16", 8, 1, 256, 16, (70,), 2),
)
"""Small enough for Triton's interpreter, and odd on purpose."""

TIMING_CASES = tuple(
    DecodeAttentionCase(f"llama-3-8b-{batch}x{context}", "bfloat16", 32, 8, 128, 16, (context,) * batch, num_splits)
    for batch, context, num_splits in (
        (1, 16, 1),
        (1, 4096, 32),
        (1, 32768, 64),
        (8, 4096, 8),
        (8, 32768, 16),
        (32, 4096, 2),
        (32, 16384, 4),
        (128, 2048, 1),
        (128, 8192, 1),
    )
)
"""The attention of Llama-3.1-8B; the first is the launch floor."""


def make_inputs(case: DecodeAttentionCase, *, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Draw the inputs of a case: arguments of `decode_attention` by name, without its options.

    Blocks are dealt out at random. Rows that hold no token, and one block that belongs to nobody, are NaN; table
    entries beyond a request's blocks name that block, so that a stray read shows in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    blocks_of = [-(-tokens // case.block_size) for tokens in case.context_lens]
    num_blocks = sum(blocks_of) + 1
    shape = (num_blocks, case.block_size, case.num_kv_heads, case.head_dim)
    caches = [torch.full(shape, float("nan")) for _ in range(2)]
    poisoned, *free = torch.randperm(num_blocks, generator=generator).tolist()
    block_table = torch.full((len(blocks_of), max(1, *blocks_of)), poisoned, dtype=torch.int32)
    for b, (tokens, count) in enumerate(zip(case.context_lens, blocks_of, strict=True)):
        block_table[b, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        position = torch.arange(tokens)
        block = block_table[b].long()[position // case.block_size]
        for cache in caches:
            cache[block, position % case.block_size] = torch.randn(tokens, *shape[2:], generator=generator)
    query = torch.randn(len(blocks_of), case.num_query_heads, case.head_dim, generator=generator)
    key_cache, value_cache = (cache.to(dtype).to(device) for cache in caches)
    return {
        "query": query.to(dtype).to(device),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "block_table": block_table.to(device),
        "context_lens": torch.tensor(case.context_lens, dtype=torch.int32).to(device),
        "scale": case.head_dim**-0.5,
    }
