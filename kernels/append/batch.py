"""Batches of new tokens to append, their inputs, and what every KV format's variant shares."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..contract import Comparison, Traffic, Variant
from ..formats.base import KvFormat
from ..launches import LaunchConfig

PADDING_SLOT = -1
"""Slot of a row that holds no token (a padded CUDA graph batch): it is not written."""


@dataclass(frozen=True)
class AppendBatch:
    """New tokens of a batch, in any slots.

    Attributes
    ----------
    dtype : str
        The model's, of the new keys and values.
    num_tokens : int
        Rows, of which the last `num_padding` hold no token.
    """

    name: str
    dtype: str
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_tokens: int
    num_padding: int = 0


CORRECTNESS_BATCHES = (
    AppendBatch("one-token", "float16", 2, 64, 16, 1),
    AppendBatch("odd-bf16", "bfloat16", 3, 64, 16, 37, num_padding=2),
    AppendBatch("head-dim-128", "float16", 2, 128, 16, 19),
    AppendBatch("head-dim-256-bf16", "bfloat16", 1, 256, 32, 33),
    AppendBatch("all-padding", "float16", 2, 64, 16, 3, num_padding=3),
)

COMPILE_BATCH = AppendBatch("llama-3-8b", "bfloat16", 8, 128, 16, 64)

TIMING_BATCHES = tuple(
    AppendBatch(f"llama-3-8b-{num_tokens}", "bfloat16", 8, 128, 16, num_tokens)
    for num_tokens in (1, 16, 128, 512, 2048, 16384)
)


class Append(Variant):
    """What the write path of every format shares, where each token is encoded by itself.

    Inputs: ``key`` and ``value`` (num_tokens, num_kv_heads, head_dim), ``slot_mapping`` int64 (num_tokens,): block id
    times block size plus row, or -1; ``pages`` before the write. Results: each field of the pool by name, and
    ``pages``, of which they are views.
    """

    operation = "append"
    cost_unit = "token_kv_head"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = TIMING_BATCHES
    compile_case: Any = COMPILE_BATCH
    kv_format: KvFormat

    def layout(self, case: AppendBatch) -> Any:
        """Give the pool's layout."""
        return self.kv_format.layout(
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            block_size=case.block_size,
            dtype=getattr(torch, case.dtype),
        )

    def make_inputs(self, case: AppendBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
        key, value = (
            torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype)) for _ in range(2)
        )
        layout = self.layout(case)
        num_blocks = -(-case.num_tokens // case.block_size) + 2
        # Bytes below 64: read as scales they stay below 2, so that they cannot hide an error in one that is written.
        pages = torch.randint(0, 64, (num_blocks, layout.page_bytes), generator=generator, device=device)
        slots = torch.randperm(num_blocks * case.block_size, generator=generator, device=device)[: case.num_tokens]
        slots[case.num_tokens - case.num_padding :] = PADDING_SLOT
        return {"key": key, "value": value, "slot_mapping": slots, "pages": pages.to(torch.uint8)}

    def reference(self, case: AppendBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        pages = inputs["pages"].clone()
        views = self.layout(case).views(pages)
        slots = inputs["slot_mapping"]
        kept = slots >= 0
        encoded = self.kv_format.encode(inputs["key"][kept][:, None], inputs["value"][kept][:, None])
        for name, view in views.items():
            view[slots[kept] // case.block_size, slots[kept] % case.block_size] = encoded[name][:, 0]
        return views

    def allocate(self, case: AppendBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        pages = inputs["pages"].clone()
        return {"pages": pages, **self.layout(case).views(pages)}

    def comparison(self, result: str) -> Comparison:
        """Codes byte by byte; scales, norms and zero points by value."""
        return "close" if result.endswith(("scale", "zero", "norm")) else "codes"

    def compute_dtype(self, case: AppendBatch) -> str:
        """Metadata is computed in fp32 and stored in 16 bits or more."""
        return "float16"

    def traffic(self, case: AppendBatch) -> Traffic:
        tokens = case.num_tokens - case.num_padding
        element_bytes = getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=tokens * (2 * case.num_kv_heads * case.head_dim * element_bytes + 8),
            written_bytes=tokens * self.layout(case).page_bytes // case.block_size,
            flops=0,
            units=tokens * case.num_kv_heads,
        )


def check_append_inputs(case: AppendBatch, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the first rule broken, unless the tensors fit the case."""
    key, value, slots = inputs["key"], inputs["value"], inputs["slot_mapping"]
    requirements = {
        "key and value must be (num_tokens, num_kv_heads, head_dim)": key.shape
        == value.shape
        == (case.num_tokens, case.num_kv_heads, case.head_dim),
        "key and value must have one dtype": key.dtype == value.dtype,
        "key and value must be contiguous along head_dim": key.stride(-1) == value.stride(-1) == 1,
        "slot_mapping must be int64, one per token": slots.dtype == torch.int64 and slots.shape == (case.num_tokens,),
    }
    for requirement, met in requirements.items():
        if not met:
            raise ValueError(requirement)
