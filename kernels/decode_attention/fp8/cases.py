"""Shapes and tilings of decode attention over fp8 K and V."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...contract import Form
from ...formats.fp8 import Fp8
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, DecodeAttention, DecodeBatch
from .kernel import UnpackConfig, plan_byte_split
from .shipped import plan_shipped_split

_SHIPPED_NAMES = {"one-token", "multi-head", "head-dim-256"}
RAGGED_BATCH = DecodeBatch("ragged-gqa", "float16", 8, 2, 64, 16, (15, 130, 0, 17), 2)
"""Fewer programs than the shared one: these formats have many variants."""


@dataclass(frozen=True)
class Fp8DecodeAttention(DecodeAttention):
    """Decode attention over e4m3 or e5m2 codes."""

    kv_format: Fp8
    split_kernel_name: ClassVar = "decode_attention_bytes_kernel"
    correctness_cases: tuple[DecodeBatch, ...] = (
        *(case for case in CORRECTNESS_BATCHES if not case.name.startswith("ragged")),
        RAGGED_BATCH,
        DecodeBatch("odd-group-head-dim-80", "float16", 21, 3, 80, 16, (97, 33), 2),
    )

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        return {**inputs, "key_scale": self.kv_format.key_scale, "value_scale": self.kv_format.value_scale}

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_byte_split(case, inputs, buffers, config, code=self.kv_format.code)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return amd_configs(case)
        unpack = "bits" if target == "sm_80" and self.kv_format.code == "e4m3" else "convert"
        if case.head_dim > 128:
            return (UnpackConfig(64, num_warps=4, num_stages=2, unpack=unpack),)
        return (
            UnpackConfig(64, num_warps=2, num_stages=3, unpack=unpack),
            UnpackConfig(64, num_warps=2, num_stages=4, unpack=unpack),
            UnpackConfig(128, num_warps=4, num_stages=3, unpack=unpack),
        )


def amd_configs(case: DecodeBatch) -> tuple[LaunchConfig, ...]:
    """Tilings for AMD: few waves, because all of a program's waves load every token's metadata."""
    warps = (1, 2) if case.head_dim <= 128 else (4,)
    return tuple(UnpackConfig(32, num_warps, num_stages=2, unpack="bits") for num_warps in warps)


@dataclass(frozen=True)
class ShippedFp8DecodeAttention(Fp8DecodeAttention):
    """The same as SGLang's Triton backend runs it."""

    form: ClassVar[Form] = "as_shipped"
    correctness_cases: tuple[DecodeBatch, ...] = (
        *(case for case in CORRECTNESS_BATCHES if case.name in _SHIPPED_NAMES),
        RAGGED_BATCH,
    )
    split_kernel_name: ClassVar = "decode_attention_fp8_shipped_kernel"

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_shipped_split(case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(32, num_warps=4, num_stages=1 if target.startswith("gfx") else 2),)

    def compute_dtype(self, case: DecodeBatch) -> str:
        """Weights are rounded to V's fp8."""
        return "fp8"

    def unsupported(self, target: str) -> str | None:
        if target == "sm_80" and self.kv_format.code == "e4m3":
            return "type fp8e4nv not supported in this architecture"
        return None


E4M3 = Fp8("e4m3", key_scale=0.0375, value_scale=0.0125)
E5M2 = Fp8("e5m2", key_scale=0.75, value_scale=1.25)
VARIANTS = (
    Fp8DecodeAttention(E4M3),
    ShippedFp8DecodeAttention(E4M3),
    Fp8DecodeAttention(E5M2),
    ShippedFp8DecodeAttention(E5M2),
)
