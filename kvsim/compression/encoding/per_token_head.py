"""Dynamic 8- or 4-bit quantisation with one scale per token and head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.compression.encoding.tensor_codec import StoredTensor, TensorCodec
from kvsim.numerics.floats import LARGEST, LEVELS, decode_float, encode_float
from kvsim.numerics.hadamard import largest_block, random_signs, rotate
from kvsim.numerics.uniform import largest_magnitude, quantise_range, quantise_symmetric, reciprocal
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, TensorName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


_SMALLEST_SCALE: Final = np.float32(1e-6)
"""vLLM's floor of an fp32 scale."""
_SMALLEST_FP16_SCALE: Final = 2.0**-14
"""Smallest normal half: the floor of scales that are stored as such."""
_LARGEST_INT8: Final = 127
SIGN_SEED: Final = 40835


class PerTokenHead(PerHeadEncoding):
    """vLLM ``fp8_per_token_head``, ``int8_per_token_head`` and ``int4_per_token_head``.

    Each vector carries 4 B inline (an fp32 scale). int4 is asymmetric and rotates K and V by a Hadamard matrix
    first, so queries are rotated and outputs turned back in each step (vLLM TritonAttentionBackend).
    """

    names: ClassVar = {
        "fp8_per_token_head": {"dtype": "fp8"},
        "int8_per_token_head": {"dtype": "int8"},
        "int4_per_token_head": {"dtype": "int4"},
    }
    summaries: ClassVar = {
        "fp8_per_token_head": "8-bit float, fp32 scale per token and head; vLLM Triton attention",
        "int8_per_token_head": "8-bit integer, fp32 scale per token and head; vLLM Triton attention",
        "int4_per_token_head": "rotated 4-bit integer, 4 B of scale per token and head; vLLM Triton attention",
    }

    family: ClassVar = "quantisation"

    kind: Literal["per_token_head"] = "per_token_head"
    dtype: Literal["fp8", "int8", "int4"]

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(ceil(head_dim * DTYPE_BITS[Dtype(self.dtype)] / 8)), 4.0)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return self.key_vector_bytes(head_dim)

    @property
    def unpack_family(self) -> str | None:
        return f"{self.dtype}_per_token_head"

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        quantize = tuple(super().append_ops(group, model))
        if self.dtype != "int4" or not quantize:
            return quantize
        return (*self._rotations("rotate_kv", group.num_kv_heads, group, model), *quantize)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if self.dtype != "int4" or group.num_kv_heads == 0:
            return ()
        return self._rotations("rotate_query_and_output", model.num_attention_heads, group, model)

    def _rotations(self, name: str, heads: int, group: LayerGroup, model: ModelSpec) -> tuple[OpCall, ...]:
        element_bytes = DTYPE_BITS[model.dtype] / 8
        return tuple(
            OpCall(name, project_rows(heads, dim, dim, element_bytes), Component.COMPRESSION)
            for dim in (group.k_head_dim, group.v_head_dim)
            if dim
        )

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if self.dtype == "fp8" and not device.supports(Dtype.FP8):
            return (
                f"fp8_per_token_head runs only in Triton attention, whose fp8 needs native support "
                f"(NVIDIA from sm_89), which {device.name} lacks; int8_per_token_head has the same size"
            )
        return super().check(model, device)

    def codec(self) -> Codec:
        return _CODECS[self.dtype]()


@dataclass(frozen=True, eq=False)
class _Fp8Codec(TensorCodec):
    """E4M3 codes of a vector over its largest magnitude times 448."""

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        scale = np.maximum(largest_magnitude(vectors) / np.float32(LARGEST["e4m3"]), _SMALLEST_SCALE)
        codes = encode_float(vectors * reciprocal(scale), "e4m3")
        return StoredTensor(
            vectors=decode_float(codes, "e4m3") * scale,
            payload_bits=8.0 * vectors.size,
            metadata_bits=32.0 * scale.size,
            codes=codes.astype(np.int32),
            levels=LEVELS["e4m3"],
        )


@dataclass(frozen=True, eq=False)
class _Int8Codec(TensorCodec):
    """Symmetric codes from -127 to 127."""

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        scale = np.maximum(largest_magnitude(vectors) / np.float32(_LARGEST_INT8), _SMALLEST_SCALE)
        made = quantise_symmetric(vectors, 8, scale)
        return StoredTensor(
            vectors=made.read_back(),
            payload_bits=8.0 * vectors.size,
            metadata_bits=32.0 * scale.size,
            codes=made.codes + _LARGEST_INT8,
            levels=2 * _LARGEST_INT8 + 1,
        )


@dataclass(frozen=True, eq=False)
class _Int4Codec(TensorCodec):
    """Vectors with fixed random signs, Hadamard-rotated, over their own range, with an fp16 scale and zero point.

    The rotation is vLLM's (PR 40835), its signs are ours; where head_dim is no power of two, blocks of the largest one
    that divides it are turned (vLLM PR 56198). Scale and zero point are those of our kernels: vLLM spends its 4 B on an
    fp32 scale whose lowest mantissa bits hold an integer zero point, which cannot follow a vector whose elements all
    have one sign; after the rotation there is hardly one.
    """

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        dim = vectors.shape[-1]
        signs, block = random_signs(dim, SIGN_SEED), largest_block(dim)
        made = quantise_range(rotate(vectors * signs, block), 4, smallest_scale=_SMALLEST_FP16_SCALE)
        return StoredTensor(
            vectors=rotate(made.read_back(), block) * signs,
            payload_bits=8.0 * ceil(dim / 2) * (vectors.size // dim),
            metadata_bits=32.0 * made.scale.size,
            codes=made.codes,
            levels=16,
        )


_CODECS: Final[dict[str, type[TensorCodec]]] = {"fp8": _Fp8Codec, "int8": _Int8Codec, "int4": _Int4Codec}
