"""Shapes and tilings of appending K and V as per-token-head codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.per_token_head import Int4PerTokenHead, PerTokenHead8
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, Append, AppendBatch
from ..fp8.kernel import encode_configs
from .kernel import plan_append_bytes, plan_append_int4

_CASES = (*CORRECTNESS_BATCHES, AppendBatch("head-dim-80-fp32", "float32", 3, 80, 48, 50, num_padding=1))


@dataclass(frozen=True)
class BytePerTokenHeadAppend(Append):
    """Append as int8 or e4m3 codes with an fp32 scale."""

    kv_format: PerTokenHead8
    correctness_cases: tuple[AppendBatch, ...] = _CASES

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_bytes(case, inputs, buffers, config, dtype=self.kv_format.dtype),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return encode_configs(target, has_conversion=self.kv_format.dtype == "fp8")

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_bytes_per_token_head_kernel", "whole", units=config.block_n)


@dataclass(frozen=True)
class Int4PerTokenHeadAppend(Append):
    """Append as 4-bit codes with an fp16 scale and zero."""

    kv_format: Int4PerTokenHead
    correctness_cases: tuple[AppendBatch, ...] = _CASES

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_int4(case, inputs, buffers, config),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return tuple(LaunchConfig(block_t, num_warps=4, num_stages=1) for block_t in (16, 32))

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_int4_per_token_head_kernel", "whole", units=config.block_n)


VARIANTS = (
    BytePerTokenHeadAppend(PerTokenHead8("int8")),
    BytePerTokenHeadAppend(PerTokenHead8("fp8")),
    Int4PerTokenHeadAppend(Int4PerTokenHead()),
)
