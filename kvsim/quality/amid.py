"""Caches that stand for layers from the middle of a deeper model, as ensembles do.

Some formats leave a model's first and last layers native (vLLM's TurboQuant: two at either end). An ensemble has few
layers, none of them special, so those formats see it with more layers at either end, and what they leave native there
counts neither as bits nor as exact: otherwise they would look exact and uncompressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from kvsim.compression import Compression
from kvsim.compression.selector import layer_view
from kvsim.quality.store import FittedStrategy, StoredCache, fit_strategy, is_exempt, store_cache
from kvsim.tensors import KvTensors

MOST_OUTER_LAYERS: Final = 4


def outer_layers(compression: Compression, kv: KvTensors) -> int:
    """Layers to add at either end so that the format exempts none of those in between; 0 if no number does that."""
    for count in range(MOST_OUTER_LAYERS + 1):
        padded = _pad(kv, count)
        inner = range(count, count + kv.num_layers)
        if not any(is_exempt(compression, layer_view(padded, index)) for index in inner):
            return count
    return 0


def fit_amid(compression: Compression, samples: Sequence[KvTensors], outer: int) -> FittedStrategy:
    """Fit as `fit_strategy` does, with ``outer`` more layers at either end; raise as it does."""
    return fit_strategy(compression, [_pad(sample, outer) for sample in samples])


def store_amid(strategy: FittedStrategy, kv: KvTensors, outer: int) -> StoredCache:
    """Store with ``outer`` more layers at either end, and give back what became of the cache's own."""
    if not outer:
        return store_cache(strategy, kv)
    stored = store_cache(strategy, _pad(kv, outer))
    own = slice(outer, outer + kv.num_layers)
    return StoredCache(replace(stored.kv, layers=stored.kv.layers[own]), stored.read_masks[own], stored.bits[own])


def exempt_note(outer: int) -> str:
    """Say what is left out of the figures of a format that exempts ``outer`` layers at either end."""
    ends = f"the first and last {outer} layers" if outer > 1 else "the first and the last layer"
    return f"{ends} of a model stay native, and are in no figure here nor in bits: an ensemble's are from the middle"


def _pad(kv: KvTensors, outer: int) -> KvTensors:
    """Repeat the first and the last layer; only their number matters."""
    return replace(kv, layers=(*kv.layers[:1] * outer, *kv.layers, *kv.layers[-1:] * outer))
