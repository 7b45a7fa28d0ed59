"""Any other kernel, priced by what it moves and computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.laws.base import FloatArray, Law, Parameter, Shape, smooth_maximum


class KernelLaw(Law):
    """``t = launch + pnorm(bytes / (eta BW), FLOPs / (mu F), units / (u SM clk))``.

    ``units`` are whatever the kernel does one by one (elements quantised, rows gathered): ``unit_clocks`` of one
    multiprocessor each.
    """

    name = "kernel.1"
    operation = "kernel"
    parameters = (
        Parameter("launch_s", 5e-6, 1e-7, 3e-4),
        Parameter("stream_efficiency", 0.7, 0.01, 1.0),
        Parameter("matmul_efficiency", 0.3, 0.001, 1.0),
        Parameter("unit_clocks", 0.1, 1e-4, 1e6),
        Parameter("sharpness", 3.0, 1.0, 12.0),
    )
    features = ("log2_read_bytes", "log2_written_bytes", "log2_flops", "log2_units")
    spacing = (2.0, 2.0, 4.0, 2.0)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        columns = [shape[name] for name in ("read_bytes", "written_bytes", "flops", "units")]
        return np.log2(np.maximum(np.stack(columns, 1), 1.0))

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        read_bytes, written_bytes, flops, units = np.exp2(features).T
        moved_s = (read_bytes + written_bytes) / (parameters["stream_efficiency"] * facts.bandwidth_bytes_per_s)
        rate = facts.flops_per_s.get(key["dtype"], facts.half_flops_per_s)
        computed_s = flops / (parameters["matmul_efficiency"] * rate)
        handled_s = units * parameters["unit_clocks"] / facts.lane_clocks_per_s
        return parameters["launch_s"] + smooth_maximum(parameters["sharpness"], moved_s, computed_s, handled_s)
