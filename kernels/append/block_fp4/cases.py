"""Shapes and tilings of appending K and V as NVFP4 and MXFP4."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop
from ...formats.block_fp4 import BlockFp4, MxFp4, NvFp4
from ...launches import Launch, LaunchConfig
from ..batch import CORRECTNESS_BATCHES, Append, AppendBatch
from .kernel import plan_append_block_fp4


class BlockFp4Append(Append):
    """Append as E2M1 codes with a one-byte scale per block."""

    correctness_cases = (*CORRECTNESS_BATCHES, AppendBatch("head-dim-96", "float16", 2, 96, 16, 21))

    def __init__(self, kv_format: BlockFp4) -> None:
        self.kv_format: BlockFp4 = kv_format

    def plan(
        self, case: AppendBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_append_block_fp4(self.kv_format, case, inputs, buffers, config),)

    def configs(self, target: str, case: AppendBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=16, num_warps=4, num_stages=1), LaunchConfig(32, num_warps=4, num_stages=1))

    def counted_loop(self, case: AppendBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("append_block_fp4_kernel", "whole", units=config.block_n)


VARIANTS = (BlockFp4Append(NvFp4()), BlockFp4Append(MxFp4()))
