"""Shapes and tilings of appending K and V as fp8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.fp8 import Fp8
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, Append, AppendBatch
from .kernel import encode_configs, plan_append_fp8


@dataclass(frozen=True)
class Fp8Append(Append):
    """Append as e4m3 or e5m2."""

    kv_format: Fp8
    correctness_cases: tuple[AppendBatch, ...] = (
        *CORRECTNESS_BATCHES,
        AppendBatch("head-dim-80-fp32", "float32", 3, 80, 48, 50, num_padding=1),
    )

    def make_inputs(self, case: AppendBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        return {**inputs, "key_scale": self.kv_format.key_scale, "value_scale": self.kv_format.value_scale}

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_fp8(case, inputs, buffers, config, code=self.kv_format.code),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return encode_configs(target, has_conversion=True)

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_fp8_kernel", "whole", units=config.block_n)


# Scales so small that some values pass the largest code, and so large that some become subnormal.
VARIANTS = (
    Fp8Append(Fp8("e4m3", key_scale=0.005, value_scale=8.0)),
    Fp8Append(Fp8("e5m2", key_scale=0.00004, value_scale=4096.0)),
)
