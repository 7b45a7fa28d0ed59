"""Shapes and tilings of KeyDiff's score."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch
from ...launches import Launch, LaunchConfig
from ..batch import PagedScore, cache_bytes, score_bytes, split_count
from .kernel import plan_keydiff
from .reference import keydiff_scores


class KeyDiff(PagedScore):
    """Two reads of K: every cosine needs the whole sum."""

    operation = "score/keydiff"

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": keydiff_scores(inputs, max(case.context_lens))}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        heads = (len(case.context_lens), case.num_kv_heads)
        splits = split_count(case, inputs, config, rows=heads[0] * heads[1])
        device = inputs["block_table"].device
        return {
            **super().allocate(case, inputs, config),
            "anchor": torch.empty(*heads, splits, case.head_dim, device=device),
        }

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_keydiff(case, inputs, buffers["anchor"], buffers["scores"], config)

    def compute_dtype(self, case: DecodeBatch) -> str:
        return "float32"

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("keydiff_kernel", "largest_loop", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        units = sum(case.context_lens) * case.num_kv_heads
        return Traffic(
            read_bytes=cache_bytes(case),
            written_bytes=score_bytes(case),
            # Norm and sum of the first pass, cosine of the second with the norm again.
            flops=8 * units * case.head_dim,
            units=units,
        )


VARIANTS = (KeyDiff(),)
