"""Batches of rows to rotate, and what the rotations share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..contract import Traffic, Variant
from ..launches import LaunchConfig


@dataclass(frozen=True)
class RowBatch:
    """Rows of a batch: one per token and head.

    Attributes
    ----------
    dtype : str
        Of the rows, and of the results unless `result_dtype` says otherwise.
    """

    name: str
    dtype: str
    num_rows: int
    dim: int
    result_dtype: str | None = None


CORRECTNESS_BATCHES = (
    RowBatch("one-row", "float16", 1, 64),
    RowBatch("odd-rows", "bfloat16", 37, 128),
    RowBatch("dim-256-to-fp32", "float16", 33, 256, "float32"),
    RowBatch("no-rows", "float16", 0, 64),
)

COMPILE_BATCH = RowBatch("queries", "bfloat16", 64, 128, "float16")

TIMING_BATCHES = tuple(
    RowBatch(f"{tokens}-tokens-of-{heads}-heads", "bfloat16", tokens * heads, 128, "float16")
    for tokens, heads in ((1, 32), (16, 32), (128, 32), (2048, 8), (16384, 8))
)


class Rotation(Variant):
    """What the rotations of rows share.

    Inputs: ``rows`` (num_rows, dim) and what a kind adds. Result: ``rotated``, of the same shape.
    """

    cost_unit = "row"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = TIMING_BATCHES
    compile_case: Any = COMPILE_BATCH

    def make_inputs(self, case: RowBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        rows = torch.randn(case.num_rows, case.dim, generator=generator, device=device)
        return {"rows": rows.to(getattr(torch, case.dtype))}

    def allocate(self, case: RowBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"rotated": torch.empty_like(inputs["rows"], dtype=getattr(torch, case.result_dtype or case.dtype))}

    def traffic(self, case: RowBatch) -> Traffic:
        elements = case.num_rows * case.dim
        return Traffic(
            read_bytes=elements * getattr(torch, case.dtype).itemsize,
            written_bytes=elements * getattr(torch, case.result_dtype or case.dtype).itemsize,
            flops=elements * self.flops(case.dim),
            units=case.num_rows,
        )

    def flops(self, dim: int) -> int:
        """Give the floating-point operations per element of the result."""
        raise NotImplementedError


def check_rows(rows: torch.Tensor, rotated: torch.Tensor) -> None:
    """Raise ValueError, naming the first rule broken, unless rows and results fit each other."""
    dim = rows.shape[-1]
    if rows.dim() != 2 or rows.shape != rotated.shape:
        raise ValueError("rows and results must both be (num_rows, dim)")
    if not (rows.is_contiguous() and rotated.is_contiguous()):
        raise ValueError("rows and results must be contiguous")
    if dim & (dim - 1) or dim < 16:
        raise ValueError(f"dim must be a power of two of at least 16, not {dim}")
