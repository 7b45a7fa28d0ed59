"""Which dtypes, and how many products."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import DEPTH, ROWS, SUMS, plan_mma

BLOCK_N = 128


@dataclass(frozen=True)
class MmaCase:
    """Programs, each with tiles of its own, and how often each multiplies them."""

    name: str
    programs: int
    passes: int


class Mma(Variant):
    """Matrix products of 16 rows in one dtype.

    Inputs: ``a`` (programs, 16, 64) and ``b`` (programs, 128, 64). Result: ``result``, 4 * `passes` times
    their product plus 6, in fp32 (int32 for int8).
    """

    cost_unit = "multiply_add"
    uses_matrix_units = True
    correctness_cases = (MmaCase("once", 1, 1), MmaCase("three-programs-five-passes", 3, 5))
    timing_cases = (MmaCase("2048x1024", 2048, 1024), MmaCase("2048x4096", 2048, 4096))
    compile_case = MmaCase("one", 1, 64)

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.operation = f"microbenchmark/mma/{dtype}"

    def make_inputs(self, case: MmaCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)

        def draw(rows: int) -> torch.Tensor:
            values = torch.randn((case.programs, rows, DEPTH), generator=generator, device=device)
            return (values * 16).round().to(dtype) if dtype == torch.int8 else values.to(dtype)

        return {"a": draw(ROWS), "b": draw(BLOCK_N)}

    def reference(self, case: MmaCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        # In double: the sum over passes is a multiple of one product, up to the rounding of fp32.
        product = inputs["a"].double() @ inputs["b"].double().mT
        return {"result": SUMS * case.passes * product + sum(range(SUMS))}

    def allocate(self, case: MmaCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        dtype = torch.int32 if self.dtype == "int8" else torch.float32
        return {"result": inputs["a"].new_empty((case.programs, ROWS, BLOCK_N), dtype=dtype)}

    def plan(
        self, case: MmaCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_mma(inputs["a"], inputs["b"], buffers["result"], case.passes, config),)

    def configs(self, target: str, case: MmaCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(BLOCK_N, num_warps=4, num_stages=1),)

    def compute_dtype(self, case: MmaCase) -> str:
        # Operands are exact in every dtype; thousands of fp32 additions are not.
        return "float16"

    def counted_loop(self, case: MmaCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("mma_kernel", "matrix_loop", units=SUMS * ROWS * DEPTH * BLOCK_N)

    def traffic(self, case: MmaCase) -> Traffic:
        width = getattr(torch, self.dtype).itemsize
        multiply_adds = SUMS * case.programs * ROWS * DEPTH * BLOCK_N * case.passes
        return Traffic(
            read_bytes=case.programs * (ROWS + BLOCK_N) * DEPTH * width,
            written_bytes=case.programs * ROWS * BLOCK_N * 4,
            flops=2 * multiply_adds,
            units=multiply_adds,
        )

    def unsupported(self, target: str) -> str | None:
        if self.dtype == "float8_e4m3fn" and target == "sm_80":
            return "type fp8e4nv not supported in this architecture"
        return None


VARIANTS = tuple(Mma(dtype) for dtype in ("bfloat16", "float16", "int8", "float8_e4m3fn"))
