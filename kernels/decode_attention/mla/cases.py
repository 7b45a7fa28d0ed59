"""Shapes and tilings of decode attention over latents."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.latent import Mla, MlaFp8
from ...launches import Launch
from ..batch import RAGGED
from .batch import (
    LatentBatch,
    LatentConfig,
    LatentDecodeAttention,
    bf16_configs,
    block_of_heads,
    converts_e4m3,
    latent_batch,
)
from .kernel import plan_mla_e4m3_split, plan_mla_split

CORRECTNESS_LATENT_BATCHES = (
    latent_batch("one-token", "float16", 16, (1,), num_splits=1),
    latent_batch("ragged-bf16", "bfloat16", 17, RAGGED, head_dim=128 + 64, block_size=16, num_splits=2),
    latent_batch("deepseek-fp16", "float16", 32, (70, 0, 33), num_splits=2),
    latent_batch("deepseek-bf16", "bfloat16", 20, (65,), block_size=48, num_splits=4),
    latent_batch("all-empty", "bfloat16", 3, (0, 0), head_dim=64 + 64, num_splits=2),
)


class MlaDecodeAttention(LatentDecodeAttention):
    """Decode attention over latents in the model's dtype."""

    kv_format: Any = Mla()
    split_kernel_name = "decode_attention_mla_kernel"
    correctness_cases = CORRECTNESS_LATENT_BATCHES

    def plan_split(
        self,
        case: LatentBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LatentConfig,
    ) -> Launch:
        return plan_mla_split(case, inputs, buffers, config)

    def configs(self, target: str, case: LatentBatch) -> tuple[LatentConfig, ...]:
        return bf16_configs(target, case)


class MlaFp8DecodeAttention(MlaDecodeAttention):
    """Decode attention over latents in fp8 e4m3, multiplied as fp16."""

    kv_format = MlaFp8()
    multiplies_fp16 = True
    split_kernel_name = "decode_attention_mla_e4m3_kernel"

    def plan_split(
        self,
        case: LatentBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LatentConfig,
    ) -> Launch:
        return plan_mla_e4m3_split(case, inputs, buffers, config, self.kv_format.scale)

    def configs(self, target: str, case: LatentBatch) -> tuple[LatentConfig, ...]:
        by_bits = not converts_e4m3(target)
        if target.startswith("gfx"):
            return (LatentConfig(16, num_warps=4, num_stages=1, block_h=16, e4m3_by_bits=by_bits),)
        largest = {"sm_90": 64, "sm_80": 32}.get(target, 16)
        return (LatentConfig(64, 8, num_stages=2, block_h=block_of_heads(case, largest), e4m3_by_bits=by_bits),)


VARIANTS = (MlaDecodeAttention(), MlaFp8DecodeAttention())
