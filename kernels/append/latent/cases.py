"""Shapes and tilings of the write path of latents."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...decode_attention.mla.batch import converts_e4m3
from ...formats.latent import ROPE_DIM, Fp8DsMla, Mla, MlaFp8
from ...launches import Launch
from ..batch import Append
from .batch import LatentAppendBatch, LatentAppendConfig, latent_append_batch
from .kernel import plan_append_fp8_ds_mla, plan_append_latent

ROUNDED_BELOW = 64
"""Bytes below this make floats of every width between 0 and 2: old page contents that do not hide an error."""


class LatentAppend(Append):
    """Write latents in the model's dtype.

    Inputs: ``latent`` (num_tokens, latent_dim), ``rope`` (num_tokens, 64), ``slot_mapping`` and ``pages`` as in
    `Append`, and ``key``, the two side by side as (num_tokens, 1, head_dim), which only the reference reads.
    """

    kv_format: Any = Mla()
    correctness_cases = (
        latent_append_batch("one-token", "float16", 1),
        latent_append_batch("odd-bf16", "bfloat16", 37, block_size=16, num_padding=2),
        latent_append_batch("narrow", "float16", 19, latent_dim=128, block_size=48),
        latent_append_batch("all-padding", "float16", 3, num_padding=3),
    )
    timing_cases = tuple(
        latent_append_batch(f"deepseek-v3-{num_tokens}", "bfloat16", num_tokens)
        for num_tokens in (1, 16, 128, 2048, 16384)
    )
    compile_case = latent_append_batch("deepseek-v3", "bfloat16", 64)
    kernel_name = "append_latent_kernel"

    def make_inputs(self, case: LatentAppendBatch, *, seed: int, device: str) -> dict[str, Any]:
        inputs = super().make_inputs(case, seed=seed, device=device)
        rows = inputs["key"][:, 0]
        return inputs | {
            "value": inputs["key"],
            "latent": rows[:, : case.latent_dim].contiguous(),
            "rope": rows[:, case.latent_dim :].contiguous(),
            "pages": inputs["pages"] % ROUNDED_BELOW,
        }

    def plan(
        self,
        case: LatentAppendBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LatentAppendConfig,
    ) -> tuple[Launch, ...]:
        scale = getattr(self.kv_format, "scale", 1.0)
        return (plan_append_latent(case, inputs, buffers["latent"], config, scale),)

    def configs(self, target: str, case: LatentAppendBatch) -> tuple[LatentAppendConfig, ...]:
        # A tile of one token keeps a decode batch on as many multiprocessors as there are requests.
        tokens = 1 if case.num_tokens <= 128 else 4
        by_bits = not converts_e4m3(target)
        return (LatentAppendConfig(tokens, num_warps=4, num_stages=1, e4m3_by_bits=by_bits),)

    def counted_loop(self, case: LatentAppendBatch, config: LatentAppendConfig) -> CountedLoop:
        return CountedLoop(self.kernel_name, "whole", units=config.block_n)

    def traffic(self, case: LatentAppendBatch) -> Traffic:
        stored = super().traffic(case)
        tokens = case.num_tokens - case.num_padding
        element_bytes = getattr(torch, case.dtype).itemsize
        read_bytes = tokens * ((case.latent_dim + ROPE_DIM) * element_bytes + 8)
        return Traffic(read_bytes, stored.written_bytes, flops=0, units=tokens)


class LatentFp8Append(LatentAppend):
    """Write latents in e4m3 with one scale."""

    kv_format = MlaFp8()


class Fp8DsMlaAppend(LatentAppend):
    """Write latents as DeepSeek-V3.2 is served."""

    kv_format = Fp8DsMla()
    kernel_name = "append_fp8_ds_mla_kernel"

    def plan(
        self,
        case: LatentAppendBatch,
        inputs: Mapping[str, Any],
        buffers: Mapping[str, torch.Tensor],
        config: LatentAppendConfig,
    ) -> tuple[Launch, ...]:
        return (plan_append_fp8_ds_mla(case, inputs, buffers, config),)


VARIANTS = (LatentAppend(), LatentFp8Append(), Fp8DsMlaAppend())
