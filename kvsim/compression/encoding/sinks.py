"""What codecs share that keep some tokens, their attention sinks, out of the coded cache."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np

from kvsim.compression.codec import LayerCodec, StoredLayer
from kvsim.tensors import BoolArray, KvTensors, LayerKv


class SinkCodec(LayerCodec):
    """A codec that stores some tokens of a layer as they are, the same in every head."""

    @abstractmethod
    def sinks(self, layer: LayerKv) -> BoolArray:
        """Mark the tokens of a layer that stay native, (n,)."""

    @abstractmethod
    def store_coded(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        """Store and read back the other tokens of the ``index``-th layer."""

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        """Store the marked tokens as they are and the others coded; native bits count as metadata."""
        kept = self.sinks(layer)
        coded = self.store_coded(select_tokens(layer, ~kept), index, kv)
        keys, values = layer.keys.copy(), layer.values.copy()
        keys[:, ~kept], values[:, ~kept] = coded.keys, coded.values
        channels = layer.num_kv_heads * (layer.keys.shape[2] + layer.values.shape[2])
        native_bits = float(np.count_nonzero(kept) * channels * kv.native_bits)
        return replace(coded, keys=keys, values=values, metadata_bits=coded.metadata_bits + native_bits)


def select_tokens(layer: LayerKv, chosen: BoolArray) -> LayerKv:
    """Keep the tokens that ``chosen``, (n,), marks, in every head."""
    return replace(
        layer, keys=layer.keys[:, chosen], values=layer.values[:, chosen], positions=layer.positions[:, chosen]
    )
