"""Multi-head latent attention of DeepSeek-V3: decode over the compressed cache, prefill over expanded heads."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.laws.base import FloatArray, Law, Parameter, Shape, smooth_maximum
from kvsim.calibration.laws.decode_attention import kv_bytes_per_element
from kvsim.calibration.laws.prefill_attention import HALF_BYTES, TILE_TOKENS, tiled_keys_per_query

LATENT_DIM, ROPE_DIM, HEAD_DIM = 512.0, 64.0, 128.0
"""What the public tables are measured with: cached latent and rotary dimensions, and a head's own."""
MIN_HEADS = 16.0
"""Heads that a matrix instruction computes whether there are as many or not."""
DEPTH_UNIT = 1024.0


class MlaDecodeLaw(Law):
    """``t = launch + per_sequence x batch + pnorm(bytes / (eta BW), FLOPs / (mu F), context x depth)``.

    All heads of a rank share one cached vector of 576 elements per token. Bytes are those, the absorbed queries and
    the outputs; FLOPs count at least 16 heads. ``depth_s`` is one sequence's walk along 1024 tokens.
    """

    name = "mla_decode.1"
    operation = "mla_decode"
    parameters = (
        Parameter("launch_s", 1e-5, 1e-7, 3e-4),
        Parameter("per_sequence_s", 5e-8, 1e-10, 5e-6),
        Parameter("stream_efficiency", 0.7, 0.02, 1.0),
        Parameter("matmul_efficiency", 0.5, 0.003, 1.0),
        Parameter("depth_s", 1e-6, 1e-9, 1e-3),
        Parameter("sharpness", 3.0, 1.0, 12.0),
    )
    features = ("log2_batch", "log2_context", "log2_heads")
    spacing = (1.0, 1.0, 1.0)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        return np.log2(np.stack([shape["batch"], shape["context_tokens"], shape["num_heads"]], 1))

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        batch, context, heads = np.exp2(features).T
        queries_and_outputs = batch * heads * (2.0 * LATENT_DIM + ROPE_DIM) * HALF_BYTES
        moved_bytes = batch * context * (LATENT_DIM + ROPE_DIM) * kv_bytes_per_element(key) + queries_and_outputs
        moved_s = moved_bytes / (parameters["stream_efficiency"] * facts.bandwidth_bytes_per_s)
        flops = 2.0 * batch * context * np.maximum(heads, MIN_HEADS) * (2.0 * LATENT_DIM + ROPE_DIM)
        rate = facts.flops_per_s.get(key["dtype"], facts.half_flops_per_s)
        computed_s = flops / (parameters["matmul_efficiency"] * rate)
        depth_s = parameters["depth_s"] * context / DEPTH_UNIT
        busy_s = smooth_maximum(parameters["sharpness"], moved_s, computed_s, depth_s)
        return np.asarray(parameters["launch_s"] + parameters["per_sequence_s"] * batch + busy_s)

    def working_set_bytes(self, features: FloatArray, key: Mapping[str, str]) -> FloatArray:
        batch, context, _ = np.exp2(features).T
        return np.asarray(batch * context * (LATENT_DIM + ROPE_DIM) * kv_bytes_per_element(key))


class MlaPrefillLaw(Law):
    """``t = launch + per_sequence x batch + pnorm(bytes / (eta BW), FLOPs / (mu F), tile)``, as prefill attention.

    Every head has its own keys of 192 and values of 128 dimensions; query, output, keys and values move once each.
    """

    name = "mla_prefill.1"
    operation = "mla_prefill"
    parameters = (
        Parameter("launch_s", 1e-5, 1e-7, 3e-4),
        Parameter("per_sequence_s", 5e-8, 1e-10, 5e-6),
        Parameter("stream_efficiency", 0.6, 0.02, 1.0),
        Parameter("matmul_efficiency", 0.5, 0.003, 1.0),
        Parameter("depth_s", 3e-6, 1e-8, 1e-3),
        Parameter("sharpness", 3.0, 1.0, 12.0),
    )
    features = ("log2_items", "log2_queries", "log2_keys")
    spacing = (0.5, 0.5, 1.0)
    per_item_parameters = ("per_sequence_s",)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        keys = tiled_keys_per_query(shape["prompt_tokens"], shape["context_tokens"])
        return np.log2(np.stack([shape["batch"] * shape["num_heads"], shape["prompt_tokens"], keys], 1))

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        items, queries, keys = np.exp2(features).T
        width = 2.0 * HEAD_DIM + ROPE_DIM
        flops = 2.0 * items * (queries + TILE_TOKENS / 2.0) * keys * width
        rate = facts.flops_per_s.get(key["dtype"], facts.half_flops_per_s)
        computed_s = flops / (parameters["matmul_efficiency"] * rate)
        moved_bytes = items * (queries + keys) * width * HALF_BYTES
        moved_s = moved_bytes / (parameters["stream_efficiency"] * facts.bandwidth_bytes_per_s)
        depth_s = parameters["depth_s"] * keys / DEPTH_UNIT
        return parameters["launch_s"] + smooth_maximum(parameters["sharpness"], computed_s, moved_s, depth_s)

    def per_item_seconds(self, shape: Shape, parameters: Mapping[str, float]) -> FloatArray:
        return parameters["per_sequence_s"] * shape["batch"]
