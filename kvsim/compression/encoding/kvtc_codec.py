"""kvtc as code that runs; see `kvsim.compression.encoding.kvtc` for what is the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Self, TypeAlias

import numpy as np

from kvsim.compression.codec import Codec, StoredLayer
from kvsim.compression.encoding.kvtc_transform import Table, Transform, coded_bits, make_transform
from kvsim.compression.query_moments import grouped_query_moments
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.tensors import FloatArray, KvTensors, LayerKv

Objective: TypeAlias = Literal["kv", "kq"]

ROWS_PER_COLUMN: Final = 4
"""Calibration rows that a column of a basis needs; fewer, and it fits the rows and not the model."""
QUERY_RIDGE: Final = 0.01
"""Weight of directions that no calibration query reads, against the mean one."""


class KvtcCodec(Codec):
    """Learns bases and bits for runs of layers from samples, and codes other sequences with them."""

    needs_calibration = True

    def __init__(
        self,
        target_ratio: int,
        sink_tokens: int,
        recent_tokens: int,
        objective: Objective = "kv",
        runs: tuple[tuple[range, Transform, Transform], ...] = (),
    ) -> None:
        self._target_ratio = target_ratio
        self._objective: Objective = objective
        self._native = (sink_tokens, recent_tokens)
        self._runs = runs

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Find the bases of keys and of values for each run of layers.

        Raises
        ------
        InvalidSpec
            There are no samples, or none with queries where errors are measured in logits.
        """
        if not samples:
            msg = "kvtc learns its bases offline and needs sample sequences of the model; give some"
            raise InvalidSpec(msg)
        cut = [self._middle(sample) for sample in samples]
        budget = samples[0].native_bits / self._target_ratio
        runs = []
        for run in _runs(cut):
            keys, values = (np.concatenate([_rows(kv, run, is_key) for kv in cut]) for is_key in (True, False))
            weights = logit_weights(cut, run) if self._objective == "kq" else None
            runs.append((run, make_transform(keys, budget, weights), make_transform(values, budget)))
        return type(self)(self._target_ratio, *self._native, self._objective, tuple(runs))

    def _middle(self, kv: KvTensors) -> KvTensors:
        """Leave out sinks and newest tokens, which are not coded, of a sample long enough to spare the latter."""
        sinks, recent = self._native
        layers = []
        for layer in kv.layers:
            end = layer.num_tokens - recent if layer.num_tokens > 2 * (sinks + recent) else layer.num_tokens
            layers.append(_cut(layer, slice(min(sinks, end - 1), end)))
        return _with_layers(kv, layers)

    def store(self, kv: KvTensors) -> tuple[StoredLayer, ...]:
        """Code runs of layers, sinks apart; a run's bits are shared equally among its layers."""
        if not self._runs:
            msg = "kvtc must be fitted to sample sequences before it stores"
            raise InvalidSpec(msg)
        sinks = [_cut(layer, slice(0, self._native[0])) for layer in kv.layers]
        kv = _with_layers(kv, [_cut(layer, slice(self._native[0], None)) for layer in kv.layers])
        stored: list[StoredLayer] = []
        for run, *transforms in self._runs:
            bits, read_back = np.zeros(2), []
            for is_key, transform in zip((True, False), transforms, strict=True):
                rows = _rows(kv, run, is_key)
                coded = transform.encode(rows)
                bits += coded_bits(coded, transform.groups)
                read_back.append(_split(transform.decode(coded, len(rows)), kv, run, is_key))
            payload, metadata = (float(one) / len(run) for one in bits)
            stored += [StoredLayer(keys, values, payload, metadata) for keys, values in zip(*read_back, strict=True)]
        return tuple(_with_sinks(one, head, kv.native_bits) for one, head in zip(stored, sinks, strict=True))


def logit_weights(samples: Sequence[KvTensors], run: range) -> Table:
    """Weights of errors of keys before RoPE, (C, C): a squared error in logits is ``e' weights e``, over all queries.

    Second moments of the queries that read each head, turned back by spread key positions. Heads meet no other head's
    queries, so the weights are block-diagonal.

    Raises
    ------
    InvalidSpec
        A sample holds no queries.
    """
    blocks = [grouped_query_moments(samples, index, 1, pre_rope=True)[0] for index in run]
    weights: Table = np.zeros((sum(map(len, blocks)),) * 2)
    start = 0
    for block in blocks:
        part = slice(start, start + len(block))
        weights[part, part], start = block, part.stop
    weights += float(QUERY_RIDGE * np.trace(weights) / len(weights)) * np.eye(len(weights))
    return weights


def _runs(samples: Sequence[KvTensors]) -> list[range]:
    """Neighbouring layers that share a basis: as many as the samples have rows for."""
    layers = samples[0].layers
    rows = sum(min(layer.num_tokens for layer in sample.layers) for sample in samples)
    widest = max(layer.num_kv_heads * max(layer.keys.shape[2], layer.values.shape[2]) for layer in layers)
    length = max(1, min(len(layers), rows // (ROWS_PER_COLUMN * max(1, widest))))
    return [range(start, min(start + length, len(layers))) for start in range(0, len(layers), length)]


def _rows(kv: KvTensors, run: range, is_key: bool) -> FloatArray:
    """All layers and heads of a token side by side, keys without their rotation."""
    tokens = {kv.layers[index].num_tokens for index in run}
    if len(tokens) > 1:
        method, reason = "kvtc", f"layers that share a basis must hold the same number of tokens, not {sorted(tokens)}"
        raise NotRunnable(method, reason)
    parts = []
    for index in run:
        layer = kv.layers[index]
        array = layer.values
        if is_key:
            array = layer.keys if kv.rope is None else kv.rope.undo(layer.keys, layer.positions)
        parts.append(array.transpose(1, 0, 2).reshape(layer.num_tokens, -1))
    return np.concatenate(parts, axis=1)


def _split(rows: FloatArray, kv: KvTensors, run: range, is_key: bool) -> list[FloatArray]:
    """Invert `_rows`."""
    found, start = [], 0
    for index in run:
        layer = kv.layers[index]
        dim = (layer.keys if is_key else layer.values).shape[2]
        end = start + layer.num_kv_heads * dim
        array = rows[:, start:end].reshape(len(rows), layer.num_kv_heads, dim).transpose(1, 0, 2)
        if is_key and kv.rope is not None:
            array = kv.rope.rotate(array, layer.positions)
        found.append(np.ascontiguousarray(array, dtype=np.float32))
        start = end
    return found


def _with_sinks(coded: StoredLayer, sinks: LayerKv, native_bits: int) -> StoredLayer:
    """Put the native tokens before the coded ones."""
    return StoredLayer(
        keys=np.concatenate((sinks.keys, coded.keys), axis=1),
        values=np.concatenate((sinks.values, coded.values), axis=1),
        payload_bits=coded.payload_bits + float(native_bits * (sinks.keys.size + sinks.values.size)),
        metadata_bits=coded.metadata_bits,
    )


def _cut(layer: LayerKv, span: slice) -> LayerKv:
    return LayerKv(
        keys=layer.keys[:, span],
        values=layer.values[:, span],
        positions=layer.positions[:, span],
        queries=layer.queries,
        prompt_queries=layer.prompt_queries,
    )


def _with_layers(kv: KvTensors, layers: Sequence[LayerKv]) -> KvTensors:
    return KvTensors(tuple(layers), kv.rope, kv.attention_scale, kv.source, kv.native_bits)
