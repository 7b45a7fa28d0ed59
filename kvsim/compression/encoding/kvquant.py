"""KVQuant: non-uniform codes of keys per channel and values per token, outliers kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec, StoredLayer, Symbols
from kvsim.compression.encoding.before_rope import BeforeRopeEncoding
from kvsim.compression.encoding.sinks import SinkCodec, select_tokens
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import CodeArray
from kvsim.numerics.floats import round_fp16
from kvsim.numerics.kmeans import kmeans_levels
from kvsim.numerics.ranking import mark_largest
from kvsim.numerics.uniform import pack_codes, reciprocal
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import BoolArray, FloatArray, KvTensors, LayerKv
from kvsim.tensors.layout import bare_keys, by_head, by_token, turned_keys

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec

_OUTLIER_BYTES = 4.0
"""An fp16 number and the 16-bit index of its channel among all heads' channels."""
_POINTER_BYTES = 4.0
"""Where a token's outlying keys begin; it may have many or none. Values have a fixed number each."""
_RANGE_BYTES = 4.0
"""A token's fp16 scale and fp16 offset."""
_LARGEST_SAMPLE = 1 << 18
"""Numbers that k-means sees at most, evenly spaced in the calibration data."""


class KvQuant(BeforeRopeEncoding):
    """nuq codes with sparse outliers (arXiv 2401.18079; read from its abstract, reference notes and released code).

    Theirs: keys before RoPE, over a range per channel that is calibrated offline (the 0.5 and 99.5 % quantiles) and so
    costs no bytes; values over the range of each token of all heads, fp16 scale and offset; one codebook of ``2**b``
    levels per layer for K and one for V, by k-means over calibration data; 1 % of the numbers as fp16 with a 16-bit
    index and a 32-bit pointer per token, of keys those outside their channel's range, of values the largest and
    smallest of each token; the first token native.

    Ours: k-means is not weighted by Fisher information, for which gradients are needed; Q-Norm for 2 bits is left out;
    of a cache's keys exactly 1 % are kept apart, those farthest out by their channels' ranges, where theirs depend on
    the data. A cap per token, as in their later code, would clip keys unlike all others. The number of a token's
    values is fixed, so they need no pointer. The dense code of an outlier stays and is not read, as in theirs.
    """

    names: ClassVar = {"kvquant-4": {"bits": 4}, "kvquant-3": {"bits": 3}, "kvquant-2": {"bits": 2}}
    aliases: ClassVar = {
        "kvquant": "kvquant-3",
        "nuq4-1%": "kvquant-4",
        "nuq3-1%": "kvquant-3",
        "nuq2-1%": "kvquant-2",
    }
    summaries: ClassVar = {
        f"kvquant-{bits}": f"nuq{bits}-1%: k-means codes, keys per channel before RoPE, 1 % outliers; arXiv 2401.18079"
        for bits in (4, 3, 2)
    }

    family: ClassVar = "quantisation"

    kind: Literal["kvquant"] = "kvquant"
    bits: Literal[2, 3, 4]
    outlier_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.01
    """Share of a token's keys (on average) and of its values that are kept apart, rounded up to a whole number."""
    num_sinks: NonNegativeInt = 1
    """First tokens, which stay in the model's dtype."""

    def outliers(self, channels: int) -> int:
        """Numbers kept apart of one token's K or V over all heads."""
        return ceil(round(self.outlier_share * channels, 9))

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(ceil(head_dim * self.bits / 8)))

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return self.key_vector_bytes(head_dim)

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        plain = super().bytes_per_token(group, native)
        if not plain.total_bytes:
            return plain
        kept = sum(self.outliers(group.num_kv_heads * dim) for dim in (group.k_head_dim, group.v_head_dim))
        return KvBytes(plain.payload_bytes, _OUTLIER_BYTES * kept + _POINTER_BYTES + _RANGE_BYTES)

    @property
    def sink_tokens(self) -> int:
        return self.num_sinks

    @property
    def unpack_family(self) -> str | None:
        return f"kvquant_{self.bits}"

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        return self.rope_flops_per_token(group)

    def codec(self) -> Codec:
        return _KvQuantCodec(self)


@dataclass(frozen=True, eq=False)
class _Learnt:
    """What calibration says of one layer: key ranges per head and channel, (H, 1, D), and both codebooks."""

    key_offset: FloatArray
    key_reach: FloatArray
    key_levels: FloatArray
    value_levels: FloatArray


class _KvQuantCodec(SinkCodec):
    needs_calibration = True

    def __init__(self, encoding: KvQuant, learnt: tuple[_Learnt, ...] = ()) -> None:
        self._encoding = encoding
        self._learnt = learnt

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        if not samples:
            msg = "kvquant calibrates its codebooks and key ranges: give caches of other sequences, not none"
            raise InvalidSpec(msg)
        return type(self)(self._encoding, tuple(self._learn(index, samples) for index in range(samples[0].num_layers)))

    def _learn(self, index: int, samples: Sequence[KvTensors]) -> _Learnt:
        layers = [(select_tokens(one.layers[index], ~self.sinks(one.layers[index])), one) for one in samples]
        keys = np.concatenate([bare_keys(layer, kv.rope) for layer, kv in layers], axis=1)
        cut = self._encoding.outlier_share / 2
        low, high = np.quantile(keys, [cut, 1.0 - cut], axis=1, keepdims=True).astype(np.float32)
        offset, reach = round_fp16((high + low) / 2), round_fp16((high - low) / 2)
        spread = (keys - offset) * reciprocal(reach)
        values = [self._scaled_values(by_token(layer.values)) for layer, _ in layers]
        return _Learnt(
            offset,
            reach,
            key_levels=self._levels(spread[np.abs(spread) <= 1.0]),
            value_levels=self._levels(np.concatenate([one.scaled[~one.outliers] for one in values])),
        )

    def _levels(self, numbers: FloatArray) -> FloatArray:
        stride = max(1, numbers.size // _LARGEST_SAMPLE)
        return round_fp16(kmeans_levels(numbers.reshape(-1)[::stride], 2**self._encoding.bits).astype(np.float32))

    def sinks(self, layer: LayerKv) -> BoolArray:
        """Mark the first tokens, (n,)."""
        return np.arange(layer.num_tokens) < self._encoding.num_sinks

    def store_coded(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        if not self._learnt:
            msg = "kvquant must be fitted to calibration caches before it stores one"
            raise InvalidSpec(msg)
        learnt = self._learnt[index]
        keys = self._store_keys(bare_keys(layer, kv.rope), learnt)
        values = self._store_values(layer.values, learnt)
        levels = 2**self._encoding.bits
        return StoredLayer(
            turned_keys(keys.vectors, layer.positions, kv.rope),
            values.vectors,
            payload_bits=8.0 * sum(pack_codes(part.codes, self._encoding.bits).size for part in (keys, values)),
            metadata_bits=keys.metadata_bits + values.metadata_bits,
            symbols=(Symbols("key", keys.codes, levels), Symbols("value", values.codes, levels)),
        )

    def _store_keys(self, keys: FloatArray, learnt: _Learnt) -> _Stored:
        spread = (keys - learnt.key_offset) * reciprocal(learnt.key_reach)
        heads, tokens, dim = keys.shape
        budget = tokens * self._encoding.outliers(heads * dim)
        mask = mark_largest(np.abs(spread).reshape(1, -1), budget).reshape(keys.shape)
        codes = _nearest(spread, learnt.key_levels)
        dense = learnt.key_levels[codes] * learnt.key_reach + learnt.key_offset
        vectors = np.where(mask, round_fp16(keys), dense)
        return _Stored(vectors, codes, 8.0 * (_OUTLIER_BYTES * np.count_nonzero(mask) + _POINTER_BYTES * tokens))

    def _store_values(self, values: FloatArray, learnt: _Learnt) -> _Stored:
        rows = by_token(values)
        scaled = self._scaled_values(rows)
        codes = _nearest(scaled.scaled, learnt.value_levels)
        dense = learnt.value_levels[codes] * scaled.reach + scaled.offset
        vectors = by_head(np.where(scaled.outliers, round_fp16(rows), dense), len(values))
        metadata_bits = 8.0 * _OUTLIER_BYTES * np.count_nonzero(scaled.outliers)
        metadata_bits += 16.0 * (scaled.reach.size + scaled.offset.size)
        return _Stored(vectors, by_head(codes, len(values)), metadata_bits)

    def _scaled_values(self, rows: FloatArray) -> _ScaledValues:
        """Scale each token, (n, H·D), to -1 ... 1 without its largest and smallest numbers, which are kept apart."""
        count = self._encoding.outliers(rows.shape[1])
        outliers = mark_largest(rows, count - count // 2) | mark_largest(-rows, count // 2)
        low = np.where(outliers, np.inf, rows).min(axis=1, keepdims=True).astype(np.float32)
        high = np.where(outliers, -np.inf, rows).max(axis=1, keepdims=True).astype(np.float32)
        offset, reach = round_fp16((high + low) / 2), round_fp16((high - low) / 2)
        return _ScaledValues((rows - offset) * reciprocal(reach), outliers, offset, reach)


@dataclass(frozen=True, eq=False)
class _Stored:
    """K or V of all heads: as read back and as codes, (H, n, D), and the bits beside the codes."""

    vectors: FloatArray
    codes: CodeArray
    metadata_bits: float


@dataclass(frozen=True, eq=False)
class _ScaledValues:
    """Tokens, (n, H·D), over their own range, (n, 1), and which numbers the range leaves out."""

    scaled: FloatArray
    outliers: BoolArray
    offset: FloatArray
    reach: FloatArray


def _nearest(numbers: FloatArray, levels: FloatArray) -> CodeArray:
    """Codes of the nearest levels, which ascend."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers, side="right").astype(np.int32)
