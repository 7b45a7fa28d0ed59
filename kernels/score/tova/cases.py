"""Shapes and tilings of TOVA's score."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch
from ...launches import Launch, LaunchConfig
from ..batch import PagedScore, cache_bytes, draw, element_bytes, split_count
from ..newest import plan_newest_scores
from ..newest_inputs import draw_lse
from .kernel import plan_tova_average
from .reference import tova_scores


class Tova(PagedScore):
    """One pass over K with the sums that decode attention left, then the mean over heads."""

    operation = "score/tova"
    uses_matrix_units = True

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        shape = (len(case.context_lens), 1, case.num_query_heads, case.head_dim)
        return {
            **super().make_inputs(case, seed=seed, device=device),
            "query": draw(shape, dtype=case.dtype, seed=seed + 2, device=device),
            "lse": draw_lse(case, seed=seed + 3, device=device),
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"scores": tova_scores(inputs, max(case.context_lens))}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        batch, num_tokens, device = len(case.context_lens), max(case.context_lens), inputs["query"].device
        return {
            "scores": torch.empty(batch, 1, num_tokens, device=device),
            "received": torch.empty(batch, case.num_kv_heads, 1, num_tokens, device=device),
        }

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        num_splits = split_count(case, inputs, config, rows=len(case.context_lens) * case.num_kv_heads)
        received = buffers["received"]
        return (
            plan_newest_scores(
                case, inputs, 1, inputs["lse"], received, config, num_splits=num_splits, unscored=1, accumulate=False
            ),
            plan_tova_average(received, inputs["context_lens"], buffers["scores"], case.num_query_heads),
        )

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("newest_score_kernel", "matrix_loop", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        rows = len(case.context_lens) * case.num_query_heads
        tokens = sum(case.context_lens)
        return Traffic(
            read_bytes=cache_bytes(case) + rows * (case.head_dim * element_bytes(case) + 4),
            written_bytes=4 * len(case.context_lens) * max(case.context_lens),
            flops=2 * tokens * case.num_query_heads * case.head_dim,
            units=tokens * case.num_kv_heads,
        )


VARIANTS = (Tova(),)
