"""CacheGen as code that runs; see `kvsim.compression.encoding.cachegen` for what is the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias

import numpy as np

from kvsim.compression.codec import LayerCodec, StoredLayer
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import CodeArray, DoubleArray
from kvsim.numerics.entropy import count_rows
from kvsim.numerics.floats import round_fp16
from kvsim.numerics.stream_coders import range_bits_under
from kvsim.tensors import TENSORS, FloatArray, KvTensors, LayerKv, TensorName
from kvsim.tensors.layout import by_head, by_token

LawKey: TypeAlias = tuple[int, TensorName, Literal["anchor", "delta"]]

ANCHOR_BINS: Final = 256
SCALE_BITS: Final = 16
BELIEF: Final = 8.0
"""Samples' worth of belief in the law of all channels when a channel's own is learned."""


@dataclass(frozen=True, eq=False)
class _Coded:
    """One tensor as anchors and deltas, each (tokens, channels) of codes, and as it is read back."""

    anchors: CodeArray
    deltas: CodeArray
    read_back: FloatArray


class CacheGenCodec(LayerCodec):
    """Learns the laws of codes per layer and channel from samples, and codes other sequences under them."""

    needs_calibration = True

    def __init__(self, group_tokens: int, laws: dict[LawKey, DoubleArray] | None = None) -> None:
        self._group_tokens = group_tokens
        self._laws = laws

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Count the codes of samples, channel by channel; raise InvalidSpec without samples."""
        if not samples:
            msg = "cachegen learns the laws of its codes offline and needs sample sequences of the model; give some"
            raise InvalidSpec(msg)
        laws: dict[LawKey, DoubleArray] = {}
        for index in range(samples[0].num_layers):
            for tensor in TENSORS:
                coded = [self._quantise(one.layers[index], index, tensor, one) for one in samples]
                laws[index, tensor, "anchor"] = _law([one.anchors for one in coded], ANCHOR_BINS)
                bins = delta_bins(index, samples[0].num_layers, tensor)
                laws[index, tensor, "delta"] = _law([one.deltas for one in coded], bins)
        return type(self)(self._group_tokens, laws)

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        """Quantise and code one layer under the laws of its channels."""
        if self._laws is None:
            msg = "cachegen must be fitted to sample sequences before it stores"
            raise InvalidSpec(msg)
        read_back: dict[TensorName, FloatArray] = {}
        bits = 0.0
        for tensor in TENSORS:
            coded = self._quantise(layer, index, tensor, kv)
            bits += range_bits_under(_by_channel(coded.anchors), self._laws[index, tensor, "anchor"])
            bits += range_bits_under(_by_channel(coded.deltas), self._laws[index, tensor, "delta"])
            read_back[tensor] = by_head(coded.read_back, layer.num_kv_heads)
        scales = 2.0 * SCALE_BITS * layer.num_tokens
        return StoredLayer(read_back["key"], read_back["value"], payload_bits=bits, metadata_bits=scales)

    def _quantise(self, layer: LayerKv, index: int, tensor: TensorName, kv: KvTensors) -> _Coded:
        """Turn K or V of a layer into codes: anchors by themselves, the others relative to their decoded anchor."""
        rows = by_token(layer.tensor(tensor))
        is_anchor = np.arange(len(rows)) % self._group_tokens == 0
        anchors, decoded = _vector_quantise(rows[is_anchor], ANCHOR_BINS)
        base = decoded[np.arange(len(rows)) // self._group_tokens]
        deltas, changes = _vector_quantise((rows - base)[~is_anchor], delta_bins(index, kv.num_layers, tensor))
        read_back = base.copy()
        read_back[~is_anchor] += changes
        return _Coded(anchors, deltas, read_back)


def delta_bins(index: int, num_layers: int, tensor: TensorName) -> int:
    """Levels of a layer's deltas: LMCache's table for 32 layers, scaled to others."""
    fine = 10 if tensor == "key" else 2
    return 32 if index * 32 < fine * num_layers else 16


def _vector_quantise(rows: FloatArray, bins: int) -> tuple[CodeArray, FloatArray]:
    """Round each row to ``bins - 1`` levels between plus and minus its largest magnitude; the scale is fp16."""
    largest = bins // 2 - 1
    peak = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    scale = round_fp16(peak / largest)
    safe = np.where(scale > 0, scale, 1.0)
    codes = np.clip(np.rint(rows / safe), -largest, largest) * (scale > 0)
    return (codes + largest).astype(np.int32), (codes * scale).astype(np.float32)


def _law(codes: Sequence[CodeArray], bins: int) -> DoubleArray:
    """Probability of each code in each channel, (channels, bins), all above 0."""
    counts = count_rows(_by_channel(np.concatenate(codes)), bins).astype(np.float64)
    shared = counts.sum(axis=0) + 0.5
    smoothed = counts + BELIEF * shared / shared.sum()
    return np.asarray(smoothed / smoothed.sum(axis=1, keepdims=True), dtype=np.float64)


def _by_channel(codes: CodeArray) -> CodeArray:
    return np.ascontiguousarray(codes.T)
