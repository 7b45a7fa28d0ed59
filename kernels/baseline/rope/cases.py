"""Shapes of rotary position embedding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import plan_rope
from .reference import cos_sin_table, rope_reference


@dataclass(frozen=True)
class RopeCase:
    """Rows of queries or keys at random positions."""

    name: str
    dtype: str
    num_tokens: int
    num_heads: int
    head_dim: int
    max_positions: int = 512


class Rope(Variant):
    """Rotary embedding of queries or keys; one cost unit is one element."""

    operation = "baseline/rope"
    cost_unit = "element"
    correctness_cases = (
        RopeCase("one-token", "float16", 1, 1, 2),
        RopeCase("odd-tokens", "bfloat16", 37, 3, 64),
        RopeCase("head-dim-80", "float32", 9, 2, 80),
        RopeCase("head-dim-256", "float16", 5, 1, 256),
    )
    timing_cases = tuple(
        RopeCase(f"{tokens}x40x128", "bfloat16", tokens, 40, 128, 131072) for tokens in (1, 16, 128, 2048, 16384)
    )
    compile_case = RopeCase("llama-3-8b", "bfloat16", 64, 40, 128)

    def make_inputs(self, case: RopeCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        x = torch.randn(case.num_tokens, case.num_heads, case.head_dim, generator=generator, device=device)
        positions = torch.randint(0, case.max_positions, (case.num_tokens,), generator=generator, device=device)
        cos_sin = cos_sin_table(case.max_positions, case.head_dim, device=device)
        return {"x": x.to(getattr(torch, case.dtype)), "positions": positions, "cos_sin": cos_sin}

    def reference(self, case: RopeCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"output": rope_reference(inputs["x"], inputs["positions"], inputs["cos_sin"])}

    def allocate(self, case: RopeCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"output": torch.empty_like(inputs["x"])}

    def plan(
        self, case: RopeCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_rope(inputs, buffers, config),)

    def configs(self, target: str, case: RopeCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=16, num_warps=4, num_stages=1),)

    def counted_loop(self, case: RopeCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("rope_kernel", "whole", units=config.block_n * case.head_dim)

    def traffic(self, case: RopeCase) -> Traffic:
        elements = case.num_tokens * case.num_heads * case.head_dim
        element_bytes = getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=elements * element_bytes + case.num_tokens * (8 + 4 * case.head_dim),
            written_bytes=elements * element_bytes,
            flops=3 * elements,
            units=elements,
        )


VARIANTS = (Rope(),)
