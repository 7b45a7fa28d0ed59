"""kvtc as code that runs; see `kvsim.compression.encoding.kvtc` for what is the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.compression.codec import CodeArray, Codec, StoredLayer
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.numerics.bit_allocation import allocate_bits
from kvsim.numerics.byte_coders import compressed_bits, pack, unpack
from kvsim.tensors import FloatArray, KvTensors, LayerKv

Table: TypeAlias = NDArray[np.float64]

MAX_BITS: Final = 8
ROWS_PER_COLUMN: Final = 4
"""Calibration rows that a column of a basis needs; fewer, and it fits the rows and not the model."""
SEARCHED_ROWS: Final = 512
"""Calibration rows on which quantisers are compared."""
CLIPS: Final = (0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.6, 4.3, 5.0, 6.5, 8.5)
"""Half the range of a quantiser in standard deviations, to choose from."""


@dataclass(frozen=True, eq=False)
class Transform:
    """An orthogonal basis with a uniform quantiser per component; components without bits are dropped.

    Attributes
    ----------
    mean : (C,)
    vectors : (C, k)
        Orthonormal columns, in falling order of bits.
    steps : (k,)
    bits : (k,) of int
    """

    mean: FloatArray
    vectors: FloatArray
    steps: FloatArray
    bits: NDArray[np.int64]

    def encode(self, rows: FloatArray) -> CodeArray:
        """Codes (n, k) of rows (n, C)."""
        levels = (1 << self.bits).astype(np.int64)
        codes = np.floor((rows - self.mean) @ self.vectors / self.steps) + levels // 2
        return np.clip(codes, 0, levels - 1).astype(np.int32)

    def decode(self, codes: CodeArray) -> FloatArray:
        """Rows that the codes stand for: the middle of each step, the mean where a component was dropped."""
        centred = (codes - (1 << self.bits) // 2 + 0.5) * self.steps
        return (centred.astype(np.float32) @ self.vectors.T + self.mean).astype(np.float32)


class KvtcCodec(Codec):
    """Learns bases and bits for runs of layers from samples, and codes other sequences with them."""

    needs_calibration = True

    def __init__(
        self,
        target_ratio: int,
        sink_tokens: int,
        recent_tokens: int,
        runs: tuple[tuple[range, Transform, Transform], ...] = (),
    ) -> None:
        self._target_ratio = target_ratio
        self._native = (sink_tokens, recent_tokens)
        self._runs = runs

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Find the bases of keys and of values for each run of layers; raise InvalidSpec without samples."""
        if not samples:
            msg = "kvtc learns its bases offline and needs sample sequences of the model; give some"
            raise InvalidSpec(msg)
        cut = [self._middle(sample) for sample in samples]
        budget = samples[0].native_bits / self._target_ratio
        runs = tuple(
            (
                run,
                *(
                    make_transform(np.concatenate([_rows(kv, run, is_key) for kv in cut]), budget)
                    for is_key in (True, False)
                ),
            )
            for run in _runs(cut)
        )
        return type(self)(self._target_ratio, *self._native, runs)  # type: ignore[arg-type]

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
            bits, read_back = 0.0, []
            for is_key, transform in zip((True, False), transforms, strict=True):
                codes = transform.encode(_rows(kv, run, is_key))
                bits += deflated_bits(codes, transform.bits)
                read_back.append(_split(transform.decode(codes), kv, run, is_key))
            stored += [
                StoredLayer(keys, values, payload_bits=bits / len(run)) for keys, values in zip(*read_back, strict=True)
            ]
        return tuple(_with_sinks(one, head, kv.native_bits) for one, head in zip(stored, sinks, strict=True))


def make_transform(rows: FloatArray, mean_bits: float) -> Transform:
    """Fit basis, quantisers and bits to sample rows, (n, C), for a budget in bits per column."""
    exact = rows.astype(np.float64)
    mean = exact.mean(axis=0)
    variances, vectors = np.linalg.eigh(np.cov(exact, rowvar=False, bias=True).reshape(len(mean), -1))
    order = np.argsort(-variances, kind="stable")
    vectors, deviations = vectors[:, order], np.sqrt(np.maximum(variances[order], 0.0))
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), SEARCHED_ROWS)).astype(np.int64)
    errors, steps = _search_steps((exact[chosen] - mean) @ vectors, deviations)
    bits = allocate_bits(errors, round(mean_bits * len(mean)))
    kept = np.flatnonzero(bits)
    kept = kept[np.argsort(-bits[kept], kind="stable")]
    return Transform(
        mean.astype(np.float32),
        np.ascontiguousarray(vectors[:, kept], dtype=np.float32),
        steps[kept, bits[kept]].astype(np.float32),
        bits[kept],
    )


def _search_steps(components: Table, deviations: Table) -> tuple[Table, Table]:
    """Least mean squared error of each component at 0 to 8 bits, (C, 9), and the step that has it."""
    # In units of a component's deviation and one component after the other, so that every quantiser is the same.
    safe = np.maximum(deviations, 1e-12)
    scaled = np.ascontiguousarray((components / safe).T, dtype=np.float32)
    errors = np.full((len(safe), MAX_BITS + 1), np.inf)
    clips = np.ones_like(errors)
    errors[:, 0] = np.mean(scaled**2, axis=1)
    for bits in range(1, MAX_BITS + 1):
        half = 1 << (bits - 1)
        for clip in CLIPS:
            step = np.float32(clip / half)
            lost = scaled / step
            lost -= np.clip(np.floor(lost), -half, half - 1) + np.float32(0.5)
            error = step**2 * np.einsum("cn,cn->c", lost, lost) / scaled.shape[1]
            better = error < errors[:, bits]
            errors[better, bits], clips[better, bits] = error[better], clip
    return errors * safe[:, None] ** 2, clips * safe[:, None] / (1 << np.arange(MAX_BITS + 1)) * 2


def deflated_bits(codes: CodeArray, bits: NDArray[np.int64]) -> float:
    """Bits of codes (n, k) through DEFLATE: one block for the components of each number of bits, packed in turn."""
    total = 0.0
    for width in np.unique(bits) if codes.size else ():
        row = np.ascontiguousarray(codes[:, bits == width].T).ravel()
        data = pack(row, 1 << int(width))
        if not np.array_equal(unpack(data, 1 << int(width), len(row)), row):
            msg = "packing gave back other codes than it was given"
            raise RuntimeError(msg)
        total += compressed_bits(data.tobytes(), "deflate")
    return total


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
