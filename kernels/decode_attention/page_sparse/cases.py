"""Shapes and tilings of decode attention over selected pages."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...contract import Traffic
from ...devices import num_multiprocessors
from ...formats.native import Native
from ...launches import Launch, LaunchConfig
from ..batch import RAGGED, DecodeAttention, DecodeBatch, choose_num_splits
from .kernel import plan_page_sparse_split
from .reference import page_sparse_reference


@dataclass(frozen=True)
class PageSparseBatch(DecodeBatch):
    """One decode batch whose KV heads each list `num_selected` pages of every request."""

    num_selected: int = 1

    def selected_tokens(self, context: int) -> int:
        """Tokens that one head attends of a context, where the last page, which may be partly filled, is listed."""
        pages = -(-context // self.block_size)
        unused = pages * self.block_size - context
        return max(0, min(pages, self.num_selected) * self.block_size - unused)


CORRECTNESS_BATCHES = (
    PageSparseBatch("one-token", "float16", 4, 2, 64, 16, (1,), 1, num_selected=1),
    PageSparseBatch("ragged-gqa", "float16", 8, 2, 64, 16, RAGGED, 4, num_selected=5),
    PageSparseBatch("ragged-gqa-bf16", "bfloat16", 8, 2, 64, 16, RAGGED, 4, num_selected=9),
    PageSparseBatch("multi-head", "bfloat16", 3, 3, 32, 16, (165, 64), 2, num_selected=7),
    PageSparseBatch("group-of-17", "float16", 17, 1, 128, 32, (177,), 2, num_selected=3),
    PageSparseBatch("page-larger-than-tile", "float16", 4, 1, 80, 128, (500,), 2, num_selected=3),
    PageSparseBatch("page-no-power-of-two", "float16", 4, 1, 64, 24, (100, 30), 4, num_selected=4),
    PageSparseBatch("all-empty", "float16", 4, 1, 64, 16, (0, 0), 2, num_selected=2),
)

COMPILE_BATCH = PageSparseBatch("llama-3-8b", "bfloat16", 32, 8, 128, 16, (256, 512), 4, num_selected=16)


def _timing_batches() -> tuple[PageSparseBatch, ...]:
    llama = replace(COMPILE_BATCH, num_splits=None)
    return tuple(
        replace(llama, name=f"{batch}x{context}-top{budget}", context_lens=(context,) * batch,
                num_selected=budget // 16, role=role)
        for batch, context, budget, role in (
            (1, 4096, 1024, "small"), (1, 32768, 2048, "small"), (1, 131072, 4096, "small"), (32, 8192, 1024, "fit"),
            (16, 131072, 4096, "held_out"), (64, 8192, 2048, "fit"), (64, 32768, 4096, "fit"), (32, 32768, 8192, "fit"),
        )
    )  # fmt: skip


class PageSparseDecodeAttention(DecodeAttention):
    """Decode attention over selected pages of K and V in the model's dtype.

    Inputs as for every decode attention, and ``selected_pages`` int32 (batch, num_kv_heads, num_selected): logical
    pages in any order, each once, -1 where there is none.
    """

    operation = "decode_attention/page_sparse"
    kv_format = Native()
    split_kernel_name = "decode_attention_page_sparse_kernel"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = _timing_batches()
    compile_case: Any = COMPILE_BATCH

    def make_inputs(self, case: PageSparseBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        generator = torch.Generator().manual_seed(seed + 3)
        selected = torch.full((len(case.context_lens), case.num_kv_heads, case.num_selected), -1, dtype=torch.int32)
        for b, context in enumerate(case.context_lens):
            pages = -(-context // case.block_size)
            for h in range(case.num_kv_heads):
                # The last page is always listed, as its tokens are the newest; the order, and where -1 lies, vary.
                others = torch.randperm(max(0, pages - 1), generator=generator)[: case.num_selected - 1]
                chosen = torch.cat([others, torch.arange(pages)[-1:]])
                place = torch.randperm(case.num_selected, generator=generator)[: len(chosen)]
                selected[b, h, place] = chosen.int()
        return {**inputs, "selected_pages": selected.to(device)}

    def reference(self, case: PageSparseBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        keys, values = self.kv_format.decode(inputs["fields"], case.head_dim)
        tables = (inputs["block_table"], inputs["context_lens"], inputs["selected_pages"])
        return {"output": page_sparse_reference(inputs["query"], keys, values, *tables, inputs["scale"])}

    def allocate(
        self, case: PageSparseBatch, inputs: Mapping[str, Any], config: LaunchConfig
    ) -> dict[str, torch.Tensor]:
        splits = case.num_splits or choose_num_splits(
            len(case.context_lens), case.num_kv_heads, case.num_selected * case.block_size,
            num_multiprocessors(inputs["query"]), config.block_n,
        )  # fmt: skip
        return super().allocate(replace(case, num_splits=splits), inputs, config)

    def plan_split(
        self, case: PageSparseBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor],
        config: LaunchConfig,
    ) -> Launch:  # fmt: skip
        return plan_page_sparse_split(case, inputs, buffers, config)

    def configs(self, target: str, case: PageSparseBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        block_n = 64 if case.head_dim <= 128 else 32
        # Two tiles each of K and V must fit the 99 KiB of shared memory of sm_120.
        configs = (LaunchConfig(block_n, num_warps=4, num_stages=3),)
        return configs if target == "sm_120" else (*configs, LaunchConfig(block_n, num_warps=4, num_stages=4))

    def traffic(self, case: PageSparseBatch) -> Traffic:
        tokens = sum(map(case.selected_tokens, case.context_lens))
        row_bytes = case.head_dim * getattr(torch, case.dtype).itemsize
        rows = len(case.context_lens) * case.num_query_heads
        listed = len(case.context_lens) * case.num_kv_heads * case.num_selected
        return Traffic(
            read_bytes=2 * tokens * case.num_kv_heads * row_bytes + rows * row_bytes + 2 * 4 * listed,
            written_bytes=rows * row_bytes,
            flops=4 * case.num_query_heads * tokens * case.head_dim,
            units=tokens * case.num_kv_heads,
        )


VARIANTS = (PageSparseDecodeAttention(),)
