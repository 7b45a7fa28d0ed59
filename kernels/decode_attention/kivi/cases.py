"""Shapes and tilings of decode attention over KIVI-4 and KIVI-2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...contract import CountedLoop, Form, Traffic
from ...formats.kivi import GROUP, Kivi, packed_tokens
from ...launches import Launch, LaunchConfig
from ..batch import COMPILE_BATCH, TIMING_BATCHES, DecodeAttention, DecodeBatch
from .as_shipped import plan_kivi_as_shipped
from .inputs import make_kivi_inputs
from .kernel import plan_kivi_split
from .reference import kivi_decode_attention_reference

BLOCK_SIZE = 32
"""Timed with the smallest block that holds a key group."""


class KiviDecodeAttention(DecodeAttention):
    """Words unpacked by masks into fp16 mantissas, dequantised by packed multiply-adds; residual in the same launch."""

    split_kernel_name = "decode_attention_kivi_kernel"
    correctness_cases = (
        DecodeBatch("residual-only", "float16", 2, 2, 64, 32, (1, 128), 1),
        DecodeBatch("ragged-bf16", "bfloat16", 4, 2, 64, 32, (0, 129, 160, 161), 2),
        DecodeBatch("block-of-96", "float16", 3, 1, 128, 96, (289,), 2),
        DecodeBatch("17-heads-block-of-64-bf16", "bfloat16", 17, 1, 64, 64, (260,), 2),
        DecodeBatch("more-splits-than-tiles", "float16", 2, 1, 32, 32, (200,), 8),
        DecodeBatch("head-dim-96", "float16", 2, 2, 96, 32, (170,), 2),
    )
    timing_cases = tuple(replace(case, block_size=BLOCK_SIZE) for case in TIMING_BATCHES)
    compile_case = replace(COMPILE_BATCH, block_size=BLOCK_SIZE, context_lens=(64, 256))

    def __init__(self, kv_format: Kivi) -> None:
        self.kv_format: Kivi = kv_format

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        return make_kivi_inputs(self.kv_format, case, seed=seed, device=device)

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"output": kivi_decode_attention_reference(self.kv_format, inputs)}

    def plan_split(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> Launch:
        return plan_kivi_split(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=2),)
        if case.head_dim > 128:
            return (LaunchConfig(block_n=64, num_warps=4, num_stages=3),)
        large = LaunchConfig(block_n=128, num_warps=4, num_stages=3)
        small = LaunchConfig(block_n=64, num_warps=2, num_stages=3)
        # The large tile leaves room for one program in the 99 KiB of shared memory of sm_120.
        return (small, large) if target == "sm_120" else (large, small)

    def traffic(self, case: DecodeBatch) -> Traffic:
        """Count the residual as it is, between R - 31 and R tokens of a long request."""
        shared = super().traffic(case)
        dtype = getattr(torch, case.dtype)
        layout = self.kv_format.layout(
            num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, block_size=case.block_size, dtype=dtype
        )
        packed = sum(packed_tokens(tokens, self.kv_format.residual_tokens) for tokens in case.context_lens)
        native_token_bytes = 2 * case.num_kv_heads * case.head_dim * dtype.itemsize
        query_bytes = len(case.context_lens) * case.num_query_heads * case.head_dim * dtype.itemsize
        read_bytes = (
            packed * layout.page_bytes // case.block_size
            + (sum(case.context_lens) - packed) * native_token_bytes
            + query_bytes
        )
        return replace(shared, read_bytes=read_bytes)


class KiviAsShippedDecodeAttention(KiviDecodeAttention):
    """Three launches and a round trip of the scores, one program per query head, codes shifted and converted."""

    form: Form = "as_shipped"
    uses_matrix_units = False
    # A program per query head makes many heads slow in the interpreter.
    correctness_cases = tuple(
        case for case in KiviDecodeAttention.correctness_cases if case.num_query_heads * len(case.context_lens) <= 16
    )

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        query = inputs["query"]
        longest = max(1, *case.context_lens)
        return {
            "output": torch.empty_like(query),
            "weight": query.new_empty(*query.shape[:2], longest, dtype=torch.float16),
        }

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return plan_kivi_as_shipped(self.kv_format, case, inputs, buffers, config)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=64, num_warps=4, num_stages=2),)

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        """Count the scores of a key group for one query head: about half of the work on K and V."""
        return CountedLoop("kivi_scores_kernel", "largest_loop", units=GROUP / case.group)


VARIANTS = (
    KiviDecodeAttention(Kivi(4)),
    KiviAsShippedDecodeAttention(Kivi(4, "sequential")),
    KiviDecodeAttention(Kivi(2)),
    KiviAsShippedDecodeAttention(Kivi(2, "sequential")),
)
