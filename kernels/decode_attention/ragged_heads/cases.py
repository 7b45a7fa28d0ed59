"""Shapes and tilings of decode attention over heads of unequal length."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...contract import Traffic
from ...devices import num_multiprocessors
from ...formats.base import KvFormat
from ...formats.native import Native
from ...launches import Launch, LaunchConfig
from ..batch import DecodeAttention, fill_pages
from .batch import RaggedHeadsBatch, WeightedNative, choose_split, make_head_block_table
from .kernel import plan_ragged_heads_split
from .reference import ragged_heads_reference

CORRECTNESS_BATCHES = (
    RaggedHeadsBatch("one-token", "float16", 4, 2, 64, 16, (), 1, head_lens=((1, 1),)),
    RaggedHeadsBatch("very-unequal", "float16", 8, 2, 64, 16, (), 4, head_lens=((300, 1), (0, 17), (16, 64))),
    RaggedHeadsBatch("very-unequal-bf16", "bfloat16", 8, 2, 64, 16, (), 4, head_lens=((5, 260), (129, 0))),
    RaggedHeadsBatch("multi-head", "bfloat16", 3, 3, 32, 16, (), 2, head_lens=((65, 0, 13), (64, 63, 1))),
    RaggedHeadsBatch("group-of-17", "float16", 17, 1, 128, 32, (), 2, head_lens=((77,), (3,))),
    RaggedHeadsBatch("head-dim-80", "float16", 6, 2, 80, 16, (), 8, head_lens=((97, 33),)),
    RaggedHeadsBatch("all-empty", "float16", 4, 2, 64, 16, (), 2, head_lens=((0, 0),)),
)


def _unequal(num_kv_heads: int, mean_tokens: int) -> tuple[int, ...]:
    """Divide a budget between heads in the ratio 2 : 1 : ... : 1/8, as an allocation across heads may leave it."""
    shares = [2.0 ** -(h % 5) for h in range(num_kv_heads)]
    return tuple(max(1, round(mean_tokens * num_kv_heads * share / sum(shares))) for share in shares)


COMPILE_BATCH = RaggedHeadsBatch("llama-3-8b", "bfloat16", 32, 8, 128, 16, (), 8, head_lens=(_unequal(8, 128),) * 2)


def _timing_batches() -> tuple[RaggedHeadsBatch, ...]:
    llama = replace(COMPILE_BATCH, num_splits=None)
    return tuple(
        replace(llama, name=f"{batch}x{mean_tokens}-{kind}", head_lens=(lens,) * batch, role=role)
        for batch, mean_tokens, role in (
            (1, 1024, "small"), (1, 8192, "small"), (32, 2048, "fit"), (8, 16384, "held_out"), (128, 1024, "fit"),
            (16, 32768, "fit"), (64, 8192, "fit"),
        )
        for kind, lens in (("equal", (mean_tokens,) * 8), ("unequal", _unequal(8, mean_tokens)))
    )  # fmt: skip


class RaggedHeadsDecodeAttention(DecodeAttention):
    """Decode attention over pages of one head each.

    Inputs as for every decode attention, but ``block_table`` is (batch, num_kv_heads, max_blocks) and
    ``context_lens`` (batch, num_kv_heads); the pool is laid out for one KV head.
    """

    operation = "decode_attention/ragged_heads"
    kv_format: KvFormat = Native()
    split_kernel_name = "decode_attention_ragged_heads_kernel"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = _timing_batches()
    compile_case: Any = COMPILE_BATCH

    def make_inputs(self, case: RaggedHeadsBatch, *, seed: int, device: str) -> dict[str, Any]:
        block_table, head_lens, unowned = make_head_block_table(case, seed, device)
        flat = tuple((tokens,) for lens in case.head_lens for tokens in lens)
        one_head = replace(case, num_kv_heads=1, num_query_heads=case.group, head_lens=flat)
        pages = fill_pages(self.kv_format, one_head, block_table.flatten(0, 1), unowned, seed=seed)
        fields = self._layout(case).views(pages)
        generator = torch.Generator(device=device).manual_seed(seed + 2)
        if "log_weight" in fields:
            weight = torch.randint(1, 300, fields["log_weight"].shape, generator=generator, device=device)
            fields["log_weight"].add_(weight.log())  # rows that hold no token stay NaN
        shape = (len(case.head_lens), case.num_query_heads, case.head_dim)
        query = torch.randn(shape, generator=generator, device=device).to(getattr(torch, case.dtype))
        return {
            "query": query,
            "pages": pages,
            "fields": fields,
            "block_table": block_table,
            "context_lens": head_lens,
            "scale": case.head_dim**-0.5,
        }

    def reference(self, case: RaggedHeadsBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        keys, values = self.kv_format.decode(inputs["fields"], case.head_dim)
        shared = (inputs["block_table"], inputs["context_lens"], inputs["scale"], inputs["fields"].get("log_weight"))
        return {"output": ragged_heads_reference(inputs["query"], keys, values, *shared)}

    def allocate(
        self, case: RaggedHeadsBatch, inputs: Mapping[str, Any], config: LaunchConfig
    ) -> dict[str, torch.Tensor]:
        splits = case.num_splits or choose_split(case, num_multiprocessors(inputs["query"]), config.block_n)
        return super().allocate(replace(case, num_splits=splits), inputs, config)

    def plan_split(
        self, case: RaggedHeadsBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor],
        config: LaunchConfig,
    ) -> Launch:  # fmt: skip
        return plan_ragged_heads_split(case, inputs, buffers, config)

    def configs(self, target: str, case: RaggedHeadsBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        block_n = 64 if case.head_dim <= 128 else 32
        # Two tiles each of K and V must fit the 99 KiB of shared memory of sm_120.
        configs = (LaunchConfig(block_n, num_warps=4, num_stages=3),)
        return configs if target == "sm_120" else (*configs, LaunchConfig(block_n, num_warps=4, num_stages=4))

    def traffic(self, case: RaggedHeadsBatch) -> Traffic:
        rows = len(case.head_lens) * case.num_query_heads
        row_bytes = case.head_dim * getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=case.num_kept * self._layout(case).page_bytes // case.block_size + rows * row_bytes,
            written_bytes=rows * row_bytes,
            flops=4 * case.group * case.num_kept * case.head_dim,
            units=case.num_kept,
        )

    def _layout(self, case: RaggedHeadsBatch) -> Any:
        return self.kv_format.layout(
            num_kv_heads=1, head_dim=case.head_dim, block_size=case.block_size, dtype=getattr(torch, case.dtype)
        )


class WeightedRaggedHeadsDecodeAttention(RaggedHeadsDecodeAttention):
    """The same, with the logarithm of each entry's weight added to its score."""

    kv_format = WeightedNative()


VARIANTS = (RaggedHeadsDecodeAttention(), WeightedRaggedHeadsDecodeAttention())
