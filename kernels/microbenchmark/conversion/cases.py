"""Which conversions, and how many."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .kernel import STEP_MASK, plan_conversion

BLOCK_N = 1024
_TORCH = {
    "int8": torch.int8,
    "int32": torch.int32,
    "float32": torch.float32,
    "float8e4nv": torch.float8_e4m3fn,
    "float8e5": torch.float8_e5m2,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class ConversionCase:
    """Values in registers, and how often each is converted."""

    name: str
    num_values: int
    passes: int


class Conversion(Variant):
    """Conversion from one dtype to another, by Triton's names of them.

    Inputs: ``source``, codes of the dtype to convert from as integers of its width. Result: ``result``, the exclusive
    or of the converted values' bits over all passes.
    """

    cost_unit = "conversion"
    correctness_cases = (ConversionCase("one-tile", BLOCK_N, 3), ConversionCase("two-tiles-70-passes", 2 * BLOCK_N, 70))
    # 16 programs of 4 warps per multiprocessor of the largest GPU here: enough to hide latency.
    timing_cases = (
        ConversionCase("4096x1024", 4096 * BLOCK_N, 1024),
        ConversionCase("4096x4096", 4096 * BLOCK_N, 4096),
    )
    compile_case = ConversionCase("one-tile", BLOCK_N, 64)

    def __init__(self, from_dtype: str, to_dtype: str) -> None:
        self.dtypes = (from_dtype, to_dtype)
        self.operation = f"microbenchmark/conversion/{from_dtype}_to_{to_dtype}"

    def make_inputs(self, case: ConversionCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        shape = (case.num_values,)
        if self.dtypes[0] == "float32":
            values = torch.randn(shape, generator=generator, device=device)
            return {"source": values.view(torch.int32) & ~STEP_MASK}
        codes = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.int32)
        # As fp8, e4m3 or e5m2: finite and no subnormal, which Triton's interpreter takes for zero.
        codes = (codes & ~0x40) | 0x20
        return {"source": codes.to(torch.uint8).view(torch.int8) if self.dtypes[0] != "int32" else codes}

    def reference(self, case: ConversionCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        source = inputs["source"]
        from_dtype, to_dtype = (_TORCH[name] for name in self.dtypes)
        bits = torch.int16 if to_dtype.itemsize == 2 else torch.int32
        kept = torch.zeros(case.num_values, dtype=bits, device=source.device)
        for step in range(case.passes):
            code = source ^ (step & STEP_MASK)
            kept ^= code.view(from_dtype).to(to_dtype).view(bits)
        return {"result": kept}

    def allocate(
        self, case: ConversionCase, inputs: Mapping[str, Any], config: LaunchConfig
    ) -> dict[str, torch.Tensor]:
        bits = torch.int16 if _TORCH[self.dtypes[1]].itemsize == 2 else torch.int32
        return {"result": torch.empty_like(inputs["source"], dtype=bits)}

    def plan(
        self, case: ConversionCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_conversion(inputs["source"], buffers["result"], case.passes, self.dtypes, config),)

    def configs(self, target: str, case: ConversionCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=BLOCK_N, num_warps=4, num_stages=1),)

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: ConversionCase) -> str:
        return "float32"

    def counted_loop(self, case: ConversionCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("conversion_kernel", "largest_loop", units=config.block_n)

    def traffic(self, case: ConversionCase) -> Traffic:
        widths = [_TORCH[name].itemsize for name in self.dtypes]
        return Traffic(
            read_bytes=case.num_values * widths[0],
            written_bytes=case.num_values * widths[1],
            flops=0,
            units=case.num_values * case.passes,
        )

    def unsupported(self, target: str) -> str | None:
        if self.dtypes[0] == "float8e4nv" and target == "sm_80":
            return "type fp8e4nv not supported in this architecture"
        return None


VARIANTS = tuple(
    Conversion(from_dtype, to_dtype)
    for from_dtype, to_dtype in (
        ("int32", "float32"),
        ("int8", "float32"),
        ("int8", "float16"),
        ("int8", "bfloat16"),
        ("float8e4nv", "float16"),
        ("float8e4nv", "bfloat16"),
        ("float8e5", "float16"),
        ("float32", "float16"),
        ("float32", "bfloat16"),
    )
)
