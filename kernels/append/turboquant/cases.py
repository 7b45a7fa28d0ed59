"""Variants of the write path of vLLM's TurboQuant presets."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...contract import CountedLoop, Form
from ...decode_attention.turboquant.cases import FP8_UNSUPPORTED, PRESETS
from ...formats.turboquant import TurboQuant, hadamard
from ...launches import Launch, LaunchConfig
from ...rotation.dense.cases import dense_config
from ...rotation.dense.kernel import plan_dense_rotation
from ..batch import CORRECTNESS_BATCHES, Append, AppendBatch
from .as_shipped import plan_append_as_shipped
from .kernel import plan_append_turboquant


class AppendTurboQuant(Append):
    """Rotate by a matrix product, normalise, count thresholds, pack, correct the norm."""

    kv_format: TurboQuant

    def __init__(self, kv_format: TurboQuant) -> None:
        self.kv_format = kv_format
        self.uses_matrix_units = kv_format.rotates_keys

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_turboquant(self.kv_format, case, inputs, buffers, config),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return append_configs(case)

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_turboquant_kernel", "whole", units=config.block_n)

    def unsupported(self, target: str) -> str | None:
        return FP8_UNSUPPORTED if target == "sm_80" and not self.kv_format.rotates_keys else None


class AppendTurboQuantAsShipped(AppendTurboQuant):
    """vLLM's store: rotate by a matrix product into fp32, then a program per token and head."""

    form: Form = "as_shipped"

    def __init__(self, kv_format: TurboQuant) -> None:
        super().__init__(kv_format)
        self.uses_matrix_units = False
        # A program per token and head is slow in the interpreter.
        self.correctness_cases = tuple(
            replace(case, num_tokens=min(case.num_tokens, 5)) for case in CORRECTNESS_BATCHES if case.head_dim < 256
        )

    def allocate(self, case: AppendBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        buffers = super().allocate(case, inputs, config)
        if self.kv_format.rotates_keys:
            key = inputs["key"]
            thresholds = self.kv_format.codebook.thresholds
            buffers["rotated_key"] = torch.empty_like(key, dtype=torch.float32)
            buffers["thresholds"] = torch.tensor(thresholds, dtype=torch.float32, device=key.device)
        return buffers

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        store = plan_append_as_shipped(self.kv_format, case, inputs, buffers, config)
        if not self.kv_format.rotates_keys:
            return (store,)
        rows = inputs["key"].reshape(-1, case.head_dim)
        rotated = buffers["rotated_key"].view(-1, case.head_dim)
        matrix = hadamard(case.head_dim, str(rows.device)).to(rows.dtype)
        rotation = plan_dense_rotation(rows, matrix, rotated, dense_config(len(rows)), scale=case.head_dim**-0.5)
        return rotation, store

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(1, num_warps=4, num_stages=1),)

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_turboquant_as_shipped_kernel", "whole", units=1)


def append_configs(case: AppendBatch) -> tuple[LaunchConfig, ...]:
    """Give tilings of few tokens, because a tile of codes is held in fp32."""
    few, more = (LaunchConfig(tokens, num_warps=4, num_stages=1) for tokens in (16, 32))
    return (few,) if case.num_tokens <= 16 else (more, few)


VARIANTS = (
    *(
        AppendTurboQuantAsShipped(TurboQuant(preset, *bits, codebook="lloyd_max", arrangement="inline"))
        for preset, bits in PRESETS.items()
    ),
    *(AppendTurboQuant(TurboQuant(preset, *bits)) for preset, bits in PRESETS.items()),
    AppendTurboQuant(TurboQuant("turboquant_4bit_nc", 4, 4, codebook="lloyd_max", suffix="_lut")),
    AppendTurboQuant(TurboQuant("turboquant_k3v4_nc", 3, 4, codebook="lloyd_max", suffix="_lut")),
)
