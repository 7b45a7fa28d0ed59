"""The algorithms themselves: what a compression does to KV tensors, and how many bits it really takes.

Pricing (bytes per token, work) and algorithm are two views of one method; laws hold them to each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.tensors import BoolArray, FloatArray, KvTensors, LayerKv, TensorName

CodeArray: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Symbols:
    """Codes of one K or V tensor, as an entropy coder sees them.

    Attributes
    ----------
    tensor : {'key', 'value'}
    codes : (H, n, D) of int32
        From 0 to ``levels - 1``; what lies in one channel of one head has one distribution, more or less.
    levels : int
    """

    tensor: TensorName
    codes: CodeArray
    levels: int


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """What one layer's cache became.

    Attributes
    ----------
    keys : (H, n, D)
        As attention sees them once they are read back.
    values : (H, n, Dv)
    payload_bits, metadata_bits : float
        Bits that were really written: codes; scales, zero points, norms, outliers.
    symbols : tuple of Symbols
        The codes, where an entropy coder may follow.
    is_evicted : (H, n) or None
        Tokens that the encoding gave no bits at all, which no query may see; None: it keeps all.
    """

    keys: FloatArray
    values: FloatArray
    payload_bits: float
    metadata_bits: float = 0.0
    symbols: tuple[Symbols, ...] = ()
    is_evicted: BoolArray | None = None


class Codec(ABC):
    """An encoding as code that runs. It stores all tokens that it is given; residual windows are the caller's."""

    needs_calibration: bool = False
    """Whether `fit` must see other sequences of the model first."""

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Learn from sample caches of the same model (never those that are measured); give a fitted codec."""
        return self

    @abstractmethod
    def store(self, kv: KvTensors) -> tuple[StoredLayer, ...]:
        """Store and read back a cache, one StoredLayer per layer."""


class LayerCodec(Codec):
    """A codec that takes each layer by itself."""

    def store(self, kv: KvTensors) -> tuple[StoredLayer, ...]:
        """Store and read back a cache layer by layer."""
        return tuple(self.store_layer(layer, index, kv) for index, layer in enumerate(kv.layers))

    @abstractmethod
    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        """Store and read back one layer; ``kv`` is the cache that it is the ``index``-th layer of."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A cache with fewer dimensions or layers.

    Attributes
    ----------
    kv : KvTensors
        What is to be stored, without queries where its width is not the model's. A layer that stores nothing has 0
        channels.
    restore : callable
        From ``kv`` as it is read back to a cache of the full shape.
    metadata_bits : tuple of float
        Per layer, beside the stored K and V: per-token metadata and what is held once per sequence.
    """

    kv: KvTensors
    restore: Callable[[KvTensors], KvTensors]
    metadata_bits: tuple[float, ...]


class ReductionCodec(ABC):
    """A reduction as code that runs."""

    needs_calibration: bool = False

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Learn from sample caches of the same model; give a fitted codec."""
        return self

    def sources(self, num_layers: int) -> tuple[int, ...]:
        """Layer whose cache each layer reads instead of its own: itself, unless layers share a cache."""
        return tuple(range(num_layers))

    @abstractmethod
    def reduce(self, kv: KvTensors) -> Reduced:
        """Reduce a cache."""


class NoReductionCodec(ReductionCodec):
    """Leaves a cache as it is."""

    def reduce(self, kv: KvTensors) -> Reduced:
        """Give the cache itself."""
        return Reduced(kv, lambda stored: stored, (0.0,) * kv.num_layers)


class Coder(ABC):
    """An entropy coder as code that runs."""

    FLAG_BITS = 8.0
    """Of the byte that says whether a tensor's codes are coded or lie at their fixed width."""

    def coded_bits(self, symbols: Symbols) -> float:
        """Code the symbols, decode them again, and give the bits that they took, tables included.

        Codes that would grow stay at their fixed width, which a flag per tensor says.

        Raises
        ------
        RuntimeError
            What came back differs: a bug.
        """
        if not symbols.codes.size:
            return 0.0
        return self.FLAG_BITS + min(self.code(symbols), fixed_width_bits(symbols))

    @abstractmethod
    def code(self, symbols: Symbols) -> float:
        """Code at least one symbol and decode it again; bits as the coder made them, whatever they are."""

    @staticmethod
    def check_equal(coded: CodeArray, decoded: CodeArray) -> None:
        """Raise RuntimeError where decoding gave other codes than were coded."""
        if not np.array_equal(coded, decoded):
            msg = "an entropy coder gave back other codes than it was given"
            raise RuntimeError(msg)


def fixed_width_bits(symbols: Symbols) -> float:
    """Bits of codes at the width that their number of levels needs."""
    return float(symbols.codes.size * math.ceil(math.log2(symbols.levels)))


class FixedWidth(Coder):
    """Codes at their fixed width, without a flag."""

    def coded_bits(self, symbols: Symbols) -> float:
        """Bits of fixed-width codes."""
        return fixed_width_bits(symbols)

    def code(self, symbols: Symbols) -> float:
        """Bits of fixed-width codes."""
        return fixed_width_bits(symbols)


def with_stored(kv: KvTensors, stored: Sequence[StoredLayer]) -> KvTensors:
    """Put what was read back in place of a cache's K and V, and hide what was evicted."""
    layers = []
    for layer, new in zip(kv.layers, stored, strict=True):
        read_back = replace(layer, keys=new.keys, values=new.values)
        layers.append(read_back if new.is_evicted is None else read_back.hidden_where(new.is_evicted))
    return replace(kv, layers=tuple(layers))
