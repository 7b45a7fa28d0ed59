"""Shapes and tilings of Knorm's score."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch
from ...launches import Launch, LaunchConfig
from ..batch import PagedScore, cache_bytes, score_bytes, split_count
from .kernel import plan_knorm
from .reference import knorm_scores


class Knorm(PagedScore):
    """One read of K."""

    operation = "score/knorm"

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": knorm_scores(inputs, max(case.context_lens))}

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        num_splits = split_count(case, inputs, config, rows=len(case.context_lens) * case.num_kv_heads)
        return plan_knorm(case, inputs, buffers["scores"], config, num_splits)

    def compute_dtype(self, case: DecodeBatch) -> str:
        return "float32"

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("knorm_kernel", "largest_loop", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        units = sum(case.context_lens) * case.num_kv_heads
        return Traffic(
            read_bytes=cache_bytes(case),
            written_bytes=score_bytes(case),
            flops=2 * units * case.head_dim,
            units=units,
        )


VARIANTS = (Knorm(),)
