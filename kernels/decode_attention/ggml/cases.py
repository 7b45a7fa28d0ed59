"""Shapes and tilings of decode attention over llama.cpp's cache types."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.ggml import Ggml
from ...launches import Launch, LaunchConfig
from ..batch import DecodeAttention, DecodeBatch
from .kernel import plan_ggml_split


class GgmlDecodeAttention(DecodeAttention):
    """Words of codes made fp16 by bit placement, elements multiplied by their block's step in fp16."""

    split_kernel_name = "decode_attention_ggml_kernel"
    correctness_cases = (
        DecodeBatch("one-token", "float16", 4, 2, 64, 16, (1,), 1),
        DecodeBatch("ragged-gqa-bf16", "bfloat16", 8, 2, 64, 16, (0, 17, 130, 64), 2),
        DecodeBatch("multi-query-17-heads", "bfloat16", 17, 1, 128, 32, (77,), 2),
        DecodeBatch("more-splits-than-tiles", "float16", 4, 1, 128, 16, (200,), 8),
        DecodeBatch("head-dim-96", "float16", 2, 2, 96, 16, (70,), 2),
        DecodeBatch("head-dim-256", "bfloat16", 8, 1, 256, 16, (70,), 2),
    )

    def __init__(self, kv_format: Ggml) -> None:
        self.kv_format: Ggml = kv_format

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_ggml_split(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        medium = LaunchConfig(block_n=64, num_warps=4, num_stages=3)
        if case.head_dim > 128 or target == "sm_80":
            return (medium,)
        large = LaunchConfig(block_n=128, num_warps=4, num_stages=3)
        small = LaunchConfig(block_n=64, num_warps=2, num_stages=3)
        if target == "sm_120":
            # The large tile of q8_0 exceeds its 99 KiB of shared memory; ptxas spills in smaller ones of q4_0.
            return (small, medium) if self.kv_format.bits == 8 else (large,)
        return (large, small)


VARIANTS = (GgmlDecodeAttention(Ggml("q8_0")), GgmlDecodeAttention(Ggml("q5_1")), GgmlDecodeAttention(Ggml("q4_0")))
