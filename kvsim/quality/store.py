"""Run a whole strategy on KV tensors: select, reduce, encode, code, and give back what attention then sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvsim.compression import Compression
from kvsim.compression.base import LayerView
from kvsim.compression.codec import Codec, ReductionCodec, StoredLayer, with_stored
from kvsim.compression.encoding.native import Native
from kvsim.compression.selector import Selector, layer_view
from kvsim.compression.stacked import StackedEncoding
from kvsim.specs.base import Dtype
from kvsim.tensors import BoolArray, KvTensors, LayerKv


@dataclass(frozen=True, eq=False)
class StoredCache:
    """What a strategy made of a cache.

    Attributes
    ----------
    kv : KvTensors
        The kept tokens as they are read back, with the same queries.
    read_masks : tuple
        Per layer which kept tokens each query reads, (Hq, m, n), or None for all.
    bits : tuple of float
        Per layer, everything that is stored for this sequence.
    """

    kv: KvTensors
    read_masks: tuple[BoolArray | None, ...]
    bits: tuple[float, ...]

    @property
    def total_bits(self) -> float:
        """All layers together."""
        return sum(self.bits)


@dataclass(frozen=True, eq=False)
class FittedStrategy:
    """A strategy whose codecs have seen calibration caches."""

    compression: Compression
    selector: Selector
    reduction: ReductionCodec
    encoding: Codec


def fit_strategy(compression: Compression, samples: Sequence[KvTensors] = ()) -> FittedStrategy:
    """Fit the codecs of a strategy; raise NotRunnable where an algorithm does not run on tensors.

    ``samples`` are caches of the same model, other sequences than those to be measured. A codec that needs none is
    not shown any.
    """
    selector = compression.selection.selector()
    if selector.needs_calibration:
        selector = selector.fit(samples)
    reduction = compression.reduction.codec()
    if reduction.needs_calibration:
        reduction = reduction.fit(samples)
    encoding = compression.encoding.codec()
    if encoding.needs_calibration:
        encoding = encoding.fit([_of_layers(kv, _filled(kv)) for kv in (reduction.reduce(one).kv for one in samples)])
    return FittedStrategy(compression, selector, reduction, encoding)


def needs_calibration(compression: Compression) -> bool:
    """Whether an algorithm learns from other sequences; raise NotRunnable as `fit_strategy` does."""
    learners = (compression.selection.selector(), compression.reduction.codec(), compression.encoding.codec())
    return any(one.needs_calibration for one in learners)


def store_cache(strategy: FittedStrategy, kv: KvTensors) -> StoredCache:
    """Store a cache as the strategy does after prefill, and read it back.

    The newest ``residual_tokens`` of what is kept, and layers that the format exempts, stay native and are counted so.
    Where heads hold different numbers of tokens, they are filled up and coded; what fills them up is not counted.
    """
    kept = strategy.selector.select(kv)
    encoding = strategy.compression.encoding
    residual = [encoding.at_layer(layer_view(kept, index)).residual_tokens for index in range(kept.num_layers)]
    tokens = [max(0, layer.num_tokens - newest) for layer, newest in zip(kept.layers, residual, strict=True)]
    old = _cut(kept, [slice(0, count) for count in tokens])
    read_back, bits = _encode(strategy, old)
    sources = strategy.reduction.sources(kv.num_layers)
    selections = [strategy.compression.selection.at_layer(layer_view(kept, index)) for index in range(kv.num_layers)]
    layers, masks = [], []
    for index, (layer, coded, count) in enumerate(zip(kept.layers, read_back.layers, tokens, strict=True)):
        is_held = np.ones(layer.keys.shape[:2], dtype=bool) if selections[index].masks else layer.is_seen
        if not is_held.all():
            bits[index] = _of_held(bits[index], is_held[:, :count], _fixed_bits(strategy, kv, index))
        if sources[index] == index:
            bits[index] += _native_bits(layer, int(is_held[:, count:].sum()), kv.native_bits)
        newest = kept.layers[sources[index]]
        restored = replace(
            layer,
            keys=np.concatenate((coded.keys, newest.keys[:, count:]), axis=1),
            values=np.concatenate((coded.values, newest.values[:, count:]), axis=1),
        )
        is_evicted = np.pad(~coded.is_seen, ((0, 0), (0, layer.num_tokens - count)))
        layers.append(restored.hidden_where(is_evicted) if is_evicted.any() else restored)
        # What chooses among kept tokens was made from keys as they came, before they were stored.
        bits[index] += selections[index].index_bits(layer, layer_view(kept, index), kv.native_bits)
        masks.append(selections[index].read_mask(layer, layer_view(kept, index)))
    return StoredCache(replace(kept, layers=tuple(layers)), tuple(masks), tuple(bits))


def _encode(strategy: FittedStrategy, kv: KvTensors) -> tuple[KvTensors, list[float]]:
    """Reduce, encode and code whole layers; give what is read back, and the bits per layer."""
    compression = strategy.compression
    reduced = strategy.reduction.reduce(kv)
    coder = None if compression.coding.is_none else compression.coding.coder()
    chosen = []
    bits = list(reduced.metadata_bits)
    plain = Native().codec().store(reduced.kv)
    encoded = _encode_filled(strategy.encoding, reduced.kv, plain)
    for index in range(kv.num_layers):
        exempt = is_exempt(compression, layer_view(kv, index))
        layer = plain[index] if exempt else encoded[index]
        payload = layer.payload_bits
        if coder is not None and layer.symbols and not exempt:
            payload = sum(coder.coded_bits(symbols) for symbols in layer.symbols)
        bits[index] += payload + layer.metadata_bits
        chosen.append(layer)
    return reduced.restore(with_stored(reduced.kv, chosen)), bits


def _encode_filled(codec: Codec, kv: KvTensors, plain: Sequence[StoredLayer]) -> list[StoredLayer]:
    """Encode the layers that store something; what another layer stores for them leaves nothing to encode."""
    filled, stored = _filled(kv), list(plain)
    for index, layer in zip(filled, codec.store(_of_layers(kv, filled)), strict=True):
        stored[index] = layer
    return stored


def _filled(kv: KvTensors) -> list[int]:
    return [index for index, one in enumerate(kv.layers) if one.keys.shape[2] + one.values.shape[2]]


def _of_layers(kv: KvTensors, indices: Sequence[int]) -> KvTensors:
    return replace(kv, layers=tuple(kv.layers[index] for index in indices))


def is_exempt(compression: Compression, layer: LayerView) -> bool:
    """Whether the format keeps this layer native."""
    given = compression.encoding_at(layer)
    inner = given.encoding if isinstance(given, StackedEncoding) else given
    return not compression.encoding.at_layer(layer).is_native and inner.is_native


def _of_held(bits: float, is_held: BoolArray, fixed_bits: float) -> float:
    """Bits of the entries that are held, of those of all; what a sequence holds once is held all the same."""
    return fixed_bits + (bits - fixed_bits) * float(is_held.mean()) if is_held.size else bits


def _fixed_bits(strategy: FittedStrategy, kv: KvTensors, index: int) -> float:
    layer = layer_view(kv, index)
    native = Dtype.FP32 if kv.native_bits > 16 else Dtype.BF16
    return 8 * strategy.compression.encoding_at(layer).fixed_bytes_per_sequence(layer.group, native)


def _native_bits(layer: LayerKv, entries: int, element_bits: int) -> float:
    """Bits of so many entries of one head each."""
    channels = layer.keys.shape[2] + layer.values.shape[2]
    return float(entries * channels * element_bits)


def _cut(kv: KvTensors, spans: Sequence[slice]) -> KvTensors:
    """Take a span of each layer, as what is to be stored: no code depends on log-weights."""
    layers = tuple(
        replace(
            layer,
            keys=layer.keys[:, span],
            values=layer.values[:, span],
            positions=layer.positions[:, span],
            log_weights=None,
        )
        for layer, span in zip(kv.layers, spans, strict=True)
    )
    return replace(kv, layers=layers)
