"""RDKV's allocation on tensors: what each width would cost attention, and the widths that cost least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from kvsim.compression.codec import LayerCodec, StoredLayer
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray, IntArray
from kvsim.numerics.hadamard import largest_block, random_signs, rotate
from kvsim.numerics.softmax import softmax
from kvsim.numerics.uniform import quantise_range
from kvsim.numerics.water_filling import allocate_widths
from kvsim.tensors import FloatArray, KvTensors, LayerKv

WIDTHS: Final = (0, 2, 4, 8, 16)
NATIVE_WIDTH: Final = 16
METADATA_BITS: Final = 64
"""An fp16 scale and an fp16 zero point for K, and for V, of a token that is coded."""
COUNTER_BITS: Final = 32
"""Of how many of a head's tokens have a width."""
_SIGN_SEED: Final = 8317
_SMALLEST_SCALE: Final = 2.0**-14
"""Smallest normal half."""

_Coded: TypeAlias = tuple[FloatArray, FloatArray] | None
"""Keys and values, (H, older, D) each, as they are read back; None where tokens are dropped."""


@dataclass(frozen=True, eq=False)
class RdkvCodec(LayerCodec):
    """Widths per token and KV head of least first-order error in the outputs of the prompt's last queries.

    With a_i the weight of token i for a query and o the output, coding token i changes the output by
    a_i (dv_i + s (q . dk_i) (v_i - o)) to first order, and dropping it by a_i / (1 - a_i) (o - v_i) exactly. Errors of
    K and V are those of the very codes, and count as independent of each other and between tokens. The paper's own
    weights are not public here.

    Attributes
    ----------
    compression_ratio : float
        Share of the bits of a layer's older tokens that is removed.
    window_size : int
        Newest tokens, which stay native beside the budget.
    widths : sequence of int
        Bits to choose from, ascending; 0 drops a token, 16 leaves it native.
    """

    compression_ratio: float
    window_size: int
    widths: Sequence[int] = WIDTHS

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        """Store the window as it is and older tokens at their widths; what the budget leaves over is held too.

        Raises
        ------
        InvalidSpec
            The cache has no prompt queries.
        """
        heads, tokens, _ = layer.keys.shape
        older = max(0, tokens - self.window_size)
        token_bits = float(kv.native_bits * (layer.keys.shape[2] + layer.values.shape[2]))
        budget = (1 - self.compression_ratio) * heads * older * token_bits
        held = budget + heads * (tokens - older) * token_bits
        counters = float(COUNTER_BITS * heads * sum(width > 0 for width in self.widths))
        if older == 0:
            return StoredLayer(layer.keys, layer.values, held, counters)
        coded = [_coded(layer, older, width) for width in self.widths]
        chosen = self._allocate(layer, kv.attention_scale, coded, token_bits, budget)
        keys, values = layer.keys.copy(), layer.values.copy()
        for choice, made in enumerate(coded):
            if made is not None:
                heads_here, tokens_here = np.nonzero(chosen == choice)
                keys[heads_here, tokens_here] = made[0][heads_here, tokens_here]
                values[heads_here, tokens_here] = made[1][heads_here, tokens_here]
        is_evicted = np.zeros((heads, tokens), dtype=bool)
        is_evicted[:, :older] = np.asarray(self.widths)[chosen] == 0
        return StoredLayer(keys, values, held, counters, is_evicted=is_evicted)

    def _allocate(
        self, layer: LayerKv, attention_scale: float, coded: Sequence[_Coded], token_bits: float, budget: float
    ) -> IntArray:
        """Index of the width of each older token of each head, (H, older)."""
        errors = np.stack([
            _head_errors(layer, head, attention_scale, self.window_size, coded) for head in range(layer.num_kv_heads)
        ])  # fmt: skip
        channels = layer.keys.shape[2] + layer.values.shape[2]
        costs = np.array([_cost(width, channels, token_bits) for width in self.widths])
        return allocate_widths(errors.reshape(-1, len(costs)), costs, budget).reshape(errors.shape[:2])


def _cost(width: int, channels: int, token_bits: float) -> float:
    """Bits of one token of one head, K and V."""
    if width in (0, NATIVE_WIDTH):
        return token_bits if width else 0.0
    return float(width * channels + METADATA_BITS)


def _coded(layer: LayerKv, older: int, width: int) -> _Coded:
    """Code the older tokens of all heads at one width and read them back."""
    if width == 0:
        return None
    keys, values = layer.keys[:, :older], layer.values[:, :older]
    return (keys, values) if width == NATIVE_WIDTH else (_read_back(keys, width), _read_back(values, width))


def _read_back(vectors: FloatArray, width: int) -> FloatArray:
    """Rotate, quantise each vector over its own range, and undo both."""
    signs, block = random_signs(vectors.shape[-1], _SIGN_SEED), largest_block(vectors.shape[-1])
    made = quantise_range(rotate(vectors * signs, block), width, smallest_scale=_SMALLEST_SCALE)
    return rotate(made.read_back(), block) * signs


def _head_errors(
    layer: LayerKv, head: int, attention_scale: float, window: int, coded: Sequence[_Coded]
) -> DoubleArray:
    """Mean squared error of the window's outputs that each width of each older token of a head makes, (older, W)."""
    queries = _window_queries(layer, head, window)
    keys, values = layer.keys[head].astype(np.float64), layer.values[head].astype(np.float64)
    weights = _causal_weights(queries, keys, attention_scale, layer.group_size)
    outputs = weights @ values
    distance = (values**2).sum(axis=1) - 2 * outputs @ values.T + (outputs**2).sum(axis=1, keepdims=True)
    older = layer.num_tokens - window
    weights, distance = weights[:, :older], np.maximum(distance[:, :older], 0)
    errors = []
    for made in coded:
        if made is None:
            change = (weights / np.maximum(1e-12, 1 - weights)) ** 2 * distance
        else:
            key_change, value_change = made[0][head] - keys[:older], made[1][head] - values[:older]
            drift = (attention_scale * queries @ key_change.T) ** 2 * distance
            change = weights**2 * (drift + (value_change**2).sum(axis=1))
        errors.append(change.mean(axis=0))
    return np.stack(errors, axis=1)


def _window_queries(layer: LayerKv, head: int, window: int) -> DoubleArray:
    """Last queries of the prompt of all query heads that read a KV head, (G x w, D)."""
    group = layer.group_size
    queries = layer.prompt_queries[head * group : (head + 1) * group, -window:]
    if queries.size == 0:
        msg = "rdkv weighs tokens with the prompt's queries, and the KV tensors have no prompt_queries"
        raise InvalidSpec(msg)
    return queries.reshape(-1, queries.shape[2]).astype(np.float64)


def _causal_weights(queries: DoubleArray, keys: DoubleArray, attention_scale: float, group: int) -> DoubleArray:
    """Attention of queries that belong to the last tokens, (G x w, n); each sees tokens up to its own."""
    tokens, asked = len(keys), len(queries) // group
    last_seen = np.tile(np.arange(tokens - asked, tokens), group)[:, None]
    return softmax(np.where(np.arange(tokens) <= last_seen, attention_scale * queries @ keys.T, -np.inf))
