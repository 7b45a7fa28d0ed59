"""Contexts to check and to time scores with, their inputs, and what every score over a paged cache shares."""

from collections.abc import Mapping
from typing import Any

import torch

from ..contract import Variant
from ..decode_attention.batch import (
    DecodeBatch,
    choose_num_splits,
    fill_pages,
    make_block_table,
    num_multiprocessors,
)
from ..formats.native import Native
from ..launches import LaunchConfig

RAGGED = (1, 16, 0, 37, 130)

CORRECTNESS_BATCHES = (
    DecodeBatch("one-token", "float16", 4, 2, 64, 16, (1,), 1),
    DecodeBatch("ragged-gqa", "float16", 8, 2, 64, 16, RAGGED, 2),
    DecodeBatch("ragged-gqa-bf16", "bfloat16", 8, 2, 64, 16, RAGGED, 4),
    DecodeBatch("multi-query-17-heads", "bfloat16", 17, 1, 128, 32, (77,), 2),
    DecodeBatch("odd-head-dim-fp32", "float32", 6, 2, 80, 16, (70, 9), 1),
)
"""Small enough for Triton's interpreter, and odd on purpose."""

COMPILE_BATCH = DecodeBatch("llama-3-8b", "bfloat16", 32, 8, 128, 16, (64, 128), 8)
"""The heads of Llama-3.1-8B, in a small pool."""

CONTEXTS = ((1, 4096), (1, 16384), (16, 4096), (1, 131072), (8, 32768))
"""Requests and tokens of each that are timed."""

TIMING_BATCHES = tuple(
    DecodeBatch(f"{batch}x{context}-32/8", "bfloat16", 32, 8, 128, 16, (context,) * batch)
    for batch, context in CONTEXTS
)


def draw(shape: tuple[int, ...], *, dtype: str, seed: int, device: str) -> torch.Tensor:
    """Draw from N(0, 1) in a dtype."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype))


class PagedScore(Variant):
    """What scores over a paged cache in the model's dtype share.

    Inputs: ``fields`` with ``key`` and ``value``, views of the pool; ``block_table``, ``context_lens``, ``scale``.
    Result: ``scores``, fp32, (batch, num_kv_heads, longest context); -inf beyond a request's tokens, +inf for tokens
    that the method keeps whatever they score.
    """

    kv_format = Native()
    cost_unit = "token_kv_head"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = TIMING_BATCHES
    compile_case: Any = COMPILE_BATCH

    def make_inputs(self, case: Any, *, seed: int, device: str) -> dict[str, Any]:
        block_table, context_lens, unowned = make_block_table(case, seed, device)
        pages = fill_pages(self.kv_format, case, block_table, unowned, seed=seed)
        layout = self.kv_format.layout(
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            block_size=case.block_size,
            dtype=getattr(torch, case.dtype),
        )
        return {
            "fields": layout.views(pages),
            "block_table": block_table,
            "context_lens": context_lens,
            "scale": case.head_dim**-0.5,
        }

    def allocate(self, case: Any, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        device = inputs["block_table"].device
        return {"scores": torch.empty(len(case.context_lens), case.num_kv_heads, max(case.context_lens), device=device)}

    def configs(self, target: str, case: Any) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=64, num_warps=4, num_stages=2),)
        if case.head_dim * element_bytes(case) > 256:
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=3),)
        if target == "sm_120":
            # 99 KiB of shared memory hold the stages.
            return (LaunchConfig(block_n=64, num_warps=4, num_stages=3), LaunchConfig(128, num_warps=4, num_stages=2))
        return (LaunchConfig(block_n=128, num_warps=4, num_stages=3), LaunchConfig(64, num_warps=4, num_stages=4))

    def compute_dtype(self, case: Any) -> str:
        # Products of 16-bit numbers are exact in fp32, so bf16 inputs are held to fp16's tolerance.
        return "float32" if case.dtype == "float32" else "float16"


def split_count(case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig, *, rows: int) -> int:
    """Parts that each context is divided into, for `rows` programs per part."""
    return case.num_splits or choose_num_splits(
        1, rows, max(case.context_lens), num_multiprocessors(inputs["block_table"]), config.block_n
    )


def element_bytes(case: Any) -> int:
    """Bytes of an element of the model's dtype."""
    return getattr(torch, case.dtype).itemsize


def cache_bytes(case: DecodeBatch) -> int:
    """Bytes of the keys (or of the values) of all tokens."""
    return sum(case.context_lens) * case.num_kv_heads * case.head_dim * element_bytes(case)


def score_bytes(case: DecodeBatch) -> int:
    """Bytes of an fp32 score per token and KV head, rows of equal length."""
    return 4 * len(case.context_lens) * case.num_kv_heads * max(case.context_lens)


def check_cache(case: DecodeBatch, inputs: Mapping[str, Any], *, field: str = "key") -> None:
    """Raise ValueError, naming the first rule broken, unless the paged cache fits the case."""
    cache, block_table, context_lens = inputs["fields"][field], inputs["block_table"], inputs["context_lens"]
    require(
        {
            f"{field} must be (num_blocks, block_size, num_kv_heads, head_dim)": cache.shape
            == (len(cache), case.block_size, case.num_kv_heads, case.head_dim),
            f"{field} must be contiguous along head_dim": cache.stride(-1) == 1,
            "block_table and context_lens must be int32": block_table.dtype == context_lens.dtype == torch.int32,
            "block_table and context_lens must have a row per request": len(block_table)
            == len(context_lens)
            == len(case.context_lens),
            "the last dimension must be contiguous": block_table.stride(-1) == context_lens.stride(-1) == 1,
        }
    )


def check_fp32(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless the tensors are contiguous and fp32."""
    for name, tensor in tensors.items():
        require({f"{name} must be fp32 and contiguous": tensor.dtype == torch.float32 and tensor.is_contiguous()})


def check_splits(**counts: int) -> None:
    """Raise ValueError unless the counts are powers of two."""
    for name, count in counts.items():
        require({f"{name} must be a power of two": count > 0 and count & (count - 1) == 0})


def require(requirements: Mapping[str, bool]) -> None:
    """Raise ValueError with the first requirement that is not met."""
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
