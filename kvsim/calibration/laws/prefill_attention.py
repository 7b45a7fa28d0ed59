"""Prefill attention: new tokens of each sequence over themselves and what is cached before them, causal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.laws.base import FloatArray, Law, Parameter, Shape, smooth_maximum

TILE_TOKENS = 128.0
"""Queries that a tile computes whether there are as many or not, and the grain of what a causal mask saves."""
HALF_BYTES = 2.0


class PrefillAttentionLaw(Law):
    """``t = launch + per_sequence x batch + pnorm(bytes / (eta BW), 4 D pairs / (mu F), tile)``.

    Pairs are those of queries and keys that the mask leaves, with tiles filled up: a query reads its context to the
    end of its tile. Bytes are query, output, K and V once, 16 bits each. The last term is one tile's walk along its
    keys, which nothing hides where tiles are few. One fit per head size, and apart with a window where that
    helps.
    """

    name = "prefill_attention.1"
    operation = "prefill_attention"
    parameters = (
        Parameter("launch_s", 1e-5, 1e-7, 3e-4),
        Parameter("per_sequence_s", 5e-8, 1e-10, 5e-6),
        Parameter("stream_efficiency", 0.6, 0.02, 1.0),
        Parameter("matmul_efficiency", 0.5, 0.003, 1.0),
        Parameter("store_efficiency", 0.5, 0.01, 10.0),
        Parameter("depth_s", 3e-6, 1e-8, 1e-3),
        Parameter("sharpness", 3.0, 1.0, 12.0),
    )
    features = ("log2_items", "log2_queries", "log2_keys", "log2_kv_items", "log2_head_dim")
    spacing = (1.0, 1.0, 2.0, 2.0, 1.0)
    categories = ("head_dim",)
    optional_categories = ("is_windowed",)
    per_item_parameters = ("per_sequence_s",)

    def feature_values(self, shape: Shape, facts: DeviceFacts) -> FloatArray:
        items, kv_items = (shape["batch"] * shape[name] for name in ("num_heads", "num_kv_heads"))
        columns = [items, shape["prompt_tokens"], keys_per_query(shape), kv_items, shape["head_dim"]]
        return np.log2(np.stack(columns, 1))

    def category_values(self, shape: Shape) -> dict[str, FloatArray]:
        return {"head_dim": shape["head_dim"], "is_windowed": np.where(shape["window_tokens"] > 0, 1.0, 0.0)}

    def core_seconds(
        self, features: FloatArray, parameters: Mapping[str, float], facts: DeviceFacts, key: Mapping[str, str]
    ) -> FloatArray:
        items, queries, keys, kv_items, head_dim = np.exp2(features).T
        filled = items * (queries + TILE_TOKENS / 2.0) * keys
        rate = facts.flops_per_s.get(key["dtype"], facts.half_flops_per_s)
        computed_s = 4.0 * filled * head_dim / (parameters["matmul_efficiency"] * rate)
        moved_bytes = 2.0 * head_dim * (items * queries + kv_items * keys) * HALF_BYTES
        moved_s = moved_bytes / (parameters["stream_efficiency"] * facts.bandwidth_bytes_per_s)
        stored_bytes = 4.0 * kv_items * queries * head_dim * HALF_BYTES
        stored_s = stored_bytes / (parameters["store_efficiency"] * facts.bandwidth_bytes_per_s)
        depth_s = parameters["depth_s"] * keys / 1024.0
        busy_s = smooth_maximum(parameters["sharpness"], computed_s, moved_s, depth_s)
        return np.asarray(parameters["launch_s"] + stored_s + busy_s)

    def per_item_seconds(self, shape: Shape, parameters: Mapping[str, float]) -> FloatArray:
        return parameters["per_sequence_s"] * shape["batch"]


def keys_per_query(shape: Shape) -> FloatArray:
    """Mean number of keys that a query sees, with tiles filled up and a window cut; rises with all three columns."""
    keys = tiled_keys_per_query(shape["prompt_tokens"], shape["context_tokens"])
    window = shape["window_tokens"]
    return np.where(window > 0, np.minimum(window + TILE_TOKENS / 2.0, keys), keys)


def tiled_keys_per_query(queries: FloatArray, context: FloatArray) -> FloatArray:
    """Mean number of keys that a causal query sees, with tiles filled up."""
    return np.asarray(context - queries + (queries + TILE_TOKENS) / 2.0)
