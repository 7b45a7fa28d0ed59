"""Shapes and tilings of appending K and V as they are."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ...contract import CountedLoop
from ...formats.native import Native
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, Append, AppendBatch
from .kernel import plan_append_native


class NativeAppend(Append):
    """Append in the model's dtype."""

    kv_format = Native()
    correctness_cases: ClassVar = (
        *CORRECTNESS_BATCHES,
        AppendBatch("head-dim-80-fp32", "float32", 3, 80, 48, 50, num_padding=1),
    )

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_native(case, inputs, buffers, config),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(16, num_warps=4, num_stages=1), LaunchConfig(32, num_warps=4, num_stages=1))

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_native_kernel", "whole", units=config.block_n)


VARIANTS = (NativeAppend(),)
