"""xKV on tensors: the keys and values of a group of layers in one basis of their own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvsim.compression.codec import Reduced, ReductionCodec
from kvsim.compression.reduction.projection_codec import layer_shape
from kvsim.errors import InvalidSpec
from kvsim.numerics.svd import Projection, randomised_projection, stored_as
from kvsim.tensors import FloatArray, KvTensors, LayerKv, Rope
from kvsim.tensors.layout import bare_keys, by_head, by_token, turned_keys

if TYPE_CHECKING:
    from kvsim.compression.reduction.xkv import Xkv


@dataclass(frozen=True, eq=False)
class XkvCodec(ReductionCodec):
    """The first layer of each group holds the coordinates; the others hold their part of the bases."""

    method: Xkv

    def reduce(self, kv: KvTensors) -> Reduced:
        """Decompose each group of layers.

        Raises
        ------
        InvalidSpec
            Layers differ in shape or in the tokens that they hold.
        """
        _check_layers_agree(kv)
        size = self.method.layer_group_size
        spans = [range(start, min(start + size, kv.num_layers)) for start in range(0, kv.num_layers, size)]
        bare = kv.without_queries()
        bases, layers = [], []
        metadata: list[float] = []
        for span in spans:
            together = [bare.layers[index] for index in span]
            pair = self._bases(together, kv)
            bases.append(pair)
            layers += _coordinates(together, pair, kv)
            per_layer = sum(basis.up.size for basis in pair) / len(span)
            metadata += [per_layer * kv.native_bits] * len(span)

        def restore(stored: KvTensors) -> KvTensors:
            rebuilt: list[LayerKv] = []
            for span, pair in zip(spans, bases, strict=True):
                old = [kv.layers[index] for index in span]
                rebuilt += _rebuilt(old, stored.layers[span[0]], pair, kv.rope)
            return replace(kv, layers=tuple(rebuilt))

        return Reduced(replace(bare, layers=tuple(layers), rope=None), restore, tuple(metadata))

    def _bases(self, together: Sequence[LayerKv], kv: KvTensors) -> tuple[Projection, Projection]:
        method, group = self.method.of_layers(len(together)), layer_shape(together[0])
        sides = (_key_rows(together, kv.rope), _side_by_side([layer.values for layer in together]))
        ranks = (method.key_rank(group), method.value_rank(group))
        keys, values = (
            randomised_projection(rows, rank, method.power_iterations) for rows, rank in zip(sides, ranks, strict=True)
        )
        if method.hadamard:
            keys, values = keys.turned(), values.turned()
        return keys.stored(kv.native_bits), values.stored(kv.native_bits)


def _check_layers_agree(kv: KvTensors) -> None:
    first = kv.layers[0]
    for index, layer in enumerate(kv.layers):
        if layer.keys.shape != first.keys.shape or layer.values.shape != first.values.shape:
            shapes = f"{layer.keys.shape}, {layer.values.shape} and {first.keys.shape}, {first.values.shape}"
            msg = f"xkv puts layers side by side, but layers {index} and 0 hold {shapes}"
            raise InvalidSpec(msg)
        if not np.array_equal(layer.positions, first.positions):
            msg = f"xkv puts layers side by side, but layers {index} and 0 hold different tokens"
            raise InvalidSpec(msg)


def _side_by_side(vectors: Sequence[FloatArray]) -> FloatArray:
    return np.concatenate([by_token(one) for one in vectors], axis=1)


def _key_rows(together: Sequence[LayerKv], rope: Rope | None) -> FloatArray:
    return _side_by_side([bare_keys(layer, rope) for layer in together])


def _coordinates(together: Sequence[LayerKv], pair: tuple[Projection, Projection], kv: KvTensors) -> list[LayerKv]:
    sides = (_key_rows(together, kv.rope), _side_by_side([layer.values for layer in together]))
    keys, values = (
        stored_as(basis.reduce(rows), kv.native_bits)[None] for basis, rows in zip(pair, sides, strict=True)
    )
    positions = together[0].positions[:1]
    held = replace(together[0], keys=keys, values=values, positions=positions)
    return [held] + [replace(held, keys=keys[..., :0], values=values[..., :0])] * (len(together) - 1)


def _rebuilt(
    old: Sequence[LayerKv], stored: LayerKv, pair: tuple[Projection, Projection], rope: Rope | None
) -> list[LayerKv]:
    keys, values = (
        np.split(basis.restore(coordinates[0]), len(old), axis=1)
        for basis, coordinates in zip(pair, (stored.keys, stored.values), strict=True)
    )
    layers = []
    for layer, key_rows, value_rows in zip(old, keys, values, strict=True):
        heads = layer.num_kv_heads
        bare = by_head(key_rows, heads)
        keys_again = turned_keys(bare, layer.positions, rope)
        layers.append(replace(layer, keys=keys_again, values=by_head(value_rows, heads)))
    return layers
