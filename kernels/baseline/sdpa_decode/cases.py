"""The shapes of decode attention that have one context length."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...decode_attention.batch import COMPILE_BATCH, TIMING_BATCHES, DecodeBatch
from ...decode_attention.reference import attend
from ...launches import HostCall, LaunchConfig


class SdpaDecode(Variant):
    """``scaled_dot_product_attention`` with ``enable_gqa``, whichever backend torch picks.

    Inputs: ``query`` (batch, num_query_heads, 1, head_dim), ``key`` and ``value`` (batch, num_kv_heads, context,
    head_dim), contiguous. Result: ``output``, shaped as the query.
    """

    operation = "baseline/sdpa_decode"
    cost_unit = "token_kv_head"
    correctness_cases = (
        DecodeBatch("gqa", "bfloat16", 8, 2, 64, 16, (33, 33)),
        DecodeBatch("multi-head", "float16", 3, 3, 32, 16, (65,)),
        DecodeBatch("multi-query", "float16", 7, 1, 128, 16, (77, 77, 77)),
    )
    timing_cases = tuple(case for case in TIMING_BATCHES if len(set(case.context_lens)) == 1)
    compile_case = replace(COMPILE_BATCH, context_lens=(128, 128))

    def make_inputs(self, case: DecodeBatch, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        batch, dtype = len(case.context_lens), getattr(torch, case.dtype)

        def draw(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn((batch, heads, tokens, case.head_dim), generator=generator, device=device, dtype=dtype)

        context = case.context_lens[0]
        return {
            "query": draw(case.num_query_heads, 1),
            "key": draw(case.num_kv_heads, context),
            "value": draw(case.num_kv_heads, context),
        }

    def reference(self, case: DecodeBatch, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        query, key, value = inputs["query"][:, :, 0], inputs["key"].transpose(1, 2), inputs["value"].transpose(1, 2)
        rows = [attend(query[b], key[b], value[b], case.head_dim**-0.5) for b in range(len(query))]
        return {"output": torch.stack(rows)[:, :, None]}

    def allocate(self, case: DecodeBatch, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"output": torch.empty_like(inputs["query"])}

    def plan(
        self, case: DecodeBatch, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[HostCall, ...]:  # type: ignore[override]
        if len(set(case.context_lens)) != 1:
            raise ValueError("every request must have the same context")
        query, key, value, output = inputs["query"], inputs["key"], inputs["value"], buffers["output"]

        def attend_all() -> None:
            # It has no `out`: the copy of one token's output is small beside reading the cache.
            output.copy_(torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True))

        return (HostCall("torch_sdpa", attend_all),)

    def configs(self, target: str, case: DecodeBatch) -> tuple[LaunchConfig, ...]:
        # The library chooses its own tiles.
        return (LaunchConfig(block_n=1, num_warps=1, num_stages=1),)

    def counted_loop(self, case: DecodeBatch, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("no kernel of ours", "whole", units=1)

    def traffic(self, case: DecodeBatch) -> Traffic:
        tokens, rows = sum(case.context_lens), len(case.context_lens) * case.num_query_heads
        element_bytes = getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=case.native_kv_bytes + rows * case.head_dim * element_bytes,
            written_bytes=rows * case.head_dim * element_bytes,
            flops=4 * case.num_query_heads * tokens * case.head_dim,
            units=tokens * case.num_kv_heads,
        )


VARIANTS = (SdpaDecode(),)
