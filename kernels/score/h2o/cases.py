"""Shapes and tilings of H2O's scores: one decode step, and a whole prompt."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch
from ...launches import Launch, LaunchConfig
from ..batch import PagedScore, cache_bytes, draw, element_bytes, score_bytes, split_count
from ..newest import RowConfig, plan_newest_scores
from ..newest_inputs import draw_lse
from .kernel import plan_h2o_prefill
from .reference import h2o_prefill, h2o_step


class H2OStep(PagedScore):
    """One decode step: the newest query's probabilities are added to the scores, which stay where they are."""

    operation = "score/h2o/step"
    uses_matrix_units = True

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        batch = len(case.context_lens)
        generator = torch.Generator(device=device).manual_seed(seed + 4)
        shape = (batch, case.num_kv_heads, max(case.context_lens))
        return {
            **super().make_inputs(case, seed=seed, device=device),
            "query": draw(
                (batch, 1, case.num_query_heads, case.head_dim), dtype=case.dtype, seed=seed + 2, device=device
            ),
            "lse": draw_lse(case, seed=seed + 3, device=device),
            "scores": torch.rand(shape, generator=generator, device=device),
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": h2o_step(inputs)}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"scores": inputs["scores"].clone()}

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        num_splits = split_count(case, inputs, config, rows=len(case.context_lens) * case.num_kv_heads)
        scores = buffers["scores"][:, :, None]
        launch = plan_newest_scores(
            case, inputs, 1, inputs["lse"], scores, config, num_splits=num_splits, unscored=0, accumulate=True
        )
        return (launch,)

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("newest_score_kernel", "matrix_loop", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        rows = len(case.context_lens) * case.num_query_heads
        units = sum(case.context_lens) * case.num_kv_heads
        return Traffic(
            read_bytes=cache_bytes(case) + rows * (case.head_dim * element_bytes(case) + 4) + 4 * units,
            written_bytes=4 * units,
            flops=2 * sum(case.context_lens) * case.num_query_heads * case.head_dim,
            units=units,
        )


class H2OPrefill(PagedScore):
    """A whole prompt at once: the column sums of its causal attention, with the row sums of prefill attention."""

    operation = "score/h2o/prefill"
    uses_matrix_units = True
    timing_cases = tuple(
        DecodeBatch(f"{batch}x{context}-32/8", "bfloat16", 32, 8, 128, 16, (context,) * batch)
        for batch, context in ((1, 4096), (1, 16384), (4, 16384), (1, 65536), (1, 131072))
    )

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        shape = (len(case.context_lens), max(case.context_lens), case.num_query_heads, case.head_dim)
        query = draw(shape, dtype=case.dtype, seed=seed + 2, device=device)
        position = torch.arange(shape[1], device=device)
        lens = torch.tensor(case.context_lens, device=device)
        query[position >= lens[:, None]] = math.nan
        noise = 0.3 * draw(shape[:3], dtype="float32", seed=seed + 3, device=device)
        return {
            **super().make_inputs(case, seed=seed, device=device),
            "query": query,
            # About what N(0, 1) logits give, in log2 units.
            "lse": (position + 1).log2().view(1, -1, 1) + 0.5 * math.log2(math.e) + noise,
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": h2o_prefill(inputs, max(case.context_lens))}

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_h2o_prefill(case, inputs, buffers["scores"], config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[RowConfig, ...]:
        if target.startswith("gfx"):
            return (RowConfig(block_n=64, num_warps=4, num_stages=2, block_m=64),)
        if case.head_dim > 128 or case.dtype == "float32":
            return (RowConfig(block_n=64, num_warps=4, num_stages=2, block_m=32),)
        configs = (RowConfig(block_n=128, num_warps=4, num_stages=3, block_m=64),)
        if target == "sm_120":
            return configs
        return (*configs, RowConfig(block_n=128, num_warps=8, num_stages=3, block_m=128))

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        """Count pairs of a row and a key as units: see `traffic`."""
        block_m = config.block_m if isinstance(config, RowConfig) else 0
        return CountedLoop("h2o_prefill_kernel", "matrix_loop", units=config.block_n * block_m)

    cost_unit = "pair"

    def traffic(self, case: DecodeBatch) -> Traffic:
        """Give the units as pairs of a query head's row and a key that it sees."""
        pairs = case.num_query_heads * sum(tokens * (tokens + 1) // 2 for tokens in case.context_lens)
        rows = sum(case.context_lens) * case.num_query_heads
        return Traffic(
            read_bytes=cache_bytes(case) + rows * (case.head_dim * element_bytes(case) + 4),
            written_bytes=score_bytes(case),
            flops=2 * pairs * case.head_dim,
            units=pairs,
        )


VARIANTS = (H2OStep(), H2OPrefill())
