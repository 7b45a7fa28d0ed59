"""Matrix multiplication: m rows of activations by k x n weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.laws.base import FloatArray, Law, Parameter, Shape, smooth_maximum


class GemmFormat(NamedTuple):
    """Bytes per weight and per activation, and the dtypes whose tensor rate applies: the first that a device has."""

    weight_bytes: float
    activation_bytes: float
    rates: tuple[str, ...]


HALF_BYTES = 2.0
BLOCK_SCALE_BYTES = 4.0 / (128 * 128)
FORMATS: Mapping[str, GemmFormat] = {
    "bf16": GemmFormat(2.0, 2.0, ("bf16",)),
    "fp16": GemmFormat(2.0, 2.0, ("fp16",)),
    "fp8": GemmFormat(1.0, 1.0, ("fp8",)),
    "fp8_block": GemmFormat(1.0 + BLOCK_SCALE_BYTES, 1.0, ("fp8",)),
    "int8": GemmFormat(1.0, 1.0, ("int8",)),
    "sq": GemmFormat(1.0, 1.0, ("int8",)),
    "int8_wo": GemmFormat(1.0, 2.0, ("fp16", "bf16")),
    "int4_wo": GemmFormat(0.5, 2.0, ("fp16", "bf16")),
    "nvfp4": GemmFormat(0.5625, 0.5625, ("fp4", "nvfp4", "fp8")),
}
"""``_wo`` multiplies 16-bit activations by unpacked weights; nvfp4 has one byte of scale per 16 values."""
MIN_ROWS = 16.0
"""Rows that a matrix instruction computes whether there are as many or not."""
DEPTH_UNIT = 1024.0


class GemmLaw(Law):
    """``t = launch + pnorm(bytes / (eta BW), FLOPs / (mu F), k x depth)``.

    Bytes are weights, activations and output once each; FLOPs count at least 16 rows. ``depth_s`` is what one tile
    takes for 1024 steps along k: where tiles are few, no other tile hides it. The tensor rate is the dtype's, or that
    of 16 bits where a device lacks the dtype.
    """

    name = "gemm.1"
    operation = "gemm"
    parameters = (
        Parameter("launch_s", 4e-6, 1e-7, 3e-4),
        Parameter("stream_efficiency", 0.75, 0.02, 1.0),
        Parameter("matmul_efficiency", 0.7, 0.003, 1.0),
        Parameter("depth_s", 1e-6, 1e-9, 1e-4),
        Parameter("sharpness", 3.0, 1.0, 12.0),
    )
    features = ("log2_rows", "log2_n", "log2_k")
    spacing = (0.5, 1.0, 1.0)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        return np.log2(np.stack([shape["m"], shape["n"], shape["k"]], 1))

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        m, n, k = np.exp2(features).T
        kind = FORMATS[key["dtype"]]
        moved_bytes = n * k * kind.weight_bytes + m * k * kind.activation_bytes + m * n * HALF_BYTES
        moved_s = moved_bytes / (parameters["stream_efficiency"] * facts.bandwidth_bytes_per_s)
        rates = (facts.flops_per_s[dtype] for dtype in kind.rates if dtype in facts.flops_per_s)
        rate = parameters["matmul_efficiency"] * next(rates, facts.half_flops_per_s)
        computed_s = 2.0 * np.maximum(m, MIN_ROWS) * n * k / rate
        depth_s = parameters["depth_s"] * k / DEPTH_UNIT
        return parameters["launch_s"] + smooth_maximum(parameters["sharpness"], moved_s, computed_s, depth_s)
