"""Shapes and tilings of top-k."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...devices import num_multiprocessors
from ...launches import Launch, LaunchConfig
from .kernel import MAX_PARTS, NUM_BINS, NUM_DIGITS, plan_top_k
from .reference import top_k_reference

PROGRAMS_PER_MULTIPROCESSOR = 4


@dataclass(frozen=True)
class TopKRows:
    """Rows of scores, one per (request, KV head).

    Attributes
    ----------
    dtype : str
        Of the scores.
    row_lens, budgets : tuple of int
        Scores of each row, and how many of them to keep.
    num_levels : int or None
        Distinct scores, None: as they are drawn. Few levels make many ties.
    num_parts : int or None
        Programs per row; None: as many as fill the GPU.
    """

    name: str
    dtype: str
    row_lens: tuple[int, ...]
    budgets: tuple[int, ...]
    num_levels: int | None = None
    num_parts: int | None = None


def _timing_cases() -> tuple[TopKRows, ...]:
    shapes = [(8, context, 2048) for context in (4096, 16384, 32768, 131072)]
    shapes += [(256, context, context // 4) for context in (4096, 32768, 131072)]
    return tuple(
        TopKRows(f"{rows}x{context}-top{budget}", "float32", (context,) * rows, (budget,) * rows)
        for rows, context, budget in shapes
    )


class TopK(Variant):
    """Positions of the largest scores of each row.

    Inputs: ``scores`` (num_rows, num_columns), ``row_lens`` and ``budgets`` int32 (num_rows,). Results: ``indices``
    int32 (num_rows, max(budgets)), ascending, filled up with -1, and ``kept_lens`` int32 (num_rows,).
    """

    operation = "select/top_k"
    cost_unit = "token_kv_head"
    correctness_cases = (
        TopKRows("one-score", "float32", (1,), (1,), num_parts=1),
        TopKRows("ragged", "float32", (700, 1, 0, 513), (100, 3, 2, 513), num_parts=3),
        TopKRows("ties", "float32", (600, 512), (150, 300), num_levels=5, num_parts=2),
        TopKRows("ties-bf16", "bfloat16", (513, 70), (1, 33), num_levels=9, num_parts=2),
        TopKRows("fp16", "float16", (300, 90), (77, 30), num_parts=1),
        TopKRows("nothing-wanted", "float32", (40, 30), (0, 1), num_parts=2),
    )
    timing_cases = _timing_cases()
    compile_case = TopKRows("32k", "float32", (32768,) * 2, (2048,) * 2, num_parts=8)

    def make_inputs(self, case: TopKRows, *, seed: int, device: str) -> dict[str, Any]:
        """Draw scores of both signs, some of them -inf; columns beyond a row's length are NaN."""
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = (len(case.row_lens), max(case.row_lens))
        if case.num_levels:
            scores = torch.randint(0, case.num_levels, shape, generator=generator, device=device).float()
            scores = scores - case.num_levels // 2
            negative_zero = torch.rand(shape, generator=generator, device=device) < 0.5
            scores[(scores == 0) & negative_zero] = -0.0
        else:
            scores = torch.randn(shape, generator=generator, device=device)
        scores[torch.rand(shape, generator=generator, device=device) < 0.05] = float("-inf")
        row_lens = torch.tensor(case.row_lens, dtype=torch.int32, device=device)
        scores[torch.arange(shape[1], device=device) >= row_lens[:, None]] = float("nan")
        return {
            "scores": scores.to(getattr(torch, case.dtype)),
            "row_lens": row_lens,
            "budgets": torch.tensor(case.budgets, dtype=torch.int32, device=device),
        }

    def reference(self, case: TopKRows, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        indices, kept_lens = top_k_reference(inputs["scores"], inputs["row_lens"], inputs["budgets"])
        return {"indices": indices, "kept_lens": kept_lens}

    def allocate(self, case: TopKRows, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        scores = inputs["scores"]
        num_rows, num_columns = scores.shape
        wanted = math.ceil(PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(scores) / num_rows)
        num_parts = case.num_parts or max(1, min(wanted, math.ceil(num_columns / config.block_n), MAX_PARTS))
        num_digits = NUM_DIGITS[scores.dtype]

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32, device=scores.device)

        return {
            "indices": empty(num_rows, max(case.budgets)),
            "kept_lens": empty(num_rows),
            "histograms": empty(num_digits, num_rows, num_parts, NUM_BINS.value),
            "prefixes": empty(num_digits, num_rows),
            "remaining": empty(num_digits, num_rows),
            "above": empty(num_digits, num_rows, num_parts),
        }

    def plan(
        self, case: TopKRows, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_top_k(inputs, buffers, config)

    def configs(self, target: str, case: TopKRows) -> tuple[LaunchConfig, ...]:
        block = 256 if max(case.row_lens) < 4096 else 1024
        return (LaunchConfig(block, num_warps=4, num_stages=2), LaunchConfig(2 * block, num_warps=8, num_stages=2))

    def counted_loop(self, case: TopKRows, config: LaunchConfig) -> CountedLoop:
        """Count the loop over scores of one digit's histogram; every score passes it once per digit."""
        num_digits = NUM_DIGITS[getattr(torch, case.dtype)]
        return CountedLoop("top_k_histogram_kernel", "largest_loop", units=config.block_n / num_digits)

    def traffic(self, case: TopKRows) -> Traffic:
        scores, rows = sum(case.row_lens), len(case.row_lens)
        return Traffic(
            read_bytes=scores * getattr(torch, case.dtype).itemsize + 8 * rows,
            written_bytes=4 * rows * (max(case.budgets) + 1),
            flops=0,
            units=scores,
        )

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: TopKRows) -> str:
        """Positions are integers: compared exactly."""
        return "float32"


VARIANTS = (TopK(),)
