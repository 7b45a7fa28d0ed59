"""Shapes and tilings of compaction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...formats.pages import Field, PageLayout
from ...launches import Launch, LaunchConfig
from .kernel import plan_compaction
from .reference import compact_reference


@dataclass(frozen=True)
class CompactionBatch:
    """Requests whose KV heads keep some of their tokens.

    Attributes
    ----------
    row_bytes : tuple of int
        Bytes of each field per token and head: (256, 256) is K and V in bf16 at head_dim 128.
    kept_lens : tuple of tuple of int
        Tokens kept of each request by each KV head; in the form ``layer`` one number per request.
    context_lens : tuple of int
        Tokens before.
    form : {'heads', 'layer'}
        ``heads``: each head keeps its own tokens, in new pages of its own. ``layer``: all heads keep the same.
    """

    name: str
    row_bytes: tuple[int, ...]
    num_kv_heads: int
    block_size: int
    context_lens: tuple[int, ...]
    kept_lens: tuple[tuple[int, ...], ...]
    form: Literal["heads", "layer"] = "heads"

    @property
    def num_kept(self) -> int:
        """Tokens kept, summed over requests and heads."""
        return sum(map(sum, self.kept_lens)) * (self.num_kv_heads if self.form == "layer" else 1)

    def layout(self, num_kv_heads: int) -> PageLayout:
        """Give the fields of a block, as bytes."""
        shape = (self.block_size, num_kv_heads)
        return PageLayout(
            tuple(Field(f"field_{i}", torch.uint8, (*shape, count)) for i, count in enumerate(self.row_bytes))
        )


def _unequal(num_kv_heads: int, mean_tokens: int) -> tuple[int, ...]:
    """Keep from half to one and a half times the mean."""
    return tuple(round(mean_tokens * (0.5 + h / (num_kv_heads - 1))) for h in range(num_kv_heads))


def _timing_cases() -> tuple[CompactionBatch, ...]:
    native, int4 = (256, 256), (64, 64, 4, 4)
    return (
        CompactionBatch("1x4096-keep-1024", native, 8, 16, (4096,), (_unequal(8, 1024),)),
        CompactionBatch("1x32768-keep-2048", native, 8, 16, (32768,), (_unequal(8, 2048),)),
        CompactionBatch("1x32768-keep-8192-layer", native, 8, 16, (32768,), ((8192,),), "layer"),
        CompactionBatch("1x32768-keep-8192", native, 8, 16, (32768,), (_unequal(8, 8192),)),
        CompactionBatch("1x131072-keep-32768-int4", int4, 8, 16, (131072,), (_unequal(8, 32768),)),
        CompactionBatch("1x131072-keep-32768", native, 8, 16, (131072,), (_unequal(8, 32768),)),
        CompactionBatch("8x32768-keep-16384", native, 8, 16, (32768,) * 8, (_unequal(8, 16384),) * 8),
    )


def deal_blocks(counts: torch.Tensor, block_size: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Deal blocks at random to lists of `counts` tokens, (batch, n); give the table and the number of blocks."""
    blocks_of = -(-counts // block_size)
    free = torch.randperm(int(blocks_of.sum()) + 1, generator=generator).tolist()
    table = torch.full((*counts.shape, max(1, int(blocks_of.max()))), free.pop(), dtype=torch.int32)
    for b, n in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        count = int(blocks_of[b, n])
        table[b, n, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return table, int(blocks_of.sum()) + 1


class Compaction(Variant):
    """Copy kept rows into new pages.

    Inputs: ``old_pages`` and ``new_pages`` uint8 pools, ``tables`` as for `plan_compaction`. Result: ``pages``, the
    new pool, of which only the rows of kept tokens change.
    """

    operation = "select/compaction"
    cost_unit = "token_kv_head"
    correctness_cases = (
        CompactionBatch("one-token", (128, 128), 2, 16, (1,), ((1, 1),)),
        CompactionBatch("ragged", (128, 128), 3, 16, (70, 33, 5), ((64, 0, 17), (33, 1, 20), (0, 5, 0))),
        CompactionBatch("planar-int4-and-scales", (64, 64, 4, 4), 2, 16, (90,), ((70, 33),)),
        CompactionBatch("odd-bytes", (51, 2, 7), 2, 8, (40, 19), ((13, 40), (0, 19))),
        CompactionBatch("layer", (160, 96), 3, 16, (70, 33), ((40,), (33,)), "layer"),
        CompactionBatch("nothing-kept", (128,), 2, 16, (20,), ((0, 0),)),
    )
    timing_cases = _timing_cases()
    compile_case = CompactionBatch("llama-3-8b", (256, 256), 8, 16, (256,), (_unequal(8, 128),))

    def make_inputs(self, case: CompactionBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        kept_lens = torch.tensor(case.kept_lens, dtype=torch.int32)
        context = torch.tensor(case.context_lens, dtype=torch.int32)[:, None]
        old_table, old_blocks = deal_blocks(context, case.block_size, generator)
        new_table, new_blocks = deal_blocks(kept_lens, case.block_size, generator)
        kept = torch.full((*kept_lens.shape, max(1, int(kept_lens.max()))), -1, dtype=torch.int32)
        for b, n in torch.cartesian_prod(*map(torch.arange, kept_lens.shape)).tolist():
            count = int(kept_lens[b, n])
            chosen = torch.randperm(case.context_lens[b], generator=generator)[:count]
            kept[b, n, :count] = chosen.sort().values.int()
        device_generator = torch.Generator(device=device).manual_seed(seed + 1)

        def pool(num_blocks: int, num_kv_heads: int) -> torch.Tensor:
            pages = case.layout(num_kv_heads).allocate(num_blocks, device)
            return pages.random_(0, 256, generator=device_generator)

        tables = {"kept": kept, "kept_lens": kept_lens, "old_table": old_table, "new_table": new_table}
        return {
            "old_pages": pool(old_blocks, case.num_kv_heads),
            "new_pages": pool(new_blocks, self._new_heads(case)),
            "tables": {name: table.to(device) for name, table in tables.items()},
        }

    def reference(self, case: CompactionBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        pages = inputs["new_pages"].clone()
        compact_reference(*self._views(case, inputs["old_pages"], pages), inputs["tables"], case.num_kv_heads)
        return {"pages": pages}

    def allocate(
        self, case: CompactionBatch, inputs: Mapping[str, Any], config: LaunchConfig
    ) -> dict[str, torch.Tensor]:
        return {"pages": inputs["new_pages"].clone()}

    def plan(
        self, case: CompactionBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor],
        config: LaunchConfig,
    ) -> tuple[Launch, ...]:  # fmt: skip
        old, new = self._views(case, inputs["old_pages"], buffers["pages"])
        return plan_compaction(old, new, inputs["tables"], case.num_kv_heads, config)

    def configs(self, target: str, case: CompactionBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(32, num_warps=4, num_stages=1), LaunchConfig(64, num_warps=4, num_stages=1))

    def counted_loop(self, case: CompactionBatch, config: LaunchConfig) -> CountedLoop:
        """Count whole programs; each copies rows of one field."""
        return CountedLoop("compact_rows_kernel", "whole", units=config.block_n / len(case.row_bytes))

    def traffic(self, case: CompactionBatch) -> Traffic:
        moved = case.num_kept * sum(case.row_bytes)
        indices = 4 * sum(map(sum, case.kept_lens))
        return Traffic(read_bytes=moved + indices, written_bytes=moved, flops=0, units=case.num_kept)

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: CompactionBatch) -> str:
        """Bytes are moved as they are: compared exactly."""
        return "float32"

    def _new_heads(self, case: CompactionBatch) -> int:
        """KV heads that a new page holds tokens of."""
        return 1 if case.form == "heads" else case.num_kv_heads

    def _views(
        self, case: CompactionBatch, old_pages: torch.Tensor, new_pages: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return case.layout(case.num_kv_heads).views(old_pages), case.layout(self._new_heads(case)).views(new_pages)


VARIANTS = (Compaction(),)
