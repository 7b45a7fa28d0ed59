"""Shapes and tilings of decode attention over low-rank coordinates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...devices import num_multiprocessors
from ...formats.low_rank import LowRank
from ...launches import Launch
from ...low_rank_projection.batch import tiling
from ...low_rank_projection.kernel import plan_expand
from ..batch import DecodeAttention, DecodeBatch, choose_num_splits
from ..combine import plan_combine
from .as_shipped import plan_as_shipped
from .batch import LowRankConfig
from .kernel import plan_low_rank_split
from .reference import low_rank_attention_reference
from .rope import rope_table

LARGEST_TILE = 128


class LowRankDecodeAttention(DecodeAttention):
    """Rebuild K, sum coordinates of V, combine the splits, and expand each query head's sum.

    Inputs are those of `DecodeAttention` (``query`` with RoPE, stored keys without), and ``key_basis`` and
    ``value_basis`` (num_groups, rank, heads * head_dim), and ``rope_table`` fp32 (positions, head_dim).
    """

    kv_format: LowRank = LowRank()
    split_kernel_name = "decode_attention_low_rank_kernel"
    correctness_cases = (
        DecodeBatch("one-token", "float16", 16, 4, 32, 16, (1,), 1),
        DecodeBatch("ragged-two-groups-bf16", "bfloat16", 8, 8, 32, 16, (1, 16, 17, 0, 130), 2),
        DecodeBatch("llama-heads", "float16", 16, 4, 128, 16, (150,), 2),
        DecodeBatch("multi-head-group-of-1", "bfloat16", 1, 1, 64, 32, (77,), 4),
        DecodeBatch("odd-rank-head-dim-80", "float16", 10, 2, 80, 48, (97, 33), 2),
        DecodeBatch("all-empty", "float16", 4, 4, 64, 16, (0, 0), 2),
    )

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        dtype = inputs["query"].dtype
        shape = (case.num_kv_heads, case.head_dim)
        return inputs | {
            "key_basis": self.kv_format.key_basis(*shape).to(device, dtype),
            "value_basis": self.kv_format.value_basis(*shape).to(device, dtype),
            "rope_table": rope_table(max(LARGEST_TILE, *case.context_lens), case.head_dim, device),
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        keys, values = self.kv_format.decode(inputs["fields"], case.head_dim)
        shared = (inputs["rope_table"], inputs["block_table"], inputs["context_lens"], inputs["scale"])
        return {"output": low_rank_attention_reference(inputs["query"], keys, values, *shared)}

    def value_dim(self, case: DecodeBatch) -> int:
        return self.kv_format.rank(case.num_kv_heads, case.head_dim)

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LowRankConfig) -> dict[str, torch.Tensor]:
        query, rank = inputs["query"], self.value_dim(case)
        batch, num_query_heads, head_dim = query.shape
        programs = case.num_kv_heads // (config.heads or self.kv_format.heads(case.num_kv_heads))
        num_splits = case.num_splits or choose_num_splits(
            batch, programs, max(case.context_lens), num_multiprocessors(query), config.block_n
        )
        return {
            "output": query.new_empty(batch, num_query_heads, head_dim),
            "coordinates": query.new_empty(batch, num_query_heads, rank),
            "partial": query.new_empty((batch, num_query_heads, num_splits, rank), dtype=torch.float32),
            "lse": query.new_empty((batch, num_query_heads, num_splits), dtype=torch.float32),
        }

    def plan(
        self,
        case: DecodeBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LowRankConfig,
    ) -> tuple[Launch, ...]:
        return (
            plan_low_rank_split(case, inputs, buffers, config, self.kv_format),
            plan_combine(buffers["partial"], buffers["lse"], buffers["coordinates"]),
            self.plan_expand(case, inputs, buffers),
        )

    def plan_expand(self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor]) -> Launch:
        """Lay out the product of each query head's coordinates with the basis of V."""
        coordinates = buffers["coordinates"]
        config = tiling("", len(coordinates) * case.group)
        return plan_expand(coordinates, inputs["value_basis"], buffers["output"], config, case.num_kv_heads)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LowRankConfig, ...]:
        if target.startswith("gfx"):
            return (LowRankConfig(64, num_warps=8, num_stages=2, block_k=32),)
        if target in {"sm_90", "sm_100"}:
            return tuple(LowRankConfig(64, num_warps=8, num_stages=3, heads=heads) for heads in (None, 1))
        return (LowRankConfig(32, num_warps=4, num_stages=2 if target == "sm_120" else 3, block_k=32),)

    def counted_loop(self, case: DecodeBatch, config: LowRankConfig) -> CountedLoop:
        # One pass rebuilds a tile of one head by some coordinates; rotation, scores and values are not in it.
        share = config.block_k / self.value_dim(case)
        return CountedLoop(self.split_kernel_name, "matrix_loop", units=config.block_n * share)

    def traffic(self, case: DecodeBatch) -> Traffic:
        stored = super().traffic(case)
        rank, tokens = self.value_dim(case), sum(case.context_lens)
        num_groups = case.num_kv_heads // self.kv_format.heads(case.num_kv_heads)
        element_bytes = getattr(torch, case.dtype).itemsize
        width = case.num_kv_heads // num_groups * case.head_dim
        rows = len(case.context_lens) * case.num_query_heads
        return Traffic(
            read_bytes=stored.read_bytes + 2 * num_groups * rank * width * element_bytes,
            written_bytes=rows * case.head_dim * element_bytes,
            flops=2
            * tokens
            * (rank * case.num_kv_heads * case.head_dim + case.num_query_heads * (case.head_dim + rank))
            + 2 * rows * rank * case.head_dim,
            units=stored.units,
        )


class LowRankAsShipped(LowRankDecodeAttention):
    """As Palu ships it: a program per query head, scores through memory, no split of the context for the values."""

    form = "as_shipped"
    split_kernel_name = "palu_scores_kernel"
    correctness_cases = (
        DecodeBatch("one-token", "float16", 16, 4, 32, 16, (1,), 1),
        DecodeBatch("ragged-gqa-bf16", "bfloat16", 8, 4, 32, 16, (17, 0, 70), 1),
        DecodeBatch("odd-rank-head-dim-96", "float16", 3, 1, 96, 48, (97,), 1),
        DecodeBatch("all-empty", "float16", 4, 4, 64, 16, (0, 0), 1),
    )

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LowRankConfig) -> dict[str, torch.Tensor]:
        query = inputs["query"]
        shape = (*query.shape[:2], max(1, *case.context_lens))
        one_split = replace(case, num_splits=1)
        scores = query.new_empty(shape, dtype=torch.float32)
        return super().allocate(one_split, inputs, config) | {"scores": scores}

    def plan(
        self,
        case: DecodeBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LowRankConfig,
    ) -> tuple[Launch, ...]:
        return (
            *plan_as_shipped(case, inputs, buffers, config, self.kv_format),
            self.plan_expand(case, inputs, buffers),
        )

    def configs(self, target: str, case: DecodeBatch) -> tuple[LowRankConfig, ...]:
        return (LowRankConfig(64, num_warps=4, num_stages=1, block_k=32),)

    def counted_loop(self, case: DecodeBatch, config: LowRankConfig) -> CountedLoop:
        # A KV head is rebuilt by as many programs as it has query heads.
        share = config.block_k / self.value_dim(case) / case.group
        return CountedLoop(self.split_kernel_name, "matrix_loop", units=config.block_n * share)


VARIANTS = (LowRankDecodeAttention(), LowRankAsShipped())
