"""Shapes and tilings of Expected Attention's score."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch
from ...launches import Launch, LaunchConfig
from ..batch import PagedScore, cache_bytes, draw, element_bytes, score_bytes, split_count
from .kernel import plan_expected_attention
from .reference import expected_attention_scores

NUM_SINKS = 4
"""Tokens at the start that are always kept (kvpress's default)."""


class ExpectedAttention(PagedScore):
    """Mean and covariance of the future queries come rotated: they are small, and made once per layer."""

    operation = "score/expected_attention"
    uses_matrix_units = True

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        shape = (len(case.context_lens), case.num_query_heads, case.head_dim)
        factor = draw((*shape, case.head_dim), dtype="float32", seed=seed + 3, device=device)
        covariance = 0.5 * factor @ factor.mT / case.head_dim
        return {
            **super().make_inputs(case, seed=seed, device=device),
            "query_mean": draw(shape, dtype=case.dtype, seed=seed + 2, device=device),
            "query_covariance": covariance.to(getattr(torch, case.dtype)),
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": expected_attention_scores(inputs, NUM_SINKS, max(case.context_lens))}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        heads = (len(case.context_lens), case.num_query_heads)
        device = inputs["block_table"].device
        splits = split_count(case, inputs, config, rows=heads[0] * heads[1])
        return {
            **super().allocate(case, inputs, config),
            "logits": torch.empty(*heads, max(case.context_lens), device=device),
            "lse": torch.empty(*heads, splits, device=device),
        }

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        num_splits = split_count(case, inputs, config, rows=len(case.context_lens) * case.num_kv_heads)
        return plan_expected_attention(case, inputs, buffers, config, num_sinks=NUM_SINKS, num_splits=num_splits)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=64, num_warps=8, num_stages=1),)
        if case.head_dim > 128 or case.dtype == "float32":
            return (LaunchConfig(block_n=32, num_warps=8, num_stages=2),)
        return (LaunchConfig(block_n=64, num_warps=4, num_stages=3), LaunchConfig(128, num_warps=8, num_stages=3))

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        """Count the logits; a program does the work of one query head of the group."""
        return CountedLoop("expected_logits_kernel", "matrix_loop", units=config.block_n / case.group)

    def traffic(self, case: DecodeBatch) -> Traffic:
        tokens = sum(case.context_lens)
        statistics = len(case.context_lens) * case.num_query_heads * case.head_dim * (case.head_dim + 1)
        return Traffic(
            read_bytes=2 * cache_bytes(case) + statistics * element_bytes(case),
            written_bytes=score_bytes(case),
            flops=2 * tokens * case.num_query_heads * case.head_dim * (case.head_dim + 2)
            + 2 * tokens * case.num_kv_heads * case.head_dim,
            units=tokens * case.num_kv_heads,
        )


VARIANTS = (ExpectedAttention(),)
