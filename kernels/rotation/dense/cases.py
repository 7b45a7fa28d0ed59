"""Variants of the dense transform of rows."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.turboquant import gaussian_projection, hadamard
from ...launches import Launch, LaunchConfig
from ..batch import Rotation, RowBatch
from .kernel import plan_dense_rotation, result_tile
from .reference import dense_rotation_reference


def dense_config(num_rows: int) -> LaunchConfig:
    """Give rows per program: few for the queries of a decode step."""
    return LaunchConfig(16 if num_rows < 1024 else 64, num_warps=4, num_stages=1)


class DenseRotation(Rotation):
    """Rows times the Hadamard matrix (as vLLM rotates) or the Gaussian matrix S of the QJL residual."""

    uses_matrix_units = True

    def __init__(self, *, gaussian: bool) -> None:
        self.operation = "rotation/dense_gaussian" if gaussian else "rotation/dense"
        self.gaussian = gaussian

    def _matrix(self, case: RowBatch, device: torch.device) -> torch.Tensor:
        make = gaussian_projection if self.gaussian else hadamard
        return make(case.dim, str(device)).to(torch.float16)

    def _scale(self, case: RowBatch) -> float:
        return 1.0 if self.gaussian else case.dim**-0.5

    def reference(self, case: RowBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        rows = inputs["rows"]
        return {"rotated": dense_rotation_reference(rows, self._matrix(case, rows.device), self._scale(case))}

    def plan(
        self, case: RowBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        rows = inputs["rows"]
        matrix = self._matrix(case, rows.device)
        return (plan_dense_rotation(rows, matrix, buffers["rotated"], config, scale=self._scale(case)),)

    def configs(self, target: str, case: RowBatch) -> tuple[LaunchConfig, ...]:
        return (dense_config(case.num_rows), LaunchConfig(32, num_warps=4, num_stages=1))

    def counted_loop(self, case: RowBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("dense_rotation_kernel", "whole", units=config.block_n * result_tile(case.dim) / case.dim)

    def flops(self, dim: int) -> int:
        return 2 * dim


VARIANTS = (DenseRotation(gaussian=False), DenseRotation(gaussian=True))
