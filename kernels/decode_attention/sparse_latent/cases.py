"""Tilings of decode attention over chosen tokens of a latent cache."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.latent import Fp8DsMla, Mla
from ...launches import Launch
from ..batch import MIN_DOT_ROWS
from ..mla.batch import LatentConfig, bf16_configs, block_of_heads, converts_e4m3
from .batch import TopkBatch, TopkDecodeAttention
from .kernel import plan_topk_fp8_ds_mla_split, plan_topk_split


class TopkMlaDecodeAttention(TopkDecodeAttention):
    """Chosen latents in the model's dtype."""

    kv_format = Mla()
    split_kernel_name = "decode_attention_topk_kernel"

    def plan_split(
        self, case: TopkBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LatentConfig
    ) -> Launch:
        return plan_topk_split(case, inputs, buffers, config)

    def configs(self, target: str, case: TopkBatch) -> tuple[LatentConfig, ...]:
        return bf16_configs(target, case)


class TopkFp8DsMlaDecodeAttention(TopkDecodeAttention):
    """Chosen latents as DeepSeek-V3.2 is served: 656 B per token, multiplied as fp16 and bf16."""

    kv_format = Fp8DsMla()
    multiplies_fp16 = True
    split_kernel_name = "decode_attention_topk_fp8_ds_mla_kernel"

    def plan_split(
        self, case: TopkBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LatentConfig
    ) -> Launch:
        return plan_topk_fp8_ds_mla_split(case, inputs, buffers, config)

    def configs(self, target: str, case: TopkBatch) -> tuple[LatentConfig, ...]:
        by_bits = not converts_e4m3(target)

        def config(block_n: int, num_warps: int, block_h: int) -> LatentConfig:
            stages = 1 if target.startswith("gfx") else 2
            return LatentConfig(block_n, num_warps, stages, block_h=block_h, e4m3_by_bits=by_bits)

        heads = block_of_heads(case, 64 if target == "sm_90" else 32)
        if target.startswith("gfx") or heads == MIN_DOT_ROWS:
            return (config(64, 8, MIN_DOT_ROWS),) if target == "sm_80" else (config(16, 4, MIN_DOT_ROWS),)
        if heads == 64:
            # A tile of 32 tokens spills 88 bytes and still has fewer instructions per token.
            return (config(16, 8, heads), config(32, 8, heads))
        return (config(32, 8, heads),)


VARIANTS = (TopkMlaDecodeAttention(), TopkFp8DsMlaDecodeAttention())
