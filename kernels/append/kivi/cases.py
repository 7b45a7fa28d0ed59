"""Shapes and tilings of appending K and V to KIVI-4 and KIVI-2."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...formats.kivi import GROUP, Kivi
from ...launches import Launch, LaunchConfig
from .batch import (
    COMPILE_BATCH,
    CORRECTNESS_BATCHES,
    TIMING_BATCHES,
    ResidualAppendBatch,
    append_reference,
    layout_of,
    make_append_inputs,
)
from .kernel import plan_append_kivi


class KiviAppend(Variant):
    """Append to the residual; quantise the groups that leave it.

    Inputs: see `make_append_inputs`. Results: the pool's fields by name, ``residual_key`` and ``residual_value``.
    """

    operation = "append"
    cost_unit = "token_kv_head"
    correctness_cases: tuple[Any, ...] = CORRECTNESS_BATCHES
    timing_cases: tuple[Any, ...] = TIMING_BATCHES
    compile_case: Any = COMPILE_BATCH

    def __init__(self, kv_format: Kivi) -> None:
        self.kv_format: Kivi = kv_format

    def make_inputs(self, case: ResidualAppendBatch, *, seed: int, device: str) -> dict[str, Any]:
        return make_append_inputs(self.kv_format, case, seed=seed, device=device)

    def reference(self, case: ResidualAppendBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return append_reference(self.kv_format, case, inputs)

    def allocate(
        self, case: ResidualAppendBatch, inputs: Mapping[str, Any], config: LaunchConfig
    ) -> dict[str, torch.Tensor]:
        pages = inputs["pages"].clone()
        rings = {name: inputs[name].clone() for name in ("residual_key", "residual_value")}
        return {"pages": pages, **layout_of(self.kv_format, case).views(pages), **rings}

    def plan(
        self,
        case: ResidualAppendBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LaunchConfig,
    ) -> tuple[Launch, ...]:
        return (plan_append_kivi(self.kv_format, case, inputs, buffers, config),)

    def configs(self, target: str, case: ResidualAppendBatch) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=GROUP, num_warps=4, num_stages=1), LaunchConfig(GROUP, num_warps=2, num_stages=1))

    def counted_loop(self, case: ResidualAppendBatch, config: LaunchConfig) -> CountedLoop:
        """Count a program that quantises a group and stores another: 32 tokens each."""
        return CountedLoop("append_kivi_kernel", "whole", units=GROUP)

    def comparison(self, result: str) -> Comparison:
        """Every step is rounded as IEEE 754 says, so all bytes are the reference's."""
        return "exact"

    def compute_dtype(self, case: ResidualAppendBatch) -> str:
        return "float32"

    def traffic(self, case: ResidualAppendBatch) -> Traffic:
        element_bytes = getattr(torch, case.dtype).itemsize
        native_token_bytes = 2 * case.num_kv_heads * case.head_dim * element_bytes
        changes = case.packed_before_and_after(self.kv_format)
        packed = sum(after - before for before, after in changes)
        # A new token is read once; of the packed ones, those that were cached before are read from the ring.
        from_ring = sum(
            max(0, min(after, cached) - before)
            for (before, after), cached in zip(changes, case.context_lens, strict=True)
        )
        stored = sum(
            cached + new - max(cached, after)
            for (_, after), cached, new in zip(changes, case.context_lens, case.new_tokens, strict=True)
        )
        return Traffic(
            read_bytes=(case.num_tokens + from_ring) * native_token_bytes,
            written_bytes=packed * layout_of(self.kv_format, case).page_bytes // case.block_size
            + stored * native_token_bytes,
            flops=0,
            units=case.num_tokens * case.num_kv_heads,
        )


VARIANTS = (KiviAppend(Kivi(4)), KiviAppend(Kivi(2)))
