"""Shapes and tilings of prefill attention."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import plan_prefill_attention
from .reference import prefill_attention_reference


@dataclass(frozen=True)
class PrefillCase:
    """A batch of prompts."""

    name: str
    dtype: str
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    prompt_lens: tuple[int, ...]


class PrefillAttention(Variant):
    """Causal attention over prompts; one cost unit is one pair of a query token and a key token in one query head."""

    operation = "baseline/prefill_attention"
    cost_unit = "query_key_pair"
    uses_matrix_units = True
    correctness_cases = (
        PrefillCase("one-token", "float16", 2, 1, 64, (1,)),
        PrefillCase("ragged-gqa-bf16", "bfloat16", 4, 2, 64, (65, 130, 17)),
        PrefillCase("odd-head-dim", "float32", 3, 3, 80, (97,)),
        PrefillCase("an-empty-prompt", "float16", 2, 2, 32, (33, 0, 64)),
        PrefillCase("head-dim-256", "bfloat16", 2, 1, 256, (70,)),
    )
    timing_cases = tuple(
        PrefillCase(f"{batch}x{length}-32/8", "bfloat16", 32, 8, 128, (length,) * batch)
        for batch, length in ((1, 128), (1, 512), (8, 512), (1, 2048), (4, 2048), (1, 8192), (2, 8192), (1, 32768))
    )
    compile_case = PrefillCase("llama-3-8b", "bfloat16", 32, 8, 128, (128, 64))

    def make_inputs(self, case: PrefillCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype, num_tokens = getattr(torch, case.dtype), sum(case.prompt_lens)

        def draw(num_heads: int) -> torch.Tensor:
            return torch.randn(num_tokens, num_heads, case.head_dim, generator=generator, device=device).to(dtype)

        return {
            "query": draw(case.num_query_heads),
            "key": draw(case.num_kv_heads),
            "value": draw(case.num_kv_heads),
            "cu_seqlens": torch.tensor([0, *accumulate(case.prompt_lens)], dtype=torch.int32, device=device),
            "max_seqlen": max(case.prompt_lens),
            "scale": case.head_dim**-0.5,
        }

    def reference(self, case: PrefillCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        tensors = (inputs[name] for name in ("query", "key", "value", "cu_seqlens", "scale"))
        return {"output": prefill_attention_reference(*tensors)}

    def allocate(self, case: PrefillCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"output": torch.empty_like(inputs["query"])}

    def plan(
        self, case: PrefillCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_prefill_attention(inputs, buffers, config, block_m=self._block_m(case)),)

    @staticmethod
    def _block_m(case: PrefillCase) -> int:
        return 128 if case.head_dim <= 128 and case.dtype != "float32" else 64

    def configs(self, target: str, case: PrefillCase) -> tuple[LaunchConfig, ...]:
        if target.startswith("gfx"):
            return (LaunchConfig(block_n=32, num_warps=4, num_stages=1),)
        # 64 keys a tile spill where products run as mma.sync, and exceed the 99 KiB of shared memory of sm_120.
        fits_64 = case.head_dim <= 128 and target in ("sm_90", "sm_100")
        num_warps = 8 if case.head_dim > 64 else 4
        return (LaunchConfig(64 if fits_64 else 32, num_warps=num_warps, num_stages=3),)

    def counted_loop(self, case: PrefillCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("prefill_attention_kernel", "matrix_loop", units=self._block_m(case) * config.block_n)

    def traffic(self, case: PrefillCase) -> Traffic:
        num_tokens, element_bytes = sum(case.prompt_lens), getattr(torch, case.dtype).itemsize
        pairs = case.num_query_heads * sum(length * (length + 1) // 2 for length in case.prompt_lens)
        rows = num_tokens * case.head_dim * element_bytes
        return Traffic(
            read_bytes=rows * (case.num_query_heads + 2 * case.num_kv_heads),
            written_bytes=rows * case.num_query_heads,
            flops=4 * case.head_dim * pairs,
            units=pairs,
        )


VARIANTS = (PrefillAttention(),)
