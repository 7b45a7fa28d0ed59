"""TurboQuant as vLLM ships it: rotated Lloyd-Max keys, uniform values."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, sqrt
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple

import numpy as np

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec, LayerCodec, StoredLayer, Symbols
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.numerics.arrays import CodeArray
from kvsim.numerics.floats import decode_float, encode_float, round_fp16
from kvsim.numerics.hadamard import is_power_of_two, rotate
from kvsim.numerics.lloyd_max import lloyd_max
from kvsim.numerics.turboquant import lengths, over
from kvsim.numerics.uniform import Quantised
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, KvTensors, LayerKv

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

Preset = Literal["turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"]


class _Bits(NamedTuple):
    key: int
    value: int


_BITS: Final[dict[Preset, _Bits]] = {
    "turboquant_k8v4": _Bits(8, 4),
    "turboquant_4bit_nc": _Bits(4, 4),
    "turboquant_k3v4_nc": _Bits(3, 4),
    "turboquant_3bit_nc": _Bits(3, 3),
}
_FP8_KEY_BITS: Final = 8
_SMALLEST_SCALE: Final = np.float32(1e-8)
"""Step of a vector whose elements are all equal."""


class TurboQuant(PerHeadEncoding):
    """One of vLLM's four TurboQuant presets (PR 38479; algorithm: arXiv 2504.19874, without QJL).

    Per head and token: key ceil(D·b/8) + 2 B norm (fp8 keys: D), value ceil(D·b/8) + 4 B scale and zero, the sum
    rounded up to even. Keys are rotated by a Hadamard matrix as a GEMM, so the query is rotated in each step;
    values are quantised uniformly as they are, so the output needs no turning back. fp8 keys are not rotated.
    The first two and last two layers stay native, except on models that mix attention with linear layers.
    """

    names: ClassVar = {preset: {"preset": preset} for preset in _BITS}
    summaries: ClassVar = {
        "turboquant_k8v4": "fp8 keys, 4-bit values; vLLM PR 38479, after TurboQuant, arXiv 2504.19874",
        "turboquant_4bit_nc": "rotated 4-bit keys, 4-bit values; vLLM PR 38479, after TurboQuant, arXiv 2504.19874",
        "turboquant_k3v4_nc": "rotated 3-bit keys, 4-bit values; vLLM PR 38479, after TurboQuant, arXiv 2504.19874",
        "turboquant_3bit_nc": "rotated 3-bit keys, 3-bit values; vLLM PR 38479, after TurboQuant, arXiv 2504.19874",
    }

    family: ClassVar = "rotation"

    kind: Literal["turboquant"] = "turboquant"
    preset: Preset

    @property
    def _rotates_keys(self) -> bool:
        return _BITS[self.preset].key != _FP8_KEY_BITS

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(ceil(head_dim * _BITS[self.preset].key / 8)), 2.0 if self._rotates_keys else 0.0)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(ceil(head_dim * _BITS[self.preset].value / 8)), 4.0)

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        plain = super().bytes_per_token(group, native)
        heads = group.num_kv_heads
        padding = heads * ((plain.total_bytes / heads) % 2) if plain.total_bytes else 0.0
        return KvBytes(plain.payload_bytes, plain.metadata_bytes + padding)

    @property
    def skips_boundary_layers(self) -> int:
        return 2

    @property
    def unpack_family(self) -> str | None:
        return self.preset.removesuffix("_nc")

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        quantize = tuple(super().append_ops(group, model))
        if not self._rotates_keys or not quantize:
            return quantize
        return (self._rotation("rotate_keys", group.num_kv_heads, group, model), *quantize)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if not self._rotates_keys or group.num_kv_heads == 0:
            return ()
        return (self._rotation("rotate_query", model.num_attention_heads, group, model),)

    def _rotation(self, name: str, heads: int, group: LayerGroup, model: ModelSpec) -> OpCall:
        dim = group.k_head_dim
        return OpCall(name, project_rows(heads, dim, dim, DTYPE_BITS[model.dtype] / 8), Component.COMPRESSION)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if self._rotates_keys:
            for group in model.kv_groups:
                if group.k_head_dim and not group.is_latent and not is_power_of_two(group.k_head_dim):
                    return (
                        f"{self.preset} rotates keys by a Hadamard matrix, which needs a power of two, but "
                        f"{model.name} has head_dim {group.k_head_dim}; turboquant_k8v4 does not rotate"
                    )
        return super().check(model, device)

    def codec(self) -> Codec:
        return _PresetCodec(_BITS[self.preset], corrects_norm=self.preset.endswith("_nc"))


class _PresetCodec(LayerCodec):
    """vLLM's kernels step by step: Sylvester's matrix without signs, N(0, 1) levels, uniform values."""

    def __init__(self, bits: _Bits, *, corrects_norm: bool) -> None:
        self._bits = bits
        self._corrects_norm = corrects_norm

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        key_codes, keys = self._keys(layer.keys)
        values = _uniform(layer.values, self._bits.value)
        count = layer.num_kv_heads * layer.num_tokens
        key_bytes = ceil(layer.keys.shape[2] * self._bits.key / 8)
        value_bytes = ceil(layer.values.shape[2] * self._bits.value / 8)
        metadata_bytes = 4 + (0 if self._is_fp8 else 2)
        padding = (key_bytes + value_bytes + metadata_bytes) % 2
        return StoredLayer(
            keys,
            values.read_back(),
            payload_bits=8.0 * count * (key_bytes + value_bytes),
            metadata_bits=8.0 * count * (metadata_bytes + padding),
            symbols=(
                Symbols("key", key_codes, 2**self._bits.key),
                Symbols("value", values.codes, 2**self._bits.value),
            ),
        )

    @property
    def _is_fp8(self) -> bool:
        return self._bits.key == _FP8_KEY_BITS

    def _keys(self, keys: FloatArray) -> tuple[CodeArray, FloatArray]:
        """Codes, and keys as read back."""
        if self._is_fp8:
            stored = encode_float(keys, "e4m3")
            return stored.astype(np.int32), decode_float(stored, "e4m3")
        norm = lengths(keys)
        unit = np.float32(sqrt(keys.shape[2]))
        codebook = lloyd_max(self._bits.key)
        codes = codebook.quantise(over(rotate(keys) * unit, norm))
        levels = codebook.read_back(codes)
        length = lengths(levels) if self._corrects_norm else unit
        return codes, rotate(levels * (round_fp16(norm) / length))


def _uniform(values: FloatArray, bits: int) -> Quantised:
    """Quantise each vector over its range; scale and zero point become fp16 only when they are stored."""
    low = values.min(axis=-1, keepdims=True)
    largest = np.float32(2**bits - 1)
    scale = np.maximum((values.max(axis=-1, keepdims=True) - low) / largest, _SMALLEST_SCALE)
    codes = np.clip(np.floor((values - low) / scale + np.float32(0.5)), 0, largest)
    return Quantised(codes.astype(np.int32), round_fp16(scale), round_fp16(low))
