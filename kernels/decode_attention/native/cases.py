"""Shapes and tilings of decode attention over native K and V."""

from collections.abc import Mapping
from typing import Any

import torch

from ...formats.native import Native
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, RAGGED, DecodeAttention, DecodeBatch
from .kernel import plan_native_split


class NativeDecodeAttention(DecodeAttention):
    """Decode attention in the model's dtype: the yardstick of every compressed format."""

    kv_format = Native()
    split_kernel_name = "decode_attention_native_kernel"
    correctness_cases = (
        *CORRECTNESS_BATCHES,
        DecodeBatch("ragged-gqa-fp32", "float32", 8, 2, 64, 16, RAGGED, 4),
        DecodeBatch("multi-query-71-heads", "float16", 71, 1, 64, 16, (77,), 2),
        DecodeBatch("odd-group-odd-head-dim", "float32", 21, 3, 80, 16, (97, 33), 2),
        DecodeBatch("head-dim-96", "float16", 4, 2, 96, 32, (100,), 8),
        DecodeBatch("block-of-1", "float32", 2, 1, 16, 1, (37, 5), 2),
        DecodeBatch("block-larger-than-tile", "float32", 2, 1, 32, 256, (300, 256), 4),
        DecodeBatch("block-no-power-of-two", "float32", 4, 1, 32, 48, (100, 49, 48), 2),
    )

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_native_split(case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        # Two tiles each of K and V must fit the 99 KiB of shared memory of sm_120.
        block_n = 64 if case.head_dim <= 128 else 32
        configs = (LaunchConfig(block_n, num_warps=4, num_stages=3),)
        if target == "sm_120" or case.head_dim > 128:
            return configs
        deeper, wider = LaunchConfig(block_n, num_warps=4, num_stages=4), LaunchConfig(128, num_warps=4, num_stages=2)
        return (*configs, deeper, wider)


VARIANTS = (NativeDecodeAttention(),)
