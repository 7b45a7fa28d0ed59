"""Shapes and tilings of decode attention over NVFP4 and MXFP4."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import Form
from ...formats.block_fp4 import BlockFp4, MxFp4, NvFp4
from ...launches import Launch, LaunchConfig
from ..batch import DecodeAttention, DecodeBatch
from .as_shipped import make_value_table, plan_block_fp4_as_shipped_split
from .kernel import plan_block_fp4_split


class BlockFp4DecodeAttention(DecodeAttention):
    """Words of eight nibbles, elements and scales by bit placement, products in fp16."""

    split_kernel_name = "decode_attention_block_fp4_kernel"
    correctness_cases = (
        DecodeBatch("one-token", "float16", 4, 2, 64, 16, (1,), 1),
        DecodeBatch("ragged-gqa-bf16", "bfloat16", 8, 2, 64, 16, (0, 17, 130, 64), 2),
        DecodeBatch("multi-query-17-heads", "bfloat16", 17, 1, 128, 32, (77,), 2),
        DecodeBatch("more-splits-than-tiles", "float16", 4, 1, 128, 16, (200,), 8),
        DecodeBatch("head-dim-96", "float16", 2, 2, 96, 16, (70,), 2),
        DecodeBatch("head-dim-256", "bfloat16", 8, 1, 256, 16, (70,), 2),
    )

    def __init__(self, kv_format: BlockFp4) -> None:
        self.kv_format: BlockFp4 = kv_format

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_block_fp4_split(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        if case.head_dim > 128 or target == "sm_80":
            # ptxas spills on sm_80 at more tokens per warp.
            return (LaunchConfig(block_n=64, num_warps=4, num_stages=3),)
        large = LaunchConfig(block_n=128, num_warps=4, num_stages=3)
        small = LaunchConfig(block_n=64, num_warps=2, num_stages=3)
        # The large tile leaves room for one program in the 99 KiB of shared memory of sm_120.
        return (small, large) if target == "sm_120" else (large, small)


class BlockFp4AsShippedDecodeAttention(BlockFp4DecodeAttention):
    """Values from a table, even and odd elements apart, a scale loaded with each byte."""

    form: Form = "as_shipped"
    split_kernel_name = "decode_attention_block_fp4_as_shipped_kernel"

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        return inputs | {"value_table": make_value_table(inputs["query"].device)}

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_block_fp4_as_shipped_split(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)


VARIANTS = (
    BlockFp4DecodeAttention(NvFp4()),
    BlockFp4AsShippedDecodeAttention(NvFp4()),
    BlockFp4DecodeAttention(MxFp4()),
    BlockFp4AsShippedDecodeAttention(MxFp4()),
)
