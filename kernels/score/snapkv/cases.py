"""Shapes and tilings of SnapKV's score, with and without the row sums of prefill attention at hand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch
from ...launches import Launch, LaunchConfig
from ..batch import CONTEXTS, RAGGED, PagedScore, cache_bytes, draw, element_bytes, score_bytes, split_count
from ..newest import RowConfig, plan_newest_lse, plan_newest_scores, row_blocks
from ..reference import causal_logits, request_tokens
from .kernel import plan_snapkv_pool
from .reference import snapkv_scores

_MAX_LSE_SPLITS = 32
"""Every program of the score pass adds up the splits' sums of all its rows."""


@dataclass(frozen=True)
class SnapKVBatch(DecodeBatch):
    """Prompts whose last `window` queries score, and how scores are pooled."""

    window: int = 64
    kernel_size: int = 5
    pooling: str = "average"


class SnapKV(PagedScore):
    """A pass over K for the row sums, one for the probabilities, and the pooling."""

    operation = "score/snapkv"
    uses_matrix_units = True
    correctness_cases = (
        SnapKVBatch("one-token", "float16", 4, 2, 64, 16, (1,), 1, window=4),
        SnapKVBatch("ragged-gqa", "float16", 8, 2, 64, 16, RAGGED, 2, window=16),
        SnapKVBatch("window-64-bf16", "bfloat16", 8, 2, 64, 16, (130, 64, 70), 4),
        SnapKVBatch("maximum-of-7", "bfloat16", 17, 1, 128, 32, (77,), 2, window=8, kernel_size=7, pooling="maximum"),
        SnapKVBatch("odd-head-dim-fp32", "float32", 6, 2, 80, 16, (70, 9), 1, window=5, kernel_size=3),
    )
    timing_cases = tuple(
        SnapKVBatch(f"{batch}x{context}-32/8", "bfloat16", 32, 8, 128, 16, (context,) * batch)
        for batch, context in CONTEXTS
    )
    compile_case = SnapKVBatch("llama-3-8b", "bfloat16", 32, 8, 128, 16, (64, 128), 8)

    def make_inputs(self, case: SnapKVBatch, *, seed: int, device: str) -> dict[str, Any]:
        shape = (len(case.context_lens), case.window, case.num_query_heads, case.head_dim)
        return {
            **super().make_inputs(case, seed=seed, device=device),
            "query": draw(shape, dtype=case.dtype, seed=seed + 2, device=device),
        }

    def reference(self, case: SnapKVBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": snapkv_scores(inputs, case.kernel_size, case.pooling, max(case.context_lens))}

    def allocate(self, case: SnapKVBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        heads = (len(case.context_lens), case.num_kv_heads)
        rows, blocks = case.window * case.group, row_blocks(case.window * case.group, config)[1]
        splits = min(_MAX_LSE_SPLITS, split_count(case, inputs, config, rows=heads[0] * heads[1] * blocks))
        device = inputs["query"].device
        return {
            **super().allocate(case, inputs, config),
            "received": torch.empty(*heads, blocks, max(case.context_lens), device=device),
            "lse": torch.empty(*heads, rows, splits, device=device),
        }

    def plan(
        self, case: SnapKVBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        sums = plan_newest_lse(case, inputs, case.window, buffers["lse"], config)
        return (sums, *self._score_and_pool(case, inputs, buffers, buffers["lse"], config))

    @staticmethod
    def _score_and_pool(
        case: SnapKVBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        lse: torch.Tensor,
        config: LaunchConfig,
    ) -> tuple[Launch, ...]:
        received = buffers["received"]
        num_splits = split_count(case, inputs, config, rows=received.shape[:3].numel())
        score = plan_newest_scores(
            *(case, inputs, case.window, lse, received, config),
            num_splits=num_splits,
            unscored=case.window,
            accumulate=False,
        )
        pool = plan_snapkv_pool(
            received,
            inputs["context_lens"],
            buffers["scores"],
            window=case.window,
            group=case.group,
            kernel_size=case.kernel_size,
            pooling=case.pooling,
        )
        return score, pool

    def configs(self, target: str, case: SnapKVBatch) -> tuple[RowConfig, ...]:
        if target.startswith("gfx"):
            return (RowConfig(block_n=64, num_warps=4, num_stages=2, block_m=64),)
        if case.head_dim > 128 or case.dtype == "float32":
            return (RowConfig(block_n=32, num_warps=4, num_stages=2, block_m=64),)
        if target == "sm_120":
            return (RowConfig(block_n=64, num_warps=4, num_stages=3, block_m=128),)
        configs = (
            RowConfig(block_n=64, num_warps=4, num_stages=3, block_m=128),
            RowConfig(block_n=128, num_warps=8, num_stages=3, block_m=128),
        )
        # All 256 rows of a window of 64 at once: elsewhere registers spill.
        return (
            (*configs, RowConfig(block_n=128, num_warps=8, num_stages=3, block_m=256)) if target == "sm_90" else configs
        )

    def counted_loop(self, case: SnapKVBatch, config: LaunchConfig) -> CountedLoop:
        """Count the score pass; a row block's tile is a share of the tokens' work."""
        blocks = row_blocks(case.window * case.group, config)[1]
        return CountedLoop("newest_score_kernel", "matrix_loop", units=config.block_n / blocks)

    def traffic(self, case: SnapKVBatch) -> Traffic:
        tokens = sum(case.context_lens)
        query_bytes = len(case.context_lens) * case.window * case.num_query_heads * case.head_dim * element_bytes(case)
        return Traffic(
            read_bytes=cache_bytes(case) + query_bytes,
            written_bytes=score_bytes(case),
            flops=2 * case.window * tokens * case.num_query_heads * case.head_dim,
            units=tokens * case.num_kv_heads,
        )


class SnapKVGivenSums(SnapKV):
    """The row sums come from prefill attention, (batch, num_kv_heads, window * group, 1): one pass over K."""

    operation = "score/snapkv/given_lse"

    def make_inputs(self, case: SnapKVBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        rows = case.window * case.group
        lse = torch.full((len(case.context_lens), case.num_kv_heads, rows, 1), -math.inf, device=device)
        for b, query in enumerate(inputs["query"]):
            keys = request_tokens(inputs, "key", b)
            if present := min(case.window, keys.shape[1]):
                sums = causal_logits(query, keys, inputs["scale"]).logsumexp(-1) * math.log2(math.e)
                lse[b, :, rows - present * case.group :, 0] = sums.transpose(1, 2).flatten(1)
        return {**inputs, "lse": lse}

    def allocate(self, case: SnapKVBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        buffers = super().allocate(case, inputs, config)
        return {name: buffers[name] for name in ("scores", "received")}

    def plan(
        self, case: SnapKVBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return self._score_and_pool(case, inputs, buffers, inputs["lse"], config)

    def traffic(self, case: SnapKVBatch) -> Traffic:
        plain = super().traffic(case)
        sums_bytes = 4 * len(case.context_lens) * case.window * case.num_query_heads
        return Traffic(plain.read_bytes + sums_bytes, plain.written_bytes, plain.flops, plain.units)


VARIANTS = (SnapKV(), SnapKVGivenSums())
