"""Layers that read another layer's cache and hold none of their own: CLA (trained) and KVSharer (found afterwards)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from kvsim.compression.base import LayerView
from kvsim.compression.codec import Reduced, ReductionCodec
from kvsim.compression.reduction.base import Reduction
from kvsim.compression.reduction.none import NoReduction
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, KvTensors, LayerKv

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class SharedLayers(Reduction):
    """A method in which some layers hold no cache; every layer still reads a whole one."""

    family: ClassVar = "cross-layer"

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        return group

    @property
    def residual_share(self) -> float:
        return self.resident_share

    @property
    def joins_layers(self) -> bool:
        return True

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.shares_kv for group in model.groups):
            return f"{self.kind} lets layers share a cache, and layers of {model.name} do so already"
        return None


class CrossLayerAttention(SharedLayers):
    """One layer of every ``sharing_factor`` makes keys and values, and the ones after it attend to them (2405.12981).

    An architecture: keys and values must be trained to serve several layers, so no algorithm turns a plain model into
    one. A plain model's size is kept for weights; CLA also leaves out K and V projections, which is not credited.
    """

    names: ClassVar = {"cla-2": {"sharing_factor": 2}, "cla-3": {"sharing_factor": 3}}
    summaries: ClassVar = {
        "cla-2": "two adjacent layers share one cache; must be trained so; CLA, arXiv 2405.12981",
        "cla-3": "three adjacent layers share one cache; must be trained so; CLA, arXiv 2405.12981",
    }
    family: ClassVar = "architecture"

    kind: Literal["cla"] = "cla"
    sharing_factor: Annotated[int, Field(ge=2)]
    """Layers per cache."""

    def stored_with(self, layer: LayerView) -> tuple[int, ...]:
        layers = layer.group.layers
        start = layers.index(layer.index) // self.sharing_factor * self.sharing_factor
        return layers[start : start + self.sharing_factor]

    def at_layer(self, layer: LayerView) -> Reduction:
        is_holder = layer.index == self.stored_with(layer)[0]
        return NoReduction() if is_holder else _ReadingLayer.model_validate(self.model_dump())

    @property
    def resident_share(self) -> float:
        return 1.0 / self.sharing_factor

    def codec(self) -> ReductionCodec:
        name = f"cla-{self.sharing_factor}"
        reason = "layers that share keys and values must be trained to do so (arXiv 2405.12981); only its cost is known"
        raise NotRunnable(name, reason)


class _ReadingLayer(CrossLayerAttention):
    """A layer that attends to the cache of one before it."""

    @property
    def resident_share(self) -> float:
        return 0.0


class KvSharer(SharedLayers):
    """Layers near the output read the cache of an unlike layer nearer the input (arXiv 2410.18517).

    The paper's: pairs of layers are ranked by the Euclidean distance of their caches, averaged over calibration
    sequences, and the most *dissimilar* share first, which keeps the model better than sharing similar ones; the layer
    nearer the output is replaced. Not done here: the paper tries each replacement on the model and takes it back where
    the last hidden state turns away too far (cosine below 0.5); tensors without the model cannot show that.

    Which layers share is known only after calibration, so each is priced as the mean of all; work to encode new
    tokens is charged in all layers, an upper bound.
    """

    names: ClassVar = {"kvsharer": {}}
    aliases: ClassVar = {"kv_sharer": "kvsharer"}
    summaries: ClassVar = {
        "kvsharer": "30 % of the layers read the cache of a dissimilar earlier layer; KVSharer, arXiv 2410.18517"
    }
    inline_fields: ClassVar = ("sharing_fraction",)

    kind: Literal["kvsharer"] = "kvsharer"
    sharing_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.3
    """Share of layers without a cache of their own."""

    def sharing_layers(self, num_layers: int) -> int:
        """Layers of a group that hold no cache."""
        return min(round(self.sharing_fraction * num_layers), num_layers // 2)

    @property
    def resident_share(self) -> float:
        return 1.0 - self.sharing_fraction

    @property
    def prices_mean_layer(self) -> bool:
        return True

    def at_layer(self, layer: LayerView) -> Reduction:
        count = layer.group.num_layers
        held = (count - self.sharing_layers(count)) / count
        return _MeanLayer.model_validate({**self.model_dump(), "held_share": held})

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """``kvsharer:0.25`` is a sharing_fraction."""
        return {"sharing_fraction": text}

    def inline_text(self) -> str | None:
        return str(self.sharing_fraction)

    def codec(self) -> ReductionCodec:
        return _KvSharerCodec(self)


class _MeanLayer(KvSharer):
    """The mean layer of a group: a whole number of its layers hold a cache."""

    held_share: Annotated[float, Field(exclude=True)]

    @property
    def resident_share(self) -> float:
        return self.held_share


class _KvSharerCodec(ReductionCodec):
    needs_calibration = True

    def __init__(self, method: KvSharer, source_of: dict[int, int] | None = None) -> None:
        self._method = method
        self._source_of = source_of

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Find which layer reads which, from the distances of the mean caches."""
        if not samples:
            msg = "kvsharer finds the layers that share on calibration sequences: give at least one beside the measured"
            raise InvalidSpec(msg)
        distances = layer_distances(samples)
        count = self._method.sharing_layers(samples[0].num_layers)
        return type(self)(self._method, most_dissimilar_sources(distances, count))

    def sources(self, num_layers: int) -> tuple[int, ...]:
        """Layer that each layer reads; raise RuntimeError before `fit`."""
        if self._source_of is None:
            msg = "a kvsharer codec must be fitted first"
            raise RuntimeError(msg)
        return tuple(self._source_of.get(index, index) for index in range(num_layers))

    def reduce(self, kv: KvTensors) -> Reduced:
        """Leave out layers that read another one's cache."""
        sources = self.sources(kv.num_layers)

        def restore(stored: KvTensors) -> KvTensors:
            layers = (
                replace(layer, keys=stored.layers[source].keys, values=stored.layers[source].values)
                for layer, source in zip(kv.layers, sources, strict=True)
            )
            return replace(kv, layers=tuple(layers))

        layers = tuple(
            layer if index == source else layer.emptied()
            for index, (layer, source) in enumerate(zip(kv.layers, sources, strict=True))
        )
        return Reduced(replace(kv, layers=layers), restore, (0.0,) * kv.num_layers)


def layer_distances(samples: Sequence[KvTensors]) -> FloatArray:
    """Euclidean distance between layers' caches, averaged over samples cut to the shortest, (L, L)."""
    tokens = min(layer.num_tokens for sample in samples for layer in sample.layers)
    count = samples[0].num_layers
    means = [_mean_cache([sample.layers[index] for sample in samples], tokens) for index in range(count)]
    distances = np.zeros((count, count), dtype=np.float32)
    for one, other in combinations(range(count), 2):
        distances[one, other] = distances[other, one] = np.linalg.norm(means[one] - means[other])
    return distances


def _mean_cache(layers: Sequence[LayerKv], tokens: int) -> FloatArray:
    """K and V of one layer in one row, the mean over sequences."""
    total: FloatArray = np.zeros(layers[0].num_kv_heads * tokens * _channels(layers[0]), dtype=np.float32)
    for layer in layers:
        total += np.concatenate((layer.keys[:, :tokens].ravel(), layer.values[:, :tokens].ravel())) / len(layers)
    return total


def _channels(layer: LayerKv) -> int:
    return int(layer.keys.shape[2] + layer.values.shape[2])


def most_dissimilar_sources(distances: FloatArray, count: int) -> dict[int, int]:
    """Map ``count`` layers to the ones that they read: the farthest pairs first, the later reads the earlier.

    A layer that is read keeps its cache. Up to half of the layers can always be placed: the first one is never
    replaced, so that it can serve any layer that nothing reads.
    """
    source_of: dict[int, int] = {}
    pairs = sorted(combinations(range(len(distances)), 2), key=lambda pair: (-distances[pair], pair))
    for source, reader in pairs:
        if len(source_of) == count:
            break
        if source in source_of or reader in source_of or reader in source_of.values():
            continue
        source_of[reader] = source
    return source_of
