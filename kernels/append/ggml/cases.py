"""Shapes and tilings of appending K and V as llama.cpp's cache types."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.ggml import Ggml
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, Append, AppendBatch
from .kernel import plan_append_ggml


class GgmlAppend(Append):
    """Append as blocks of 32 codes with an fp16 step."""

    correctness_cases = (*CORRECTNESS_BATCHES, AppendBatch("head-dim-96", "float16", 2, 96, 16, 21))

    def __init__(self, kv_format: Ggml) -> None:
        self.kv_format: Ggml = kv_format

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_ggml(self.kv_format, case, inputs, buffers, config),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=16, num_warps=4, num_stages=1), LaunchConfig(32, num_warps=4, num_stages=1))

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_ggml_kernel", "whole", units=config.block_n)


VARIANTS = (GgmlAppend(Ggml("q8_0")), GgmlAppend(Ggml("q5_1")), GgmlAppend(Ggml("q4_0")))
