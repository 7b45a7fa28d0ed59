"""Variants of the fast Walsh-Hadamard transform."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.turboquant import random_signs
from ...launches import Launch, LaunchConfig
from ..batch import Rotation, RowBatch
from .kernel import plan_fast_hadamard
from .reference import hadamard_reference


def hadamard_config(num_rows: int) -> LaunchConfig:
    """Rows per program: few, so that the rows of one decode step spread over the GPU."""
    return LaunchConfig(block_n=4 if num_rows < 1024 else 16, num_warps=1 if num_rows < 1024 else 4, num_stages=1)


class FastHadamard(Rotation):
    """Transform of rows, plain (vLLM's rotation of keys and queries) or with random signs (a random rotation)."""

    def __init__(self, *, signed: bool) -> None:
        self.operation = "rotation/fast_hadamard_signs" if signed else "rotation/fast_hadamard"
        self.signed = signed

    def _signs(self, case: RowBatch, device: torch.device) -> torch.Tensor | None:
        return random_signs(case.dim, str(device)) if self.signed else None

    def reference(self, case: RowBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        rows = inputs["rows"]
        return {"rotated": hadamard_reference(rows, self._signs(case, rows.device))}

    def plan(
        self, case: RowBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        rows = inputs["rows"]
        return (plan_fast_hadamard(rows, buffers["rotated"], config, signs_first=self._signs(case, rows.device)),)

    def configs(self, target: str, case: RowBatch) -> tuple[LaunchConfig, ...]:
        default = hadamard_config(case.num_rows)
        return (default, LaunchConfig(32, num_warps=4, num_stages=1))

    def counted_loop(self, case: RowBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("fast_hadamard_kernel", "whole", units=config.block_n)

    def flops(self, dim: int) -> int:
        return dim.bit_length() - 1


VARIANTS = (FastHadamard(signed=False), FastHadamard(signed=True))
