"""K and V of groups of heads as coordinates in calibrated bases: the algorithm of Palu, KQ-SVD and EigenAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from kvsim.compression.codec import Reduced, ReductionCodec
from kvsim.errors import InvalidSpec
from kvsim.numerics.svd import Projection, stored_as
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.tensors import FloatArray, KvTensors, LayerKv, Rope
from kvsim.tensors.layout import bare_keys, turned_keys


@dataclass(frozen=True, eq=False)
class LayerBasis:
    """Bases of one layer, one per group of heads: (heads * head_dim) channels to coordinates."""

    keys: tuple[Projection, ...]
    values: tuple[Projection, ...]

    def turned(self) -> LayerBasis:
        """Bases with coordinates turned by Hadamard matrices."""
        return LayerBasis(tuple(one.turned() for one in self.keys), tuple(one.turned() for one in self.values))

    def stored(self, bits: int) -> LayerBasis:
        """Bases as weights of ``bits`` per element hold them."""
        keys, values = (tuple(one.stored(bits) for one in side) for side in (self.keys, self.values))
        return LayerBasis(keys, values)


Learn: TypeAlias = Callable[[Sequence[KvTensors], int], LayerBasis]
"""Find the bases of one layer, by its index, from calibration caches."""


@dataclass(frozen=True, eq=False)
class ProjectionCodec(ReductionCodec):
    """Projects rows of channels, one row per token and group of heads.

    Where heads hold different tokens (head-wise eviction) the i-th kept tokens of a group's heads share a row; the
    basis was learned on rows of one token each, so that costs accuracy unless each head has its own basis.

    Attributes
    ----------
    kind : str
        Whose algorithm it is, for messages.
    learn : callable
        Finds the bases of one layer.
    pre_rope : bool
        Whether keys are projected before RoPE.
    layers : tuple of LayerBasis
        What was learned; empty before `fit`.
    """

    kind: str
    learn: Learn
    pre_rope: bool
    layers: tuple[LayerBasis, ...] = ()
    needs_calibration = True

    def fit(self, samples: Sequence[KvTensors]) -> ProjectionCodec:
        """Learn a basis per layer and group of heads.

        Raises
        ------
        InvalidSpec
            No samples, or samples of different models.
        """
        shapes = {tuple(layer.keys.shape[::2] + layer.values.shape[::2] for layer in one.layers) for one in samples}
        if len(shapes) != 1:
            why = "there are none" if not shapes else "these differ in layers, heads or head_dim"
            msg = f"{self.kind} learns its bases from caches of other sequences of the same model; {why}"
            raise InvalidSpec(msg)
        count = samples[0].num_layers
        bits = samples[0].native_bits
        return replace(self, layers=tuple(self.learn(samples, index).stored(bits) for index in range(count)))

    def reduce(self, kv: KvTensors) -> Reduced:
        """Project all layers.

        Raises
        ------
        InvalidSpec
            Before `fit`, or for a cache of another shape.
        """
        if len(self.layers) != kv.num_layers:
            known = f"{self.kind} has bases for {len(self.layers)} layers"
            msg = f"{known}, but the cache has {kv.num_layers}; fit it on caches of this model first"
            raise InvalidSpec(msg)
        rope = kv.rope if self.pre_rope else None
        bare = kv.without_queries()
        layers = tuple(
            _project(layer, basis, rope, kv.native_bits) for layer, basis in zip(bare.layers, self.layers, strict=True)
        )

        def restore(stored: KvTensors) -> KvTensors:
            triples = zip(kv.layers, stored.layers, self.layers, strict=True)
            return replace(kv, layers=tuple(_rebuild(old, new, basis, rope) for old, new, basis in triples))

        # RoPE turns channels; coordinates have none of them.
        return Reduced(replace(bare, layers=layers, rope=None), restore, (0.0,) * kv.num_layers)


def layer_shape(layer: LayerKv) -> LayerGroup:
    """Give the shape of a layer as pricing sees it."""
    heads, _, dim = layer.keys.shape
    return LayerGroup(
        kind=LayerKind.FULL, layers=(0,), num_kv_heads=heads, k_head_dim=dim, v_head_dim=layer.values.shape[2]
    )


def rows_of(vectors: FloatArray, groups: int) -> FloatArray:
    """Put the channels of each group's heads side by side: (H, n, D) to (groups, n, H / groups * D)."""
    heads, tokens, dim = vectors.shape
    split = vectors.reshape(groups, heads // groups, tokens, dim)
    return split.transpose(0, 2, 1, 3).reshape(groups, tokens, heads // groups * dim)


def heads_of(rows: FloatArray, heads: int) -> FloatArray:
    """Invert `rows_of`."""
    groups, tokens, width = rows.shape
    split = rows.reshape(groups, tokens, heads // groups, width * groups // heads)
    return split.transpose(0, 2, 1, 3).reshape(heads, tokens, width * groups // heads)


def _project(layer: LayerKv, basis: LayerBasis, rope: Rope | None, bits: int) -> LayerKv:
    groups = len(basis.keys)
    return replace(
        layer,
        keys=_coordinates(rows_of(bare_keys(layer, rope), groups), basis.keys, bits),
        values=_coordinates(rows_of(layer.values, groups), basis.values, bits),
        positions=layer.positions[:: layer.num_kv_heads // groups],
    )


def _coordinates(rows: FloatArray, bases: Sequence[Projection], bits: int) -> FloatArray:
    return stored_as(np.stack([basis.reduce(one) for basis, one in zip(bases, rows, strict=True)]), bits)


def _rebuild(old: LayerKv, new: LayerKv, basis: LayerBasis, rope: Rope | None) -> LayerKv:
    keys, values = (
        heads_of(np.stack([one.restore(rows) for one, rows in zip(bases, coordinates, strict=True)]), old.num_kv_heads)
        for bases, coordinates in ((basis.keys, new.keys), (basis.values, new.values))
    )
    return replace(old, keys=turned_keys(keys, old.positions, rope), values=values)
