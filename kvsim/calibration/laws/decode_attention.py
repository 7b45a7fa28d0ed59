"""Decode attention: one new token per sequence over a KV cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.kv_formats import bytes_per_element
from kvsim.calibration.laws.base import FloatArray, Law, Parameter, Shape, smooth_maximum

ELEMENTS_PER_CLOCK = 64.0
"""Unit of the unpack rate: elements of K or V that one multiprocessor handles per clock at rate 1."""


QUERY_AND_OUTPUT_BYTES = 4.0
"""Bytes per query head and dimension: the query is read and the output written in 16 bits."""
DEPTH_UNIT = 1024.0
MIN_QUERY_ROWS = 16.0
"""Rows that a matrix instruction computes whether the group fills them or not."""


class DecodeAttentionLaw(Law):
    """``t = launch + per_sequence x batch + pnorm(bytes / (eta BW), FLOPs / (f F), elements / (u SM clk 64), walk)``.

    Bytes are K and V once, the query and the output. FLOPs count at least 16 query rows per KV head. Elements bind
    kernels that convert or unpack (FA3's fp8 runs at one rate on H100 and H200); a work item costs as much as some
    tokens more. The walk is ``depth_s`` per 1024 tokens of context, which binds where the context is not split (FA2
    without groups). A window caps the context. One fit per head size, and apart with and without groups or windows
    where that predicts held-out shapes better, as a framework then has other kernels for them.
    """

    name = "decode_attention.2"
    operation = "decode_attention"
    parameters = (
        Parameter("launch_s", 1e-5, 1e-7, 3e-4),
        Parameter("per_sequence_s", 5e-8, 1e-10, 5e-6),
        Parameter("stream_efficiency", 0.85, 0.02, 1.0),
        Parameter("matmul_efficiency", 0.3, 0.003, 1.0),
        Parameter("unpack_rate", 2.0, 0.01, 100.0),
        Parameter("item_tokens", 25.0, 0.01, 1e4),
        Parameter("depth_s", 1e-6, 1e-8, 1e-3),
        Parameter("sharpness", 3.0, 1.0, 12.0),
    )
    features = ("log2_items", "log2_context", "log2_group", "log2_head_dim")
    spacing = (1.0, 0.5, 1.0, 1.0)
    categories = ("head_dim",)
    optional_categories = ("is_grouped", "is_windowed")
    per_item_parameters = ("per_sequence_s",)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        group = shape["num_heads"] / shape["num_kv_heads"]
        items = shape["batch"] * shape["num_kv_heads"]
        return np.log2(np.stack([items, attended_tokens(shape), group, shape["head_dim"]], 1))

    def category_values(self, shape: Shape) -> dict[str, FloatArray]:
        return {
            "head_dim": shape["head_dim"],
            "is_grouped": np.where(shape["num_heads"] > shape["num_kv_heads"], 1.0, 0.0),
            "is_windowed": np.where(shape["window_tokens"] > 0, 1.0, 0.0),
        }

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        items, context, group, head_dim = np.exp2(features).T
        elements = 2.0 * items * context * head_dim
        moved_bytes = elements * kv_bytes_per_element(key) + items * group * head_dim * QUERY_AND_OUTPUT_BYTES
        moved_s = moved_bytes / (parameters["stream_efficiency"] * facts.bandwidth_bytes_per_s)
        rate = facts.flops_per_s.get(key["dtype"], facts.half_flops_per_s)
        computed_s = 2.0 * elements * np.maximum(group, MIN_QUERY_ROWS) / (parameters["matmul_efficiency"] * rate)
        handled = elements + 2.0 * parameters["item_tokens"] * items * head_dim
        unpacked_s = handled / (parameters["unpack_rate"] * facts.lane_clocks_per_s * ELEMENTS_PER_CLOCK)
        depth_s = parameters["depth_s"] * context / DEPTH_UNIT
        busy_s = smooth_maximum(parameters["sharpness"], moved_s, computed_s, unpacked_s, depth_s)
        return np.asarray(parameters["launch_s"] + busy_s)

    def per_item_seconds(self, shape: Shape, parameters: Mapping[str, float]) -> FloatArray:
        return parameters["per_sequence_s"] * shape["batch"]

    def working_set_bytes(self, features: FloatArray, key: Mapping[str, str]) -> FloatArray:
        items, context, _, head_dim = np.exp2(features).T
        return np.asarray(2.0 * items * context * head_dim * kv_bytes_per_element(key))


def attended_tokens(shape: Shape) -> FloatArray:
    """Tokens that a query reads: the context, or the window where that is shorter."""
    window = shape["window_tokens"]
    return np.where(window > 0, np.minimum(window, shape["context_tokens"]), shape["context_tokens"])


def kv_bytes_per_element(key: Mapping[str, str]) -> float:
    """Bytes of one stored element.

    Raises
    ------
    KeyError
        For a format whose bytes this law does not know.
    """
    return bytes_per_element(key["kv_dtype"])
