"""Variants of the write path of the paper's Algorithms 1 and 2."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.turboquant import TurboQuantPaper
from ...launches import Launch, LaunchConfig
from ..batch import Append, AppendBatch
from ..turboquant.cases import append_configs
from .kernel import plan_append_turboquant_paper


class AppendTurboQuantPaper(Append):
    """Rotate by a matrix product, normalise, count thresholds, pack; project and keep the signs of what is left."""

    uses_matrix_units = True
    kv_format: TurboQuantPaper

    def __init__(self, kv_format: TurboQuantPaper) -> None:
        self.kv_format = kv_format

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_turboquant_paper(self.kv_format, case, inputs, buffers, config),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return append_configs(case)

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_turboquant_paper_kernel", "whole", units=config.block_n)


VARIANTS = tuple(
    AppendTurboQuantPaper(TurboQuantPaper(algorithm, bits)) for algorithm in ("mse", "prod") for bits in (2, 3, 4)
)
