"""What codecs share that store K and V apart, each by the same kind of code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsim.compression.codec import LayerCodec, StoredLayer, Symbols
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import CodeArray
from kvsim.tensors import FloatArray, KvTensors, LayerKv, TensorName


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """What K or V of one layer became.

    Attributes
    ----------
    vectors : (H, n, D)
        As read back.
    payload_bits, metadata_bits : float
    codes : (H, n, D) of int32, or None
        From 0 to ``levels - 1``; None where numbers are stored as they are.
    levels : int
    """

    vectors: FloatArray
    payload_bits: float
    metadata_bits: float = 0.0
    codes: CodeArray | None = None
    levels: int = 0


class TensorCodec(LayerCodec):
    """A codec that stores K and V of a layer apart. A tensor without channels (V of a latent cache) takes no bits."""

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        """Store and read back K and V."""
        key = self._stored(layer.keys, "key", index)
        value = self._stored(layer.values, "value", index)
        return StoredLayer(
            keys=key.vectors,
            values=value.vectors,
            payload_bits=key.payload_bits + value.payload_bits,
            metadata_bits=key.metadata_bits + value.metadata_bits,
            symbols=_symbols({"key": key, "value": value}),
        )

    def _stored(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        return self.store_tensor(vectors, tensor, layer) if vectors.size else StoredTensor(vectors, 0.0)

    @abstractmethod
    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        """Store and read back K or V, (H, n, D) with at least one element, of the ``layer``-th layer."""


def _symbols(stored: dict[TensorName, StoredTensor]) -> tuple[Symbols, ...]:
    """Give the codes of both tensors, or none at all: a coder's bits stand for the whole payload."""
    held = {tensor: one for tensor, one in stored.items() if one.vectors.size}
    if any(one.codes is None for one in held.values()):
        return ()
    return tuple(Symbols(tensor, one.codes, one.levels) for tensor, one in held.items() if one.codes is not None)


def in_blocks(vectors: FloatArray, size: int) -> FloatArray:
    """Cut the last axis, (..., D), into (..., ceil(D / size), size); the last element fills up the last block."""
    missing = -vectors.shape[-1] % size
    padded = np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)], mode="edge") if missing else vectors
    return padded.reshape(*vectors.shape[:-1], -1, size)


def out_of_blocks(blocks: FloatArray, dim: int) -> FloatArray:
    """Invert `in_blocks`."""
    return blocks.reshape(*blocks.shape[:-2], -1)[..., :dim]


def codes_out_of_blocks(codes: CodeArray, dim: int) -> CodeArray:
    """Give the codes of real elements."""
    return codes.reshape(*codes.shape[:-2], -1)[..., :dim]


def largest_magnitudes(
    samples: Sequence[KvTensors], needed_by: str, *, per_head: bool = False
) -> tuple[dict[TensorName, FloatArray], ...]:
    """Per layer the largest magnitudes of K and of V over sample caches, (H, 1, 1) or (1, 1, 1).

    Raises
    ------
    InvalidSpec
        There is no sample.
    """
    if not samples:
        msg = f"{needed_by} takes its scales from calibration caches, and none is given; it needs at least one"
        raise InvalidSpec(msg)
    return tuple(
        {
            "key": _largest([sample.layers[index].keys for sample in samples], per_head=per_head),
            "value": _largest([sample.layers[index].values for sample in samples], per_head=per_head),
        }
        for index in range(samples[0].num_layers)
    )


def _largest(tensors: Sequence[FloatArray], *, per_head: bool) -> FloatArray:
    axes = (1, 2) if per_head else (0, 1, 2)
    found = [np.abs(tensor).max(axis=axes, keepdims=True, initial=0.0) for tensor in tensors]
    largest: FloatArray = np.maximum.reduce(found)
    return largest
