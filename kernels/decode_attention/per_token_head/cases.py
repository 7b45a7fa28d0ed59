"""Shapes and tilings of decode attention over per-token-head codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...contract import Form
from ...formats.base import KvFormat
from ...formats.per_token_head import Int4PerTokenHead, PerTokenHead8, VllmInt4PerTokenHead
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, DecodeAttention, DecodeBatch
from ..fp8.cases import RAGGED_BATCH, amd_configs
from ..fp8.kernel import UnpackConfig, plan_byte_split
from .kernel import plan_int4_split
from .shipped import plan_shipped_split

_ODD = DecodeBatch("odd-group-head-dim-80-bf16", "bfloat16", 51, 3, 80, 32, (97, 33), 2)
_CASES = (
    *(case for case in CORRECTNESS_BATCHES if case.name not in {"all-empty", "ragged-gqa", "ragged-gqa-bf16"}),
    RAGGED_BATCH,
    _ODD,
)
_SHIPPED_NAMES = {"one-token", "multi-head", "head-dim-256"}
_SHIPPED_CASES = (*(case for case in CORRECTNESS_BATCHES if case.name in _SHIPPED_NAMES), RAGGED_BATCH, _ODD)


@dataclass(frozen=True)
class BytePerTokenHeadDecodeAttention(DecodeAttention):
    """Decode attention over int8 or e4m3 codes, scales applied to scores and weights."""

    kv_format: PerTokenHead8
    split_kernel_name: ClassVar = "decode_attention_bytes_kernel"
    correctness_cases: tuple[DecodeBatch, ...] = _CASES

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        code = "int8" if self.kv_format.dtype == "int8" else "e4m3"
        return plan_byte_split(case, inputs, buffers, config, code=code)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return amd_configs(case)
        unpack = "bits" if target == "sm_80" or self.kv_format.dtype == "int8" else "convert"
        if case.head_dim > 128:
            return (UnpackConfig(64, num_warps=4, num_stages=2, unpack=unpack),)
        return (
            UnpackConfig(64, num_warps=2, num_stages=3, unpack=unpack),
            UnpackConfig(64, num_warps=2, num_stages=4, unpack=unpack),
            UnpackConfig(128, num_warps=4, num_stages=3, unpack=unpack),
        )


@dataclass(frozen=True)
class Int4PerTokenHeadDecodeAttention(DecodeAttention):
    """Decode attention over 4-bit codes read four to a word, scales and zeros applied to scores and weights."""

    kv_format: KvFormat
    split_kernel_name: ClassVar = "decode_attention_int4_kernel"
    correctness_cases: tuple[DecodeBatch, ...] = _CASES

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_int4_split(case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            warps = (1, 2) if case.head_dim <= 128 else (4,)
            return tuple(LaunchConfig(32, num_warps, num_stages=2) for num_warps in warps)
        if case.head_dim > 128:
            return (LaunchConfig(64, num_warps=4, num_stages=3),)
        return (
            LaunchConfig(128, num_warps=4, num_stages=3),
            LaunchConfig(64, num_warps=2, num_stages=3),
            LaunchConfig(64, num_warps=2, num_stages=4),
        )


@dataclass(frozen=True)
class ShippedPerTokenHeadDecodeAttention(DecodeAttention):
    """The same as vLLM's Triton backend runs it, over its inline layout."""

    kv_format: KvFormat
    form: ClassVar[Form] = "as_shipped"
    split_kernel_name: ClassVar = "decode_attention_per_token_head_shipped_kernel"
    correctness_cases: tuple[DecodeBatch, ...] = _SHIPPED_CASES

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_shipped_split(case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        """Give vLLM's tile for queries of two bytes, then the one it takes for a byte."""
        stages = 2 if target.startswith("gfx") else 3
        return tuple(LaunchConfig(block_n, num_warps=4, num_stages=stages) for block_n in (16, 32))

    def unsupported(self, target: str) -> str | None:
        if target == "sm_80" and self.kv_format.name == "fp8_per_token_head":
            return "type fp8e4nv not supported in this architecture"
        return None


VARIANTS = (
    BytePerTokenHeadDecodeAttention(PerTokenHead8("int8")),
    ShippedPerTokenHeadDecodeAttention(PerTokenHead8("int8", "inline")),
    BytePerTokenHeadDecodeAttention(PerTokenHead8("fp8")),
    ShippedPerTokenHeadDecodeAttention(PerTokenHead8("fp8", "inline")),
    Int4PerTokenHeadDecodeAttention(Int4PerTokenHead()),
    ShippedPerTokenHeadDecodeAttention(VllmInt4PerTokenHead()),
)
