"""Merging on tensors: some tokens stay, and what the others held goes into them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvsim.compression.base import LayerView
from kvsim.compression.selector import Selector, layer_view
from kvsim.numerics.svd import stored_as

if TYPE_CHECKING:
    from kvsim.tensors import IntArray, KvTensors, LayerKv


class MergesTokens(Protocol):
    """A selection that says which tokens stay, and what becomes of the others."""

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        """Choose the tokens that stay, (H, kept) ascending per head; None keeps all."""

    def merged(self, kv: KvTensors, layer: LayerView, kept: IntArray) -> LayerKv:
        """Give the kept tokens of ``kv.layers[layer.index]`` with what the others held."""


class MergeByLayer(Selector):
    """Asks a selection, layer by layer."""

    def __init__(self, selection: MergesTokens) -> None:
        self.selection = selection

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays, and fold the rest into it."""
        layers = []
        for index, layer in enumerate(kv.layers):
            view = layer_view(kv, index)
            kept = self.selection.keep(kv, view)
            if kept is not None:
                merged = self.selection.merged(kv, view, kept)
                layers.append(stored_natively(layer.take(kept), merged, kv.native_bits))
            else:
                layers.append(layer)
        return replace(kv, layers=tuple(layers))


def stored_natively(kept: LayerKv, merged: LayerKv, native_bits: int) -> LayerKv:
    """Round what merging changed to elements of the cache; what it left alone stays bit for bit."""
    keys, values = (
        np.where(new == old, old, stored_as(new, native_bits))
        for old, new in ((kept.keys, merged.keys), (kept.values, merged.values))
    )
    return replace(merged, keys=keys, values=values)
