"""Shapes of transform coding: rows of all KV heads of a token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...launches import Launch, LaunchConfig
from .basis import make_transform, split_bits
from .kernel import BLOCK_C, BLOCK_R, plan_kvtc
from .reference import kvtc_decode_reference, kvtc_encode_reference


@dataclass(frozen=True)
class RowsCase:
    """Rows of a layer's keys or values, drawn with a spectrum that falls as a power law."""

    name: str
    dtype: str
    num_rows: int
    num_channels: int
    bits_per_channel: float


def spectrum(case: RowsCase, device: str = "cpu") -> torch.Tensor:
    """Variances of the principal components: the power law 1/index."""
    return 1 / torch.arange(1, case.num_channels + 1, device=device)


def draw_inputs(case: RowsCase, seed: int, device: str) -> dict[str, Any]:
    """Draw rows with that spectrum in a random orientation, off the origin, and give them with their transform."""
    generator = torch.Generator(device=device).manual_seed(seed)
    channels, dtype = case.num_channels, getattr(torch, case.dtype)
    vectors, _ = torch.linalg.qr(torch.randn(channels, channels, generator=generator, device=device))
    mean = torch.randn(channels, generator=generator, device=device) / 2
    variances = spectrum(case, device)
    normal = torch.randn(case.num_rows, channels, generator=generator, device=device) * variances.sqrt()
    transform = make_transform(mean, vectors, variances, case.bits_per_channel)
    return {
        "rows": (normal @ vectors.T + mean).to(dtype),
        "mean": transform.mean,
        "basis": transform.basis.to(dtype),
        "step": transform.step,
        "levels": transform.levels,
    }


def num_components(case: RowsCase) -> int:
    """Components that get bits."""
    return len(split_bits(spectrum(case), case.bits_per_channel))


class _Kvtc(Variant):
    cost_unit = "row_channel"
    uses_matrix_units = True
    correctness_cases = (
        RowsCase("one-row", "float16", 1, 32, 2.0),
        RowsCase("odd-bf16", "bfloat16", 37, 96, 1.5),
        RowsCase("odd-channels", "float32", 21, 70, 2.5),
        RowsCase("few-components", "float16", 50, 128, 0.25),
    )
    timing_cases = tuple(RowsCase(f"{rows}x1024", "bfloat16", rows, 1024, 2.0) for rows in (128, 2048, 16384, 131072))
    compile_case = RowsCase("llama-3-8b", "bfloat16", 128, 1024, 2.0)

    def configs(self, target: str, case: RowsCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=64, num_warps=4, num_stages=2),)

    def _traffic(self, case: RowsCase, *, decode: bool) -> Traffic:
        element_bytes = getattr(torch, case.dtype).itemsize
        components = num_components(case)
        rows_bytes, codes_bytes = case.num_rows * case.num_channels * element_bytes, case.num_rows * components
        basis_bytes = case.num_channels * components * element_bytes
        return Traffic(
            read_bytes=basis_bytes + (codes_bytes if decode else rows_bytes),
            written_bytes=rows_bytes if decode else codes_bytes,
            flops=2 * case.num_rows * case.num_channels * components,
            units=case.num_rows * case.num_channels,
        )


class KvtcEncode(_Kvtc):
    """Project rows on principal components and quantise the coordinates."""

    operation = "transform/kvtc_encode"

    def make_inputs(self, case: RowsCase, *, seed: int, device: str) -> dict[str, Any]:
        return draw_inputs(case, seed, device)

    def reference(self, case: RowsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"codes": kvtc_encode_reference(inputs["rows"], inputs)}

    def allocate(self, case: RowsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        shape = (case.num_rows, inputs["basis"].shape[1])
        return {"codes": torch.empty(shape, dtype=torch.uint8, device=inputs["rows"].device)}

    def plan(
        self, case: RowsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_kvtc(inputs["rows"], buffers["codes"], inputs, config, decode=False),)

    def comparison(self, result: str) -> Comparison:
        return "codes"

    def counted_loop(self, case: RowsCase, config: LaunchConfig) -> CountedLoop:
        # One pass covers BLOCK_C channels for BLOCK_R components: a share of what a row and channel cost.
        units = config.block_n * BLOCK_C * BLOCK_R / num_components(case)
        return CountedLoop("kvtc_encode_kernel", "matrix_loop", units)

    def traffic(self, case: RowsCase) -> Traffic:
        return self._traffic(case, decode=False)


class KvtcDecode(_Kvtc):
    """Turn codes back to rows."""

    operation = "transform/kvtc_decode"

    def make_inputs(self, case: RowsCase, *, seed: int, device: str) -> dict[str, Any]:
        drawn = draw_inputs(case, seed, device)
        return {**drawn, "codes": kvtc_encode_reference(drawn["rows"], drawn)}

    def reference(self, case: RowsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"rows": kvtc_decode_reference(inputs["codes"], inputs)}

    def allocate(self, case: RowsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"rows": torch.empty_like(inputs["rows"])}

    def plan(
        self, case: RowsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_kvtc(buffers["rows"], inputs["codes"], inputs, config, decode=True),)

    def counted_loop(self, case: RowsCase, config: LaunchConfig) -> CountedLoop:
        units = config.block_n * BLOCK_C * BLOCK_R / num_components(case)
        return CountedLoop("kvtc_decode_kernel", "matrix_loop", units)

    def traffic(self, case: RowsCase) -> Traffic:
        return self._traffic(case, decode=True)


VARIANTS = (KvtcEncode(), KvtcDecode())
