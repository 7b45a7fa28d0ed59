"""Linear layers of Llama-3.1-8B and 70B, whole and cut for tensor parallelism."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...launches import HostCall, LaunchConfig

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class GemmCase:
    """A product ``x @ weight.T`` of x (m, k) and weight (n, k)."""

    name: str
    m: int
    n: int
    k: int


# Published configurations: hidden size, query heads and KV heads times 128, feed-forward size, vocabulary.
_MODELS = {"llama-3-8b": (4096, 4096, 1024, 14336, 128256), "llama-3-70b": (8192, 8192, 1024, 28672, 128256)}
_PARALLEL = (1, 2, 4, 8)
_ROWS = tuple(1 << power for power in range(14))


def _layers(model: str, tensor_parallel: int) -> dict[str, tuple[int, int]]:
    """Give (n, k) of each linear layer of one shard: columns are cut before an all-reduce's producer, rows in it."""
    hidden, query, key, feed_forward, vocabulary = _MODELS[model]
    return {
        "qkv": ((query + 2 * key) // tensor_parallel, hidden),
        "o": (hidden, query // tensor_parallel),
        "gate_up": (2 * feed_forward // tensor_parallel, hidden),
        "down": (hidden, feed_forward // tensor_parallel),
        "lm_head": (vocabulary // tensor_parallel, hidden),
    }


def _timing_cases() -> tuple[GemmCase, ...]:
    cases = {}
    for model in _MODELS:
        for tensor_parallel in _PARALLEL:
            for layer, (n, k) in _layers(model, tensor_parallel).items():
                for m in _ROWS:
                    cases.setdefault((m, n, k), GemmCase(f"{model}-tp{tensor_parallel}-{layer}-m{m}", m, n, k))
    return tuple(sorted(cases.values(), key=lambda case: case.m * case.n * case.k))


class Gemm(Variant):
    """``torch.mm``, or ``torch._scaled_mm`` with one scale per tensor for fp8.

    Inputs: ``x`` (m, k), ``weight`` (n, k); for fp8 ``x_scale`` and ``weight_scale``, fp32 scalars. Result: ``output``
    (m, n) bf16.
    """

    cost_unit = "multiply_add"
    uses_matrix_units = True
    correctness_cases = (
        GemmCase("one-row", 1, 32, 64),
        GemmCase("odd-rows", 37, 48, 96),
        GemmCase("square", 128, 128, 128),
    )
    timing_cases = _timing_cases()
    compile_case = GemmCase("square", 128, 128, 128)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.operation = f"baseline/gemm/{dtype}"

    def make_inputs(self, case: GemmCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        x, weight = (
            torch.randn((rows, case.k), generator=generator, device=device, dtype=torch.bfloat16)
            for rows in (case.m, case.n)
        )
        if self.dtype == "bf16":
            return {"x": x, "weight": weight}
        scales = [(tensor.abs().amax().float() / torch.finfo(FP8).max) for tensor in (x, weight)]
        return {
            "x": (x.float() / scales[0]).to(FP8),
            "weight": (weight.float() / scales[1]).to(FP8),
            "x_scale": scales[0],
            "weight_scale": scales[1],
        }

    def reference(self, case: GemmCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        product = inputs["x"].float() @ inputs["weight"].float().T
        return {"output": product * inputs.get("x_scale", 1.0) * inputs.get("weight_scale", 1.0)}

    def allocate(self, case: GemmCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"output": inputs["x"].new_empty((case.m, case.n), dtype=torch.bfloat16)}

    def plan(
        self, case: GemmCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[HostCall, ...]:  # type: ignore[override]
        x, weight, output = inputs["x"], inputs["weight"], buffers["output"]
        if x.shape != (case.m, case.k) or weight.shape != (case.n, case.k):
            raise ValueError("x must be (m, k) and weight (n, k)")
        if self.dtype == "bf16":
            return (HostCall("torch_mm", lambda: torch.mm(x, weight.T, out=output)),)
        if case.n % 16 or case.k % 16:
            raise ValueError("fp8 products need n and k that are multiples of 16")
        scales = {"scale_a": inputs["x_scale"], "scale_b": inputs["weight_scale"]}
        return (
            HostCall(
                "torch_scaled_mm",
                lambda: torch._scaled_mm(x, weight.T, **scales, out_dtype=torch.bfloat16, out=output),
            ),
        )

    def configs(self, target: str, case: GemmCase) -> tuple[LaunchConfig, ...]:
        # The library chooses its own tiles.
        return (LaunchConfig(block_n=1, num_warps=1, num_stages=1),)

    def compute_dtype(self, case: GemmCase) -> str:
        # Operands are exact in fp32; the sum is in fp32 and the result rounded to bf16.
        return "bfloat16"

    def counted_loop(self, case: GemmCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("no kernel of ours", "whole", units=1)

    def traffic(self, case: GemmCase) -> Traffic:
        width = 2 if self.dtype == "bf16" else 1
        return Traffic(
            read_bytes=(case.m + case.n) * case.k * width,
            written_bytes=case.m * case.n * 2,
            flops=2 * case.m * case.n * case.k,
            units=case.m * case.n * case.k,
        )

    def unsupported(self, target: str) -> str | None:
        if self.dtype == "fp8" and target in {"sm_80", "gfx942"}:
            return "torch._scaled_mm takes e4m3fn from sm_89 on, and e4m3fnuz on gfx942"
        return None


VARIANTS = (Gemm("bf16"), Gemm("fp8"))
