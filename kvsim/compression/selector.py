"""The algorithms of token selections: what a selection leaves of a whole cache.

Pricing (tokens kept and read, work) and algorithm are two views of one method; laws hold them to each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from kvsim.compression.base import LayerView
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.tensors import KvTensors, LayerKv

if TYPE_CHECKING:
    from kvsim.compression.selection.base import TokenSelection


class Selector(ABC):
    """A selection as code that runs on the cache of a prompt."""

    needs_calibration: bool = False
    """Whether `fit` must see other sequences of the model first."""

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Learn from sample caches of the same model (never those that are measured); give a fitted selector."""
        return self

    @abstractmethod
    def select(self, kv: KvTensors) -> KvTensors:
        """Give what is left of a cache: fewer tokens, merged ones, or ones with log-weights.

        Positions of an entry are those of a token of the cache that it stands for, ascending per head.

        Raises
        ------
        InvalidSpec
            The method needs queries or signals that the cache has not.
        """

    def select_layers(self, kv: KvTensors, indices: Sequence[int]) -> tuple[LayerKv, ...]:
        """Give what is left of some layers when all are selected from."""
        layers = self.select(kv).layers
        return tuple(layers[index] for index in indices)


class KeepByLayer(Selector):
    """Asks a selection, layer by layer, which tokens stay."""

    def __init__(self, selection: TokenSelection) -> None:
        self.selection = selection

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays."""
        return replace(kv, layers=self.select_layers(kv, range(kv.num_layers)))

    def select_layers(self, kv: KvTensors, indices: Sequence[int]) -> tuple[LayerKv, ...]:
        """Ask for these layers only."""
        layers = []
        for index in indices:
            kept, layer = self.selection.keep(kv, layer_view(kv, index)), kv.layers[index]
            layers.append(layer if kept is None else layer.take(kept))
        return tuple(layers)


def layer_view(kv: KvTensors, index: int) -> LayerView:
    """Give the layer as pricing sees it."""
    layer = kv.layers[index]
    group = LayerGroup(
        kind=LayerKind.FULL,
        layers=tuple(range(kv.num_layers)),
        num_kv_heads=layer.num_kv_heads,
        k_head_dim=layer.keys.shape[2],
        v_head_dim=layer.values.shape[2],
    )
    return LayerView(index, kv.num_layers, group)
