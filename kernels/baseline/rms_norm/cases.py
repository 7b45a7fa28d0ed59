"""Shapes of RMSNorm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import plan_rms_norm
from .reference import rms_norm_reference


@dataclass(frozen=True)
class RowsCase:
    """Rows of hidden states."""

    name: str
    dtype: str
    num_tokens: int
    hidden_size: int


class RmsNorm(Variant):
    """RMSNorm; one cost unit is one element."""

    operation = "baseline/rms_norm"
    cost_unit = "element"
    correctness_cases = (
        RowsCase("one-row", "float16", 1, 64),
        RowsCase("odd-hidden", "bfloat16", 5, 100),
        RowsCase("one-element", "float32", 3, 1),
        RowsCase("hidden-4096", "bfloat16", 3, 4096),
    )
    timing_cases = tuple(
        RowsCase(f"{tokens}x{hidden}", "bfloat16", tokens, hidden)
        for hidden in (4096, 8192)
        for tokens in (1, 16, 128, 2048, 16384)
    )
    compile_case = RowsCase("llama-3-8b", "bfloat16", 16, 4096)

    def make_inputs(self, case: RowsCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, case.dtype)
        x = torch.randn(case.num_tokens, case.hidden_size, generator=generator, device=device).to(dtype)
        weight = torch.rand(case.hidden_size, generator=generator, device=device).to(dtype) + 0.5
        return {"x": x, "weight": weight, "epsilon": 1e-5}

    def reference(self, case: RowsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"output": rms_norm_reference(inputs["x"], inputs["weight"], inputs["epsilon"])}

    def allocate(self, case: RowsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"output": torch.empty_like(inputs["x"])}

    def plan(
        self, case: RowsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_rms_norm(inputs, buffers, config),)

    def configs(self, target: str, case: RowsCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=1, num_warps=4 if case.hidden_size <= 4096 else 8, num_stages=1),)

    def counted_loop(self, case: RowsCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("rms_norm_kernel", "whole", units=case.hidden_size)

    def traffic(self, case: RowsCase) -> Traffic:
        elements = case.num_tokens * case.hidden_size
        element_bytes = getattr(torch, case.dtype).itemsize
        return Traffic(
            read_bytes=(elements + case.hidden_size) * element_bytes,
            written_bytes=elements * element_bytes,
            flops=4 * elements,
            units=elements,
        )


VARIANTS = (RmsNorm(),)
