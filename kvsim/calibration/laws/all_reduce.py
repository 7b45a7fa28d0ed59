"""All-reduce over the ranks of a scale-up domain."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.laws.base import FloatArray, Law, Parameter, Shape, smooth_maximum

FALLBACK_LINK_BYTES_PER_S = 32e9
"""PCIe 4.0 x16, where a datasheet names no link."""


class AllReduceLaw(Law):
    """``t = pnorm(launch + hop x (ranks - 1), 2 (ranks - 1) / ranks x bytes / (eta link) x (ranks / 2)^contention)``.

    The second term is what a ring moves per rank and no algorithm moves less in bandwidth; ranks that share links (PCIe
    through one root) lose with their number. The switch from one shot to two in between is left to the table.
    """

    name = "all_reduce.1"
    operation = "all_reduce"
    parameters = (
        Parameter("launch_s", 5e-6, 1e-7, 3e-4),
        Parameter("hop_s", 5e-7, 1e-9, 1e-4),
        Parameter("link_efficiency", 0.7, 0.01, 1.5),
        Parameter("contention", 0.1, 1e-3, 3.0),
        Parameter("sharpness", 1.5, 0.7, 12.0),
    )
    features = ("log2_ranks", "log2_message_bytes")
    spacing = (1.0, 1.0)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        return np.log2(np.stack([shape["ranks"], shape["message_bytes"]], 1))

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        ranks, message_bytes = np.exp2(features).T
        hops = np.maximum(ranks, 1.0) - 1.0
        link = facts.link_bytes_per_s or FALLBACK_LINK_BYTES_PER_S
        shared = np.maximum(ranks / 2.0, 1.0) ** parameters["contention"]
        link_s = 2.0 * hops / (hops + 1.0) * shared * message_bytes / (parameters["link_efficiency"] * link)
        return smooth_maximum(parameters["sharpness"], parameters["launch_s"] + parameters["hop_s"] * hops, link_s)
