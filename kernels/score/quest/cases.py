"""Shapes and tilings of Quest's page criticality and of the update of page bounds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.batch import DecodeBatch, choose_num_splits, make_block_table
from ...devices import num_multiprocessors
from ...formats.page_bounds import page_bounds, page_bounds_layout
from ...launches import Launch, LaunchConfig
from ..batch import CONTEXTS, RAGGED, PagedScore, draw, element_bytes
from .kernel import plan_quest_bounds, plan_quest_scores
from .reference import quest_scores, updated_bounds, used_rows


def _pages(case: DecodeBatch) -> int:
    return sum(-(-tokens // case.block_size) for tokens in case.context_lens)


class QuestScores(PagedScore):
    """One read of the bounds: 2 * head_dim values per page and KV head instead of head_dim per token.

    Inputs beside the shared ones: ``bounds``, views of a pool of page bounds by name. No key is read.
    """

    operation = "score/quest"
    kv_format = None
    uses_matrix_units = True
    cost_unit = "page_kv_head"

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        block_table, context_lens, _ = make_block_table(case, seed, device)
        dtype = getattr(torch, case.dtype)
        layout = page_bounds_layout(num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, dtype=dtype)
        num_blocks = _pages(case) + 1
        shape = (num_blocks, case.block_size, case.num_kv_heads, case.head_dim)
        keys = draw(shape, dtype=case.dtype, seed=seed + 1, device=device)
        used = used_rows(block_table, case.context_lens, num_blocks, case.block_size)
        pages = layout.allocate(num_blocks, device)
        layout.store(pages, page_bounds(keys, used))
        bounds = layout.views(pages)
        for bound in bounds.values():
            bound[~used.any(1)] = math.nan
        heads = (len(case.context_lens), case.num_query_heads, case.head_dim)
        return {
            "bounds": bounds,
            "block_table": block_table,
            "context_lens": context_lens,
            "scale": case.head_dim**-0.5,
            "query": draw(heads, dtype=case.dtype, seed=seed + 2, device=device),
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        length = -(-max(case.context_lens) // case.block_size)
        return {"scores": quest_scores(inputs, case.block_size, length)}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        pages = -(-max(case.context_lens) // case.block_size)
        shape = (len(case.context_lens), case.num_kv_heads, pages)
        return {"scores": torch.empty(shape, device=inputs["query"].device)}

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        scores = buffers["scores"]
        num_splits = case.num_splits or choose_num_splits(
            *scores.shape, num_multiprocessors(inputs["query"]), config.block_n
        )
        return plan_quest_scores(case, inputs, scores, config, num_splits)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        # A tile of minima and one of maxima per stage; contexts are short in pages, so tiles are too.
        block_n = 32 if case.head_dim <= 128 else 16
        return (LaunchConfig(block_n, num_warps=2, num_stages=3), LaunchConfig(64, num_warps=4, num_stages=3))

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("quest_score_kernel", "matrix_loop", units=config.block_n)

    def traffic(self, case: DecodeBatch) -> Traffic:
        pages, batch = _pages(case), len(case.context_lens)
        longest = -(-max(case.context_lens) // case.block_size)
        return Traffic(
            read_bytes=(2 * pages * case.num_kv_heads + batch * case.num_query_heads)
            * case.head_dim
            * element_bytes(case),
            written_bytes=4 * batch * case.num_kv_heads * longest,
            flops=4 * pages * case.num_query_heads * case.head_dim,
            units=pages * case.num_kv_heads,
        )


@dataclass(frozen=True)
class BoundsBatch(DecodeBatch):
    """Contexts whose newest `new_lens` tokens were just appended; `context_lens` counts them."""

    new_lens: tuple[int, ...] = ()


def _llama(name: str, tokens: int, new: int, batch: int = 1) -> BoundsBatch:
    return BoundsBatch(name, "bfloat16", 32, 8, 128, 16, (tokens,) * batch, new_lens=(new,) * batch)


class QuestBounds(PagedScore):
    """Bounds of the pages that new tokens lie in; the pool's other bounds stay as they are."""

    operation = "score/quest/bounds"
    correctness_cases = (
        BoundsBatch("one-token", "float16", 4, 2, 64, 16, (1,), new_lens=(1,)),
        BoundsBatch("prefill-ragged", "bfloat16", 8, 2, 64, 16, RAGGED, new_lens=RAGGED),
        BoundsBatch("decode-step", "float16", 8, 2, 80, 16, (17, 16, 1, 40), new_lens=(1, 1, 1, 1)),
        BoundsBatch("chunk-from-inside-a-page", "bfloat16", 4, 1, 128, 32, (99, 64), new_lens=(60, 3)),
        BoundsBatch("nothing-new", "float32", 4, 1, 32, 16, (20, 33), new_lens=(0, 2)),
    )
    timing_cases = (
        *(_llama(f"decode-{batch}x{context}", context, 1, batch) for batch, context in ((1, 4096), (64, 4096))),
        *(_llama(f"prefill-{batch}x{context}", context, context, batch) for batch, context in CONTEXTS),
    )
    compile_case = _llama("llama-3-8b", 128, 128)

    def make_inputs(self, case: BoundsBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        keys = inputs["fields"]["key"]
        layout = page_bounds_layout(num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, dtype=keys.dtype)
        pages = layout.allocate(len(keys), device)
        before = [tokens - new for tokens, new in zip(case.context_lens, case.new_lens, strict=True)]
        used = used_rows(inputs["block_table"], before, *keys.shape[:2])
        layout.store(pages, page_bounds(keys, used))
        bounds = layout.views(pages)
        for bound in bounds.values():
            bound[~used.any(1)] = math.nan
        new_lens = torch.tensor(case.new_lens, dtype=torch.int32, device=device)
        return {**inputs, "bounds": bounds, "new_lens": new_lens}

    def reference(self, case: BoundsBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return updated_bounds(inputs)

    def allocate(self, case: BoundsBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {name: bound.clone() for name, bound in inputs["bounds"].items()}

    def plan(
        self, case: BoundsBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        most_new = max(case.new_lens)
        return plan_quest_bounds(case, inputs, buffers["key_min"], buffers["key_max"], config, most_new=most_new)

    def configs(self, target: str, case: BoundsBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=64, num_warps=4, num_stages=1), LaunchConfig(16, num_warps=1, num_stages=1))

    def compute_dtype(self, case: BoundsBatch) -> str:
        return "float32"

    def counted_loop(self, case: BoundsBatch, config: LaunchConfig) -> CountedLoop:
        pages = max(1, config.block_n // case.block_size)
        return CountedLoop("quest_bounds_kernel", "whole", units=pages * case.block_size)

    def traffic(self, case: BoundsBatch) -> Traffic:
        head_bytes = case.num_kv_heads * case.head_dim * element_bytes(case)
        touched = continued = 0
        for tokens, new in zip(case.context_lens, case.new_lens, strict=True):
            if new:
                touched += -(-tokens // case.block_size) - (tokens - new) // case.block_size
                continued += (tokens - new) % case.block_size > 0
        return Traffic(
            read_bytes=(sum(case.new_lens) + 2 * continued) * head_bytes,
            written_bytes=2 * touched * head_bytes,
            flops=2 * sum(case.new_lens) * case.num_kv_heads * case.head_dim,
            units=sum(case.new_lens) * case.num_kv_heads,
        )


VARIANTS = (QuestScores(), QuestBounds())
