"""8-bit floating point with one scale per tensor or per head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

import numpy as np
from pydantic import model_validator

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.per_vector import PerVectorEncoding
from kvsim.compression.encoding.tensor_codec import StoredTensor, TensorCodec, largest_magnitudes
from kvsim.numerics.floats import LARGEST, LEVELS, decode_float, encode_float
from kvsim.numerics.uniform import reciprocal
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.tensors import FloatArray, KvTensors, TensorName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

SPARSE_MLA_HEAD_DIM: Final = 576
SPARSE_MLA_ROPE_DIM: Final = 64
SPARSE_MLA_SCALE_GROUP: Final = 128


class Fp8(PerVectorEncoding):
    """vLLM ``fp8`` / ``fp8_e4m3`` / ``fp8_e5m2``: one byte per element.

    The fp32 scale per K and V tensor (4 B per layer), or per KV head, is a constant of the model and not part of the
    cache: 1 where nobody calibrated, else the largest calibration magnitude over the largest code (llm-compressor's
    ``tensor`` and ``attn_head`` strategies). What lies beyond saturates.
    DeepSeek sparse attention has a layout of its own, vLLM ``fp8_ds_mla``: 512 fp8 + 4 fp32 scales + 64 bf16 RoPE
    elements = 656 B per token and layer.
    """

    names: ClassVar = {
        "fp8": {"dtype": "e4m3", "scale": "unit", "granularity": "tensor"},
        "fp8_e5m2": {"dtype": "e5m2", "scale": "unit", "granularity": "tensor"},
        "fp8_per_head": {"dtype": "e4m3", "scale": "calibrated", "granularity": "head"},
    }
    aliases: ClassVar = {"fp8_e4m3": "fp8", "fp8_attn_head": "fp8_per_head"}
    summaries: ClassVar = {
        "fp8": "8-bit float E4M3, one scale per tensor; vLLM --kv-cache-dtype fp8 (vLLM blog 2026-04-22)",
        "fp8_e5m2": "8-bit float E5M2, more range and less precision; vLLM --kv-cache-dtype fp8_e5m2",
        "fp8_per_head": "8-bit float E4M3, one calibrated scale per KV head; vLLM with llm-compressor's attn_head",
    }

    family: ClassVar = "quantisation"

    kind: Literal["fp8"] = "fp8"
    dtype: Literal["e4m3", "e5m2"] = "e4m3"
    attention_compute_dtype: Literal["auto", "bf16", "fp8"] = "auto"
    """What attention multiplies in. auto: fp8 where the device computes it and the format is e4m3, else bf16."""
    scale: Literal["unit", "calibrated"] = "unit"
    """unit: 1, vLLM's default for a checkpoint without scales. calibrated: from sample caches."""
    granularity: Literal["tensor", "head"] = "tensor"
    """What shares a calibrated scale."""

    @model_validator(mode="after")
    def _heads_are_calibrated(self) -> Self:
        if self.granularity == "head" and self.scale == "unit":
            msg = "granularity head gives each head a scale of its own, which scale unit has not; use scale calibrated"
            raise ValueError(msg)
        return self

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(head_dim))

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(head_dim))

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        if group.kind is LayerKind.INDEXED and group.is_latent and not group.shares_kv:
            latent_dim = group.k_head_dim - SPARSE_MLA_ROPE_DIM
            rope_bytes = SPARSE_MLA_ROPE_DIM * DTYPE_BITS[Dtype.BF16] / 8
            return KvBytes(latent_dim + rope_bytes, 4.0 * latent_dim / SPARSE_MLA_SCALE_GROUP)
        return super().bytes_per_token(group, native)

    @property
    def unpack_family(self) -> str | None:
        return "fp8"

    def attention_dtype(self, model: ModelSpec, device: DeviceSpec) -> Dtype:
        native_path = self.dtype == "e4m3" and device.supports(Dtype.FP8)
        if self.attention_compute_dtype == "fp8" or (self.attention_compute_dtype == "auto" and native_path):
            return Dtype.FP8
        return model.dtype

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        for group in model.kv_groups:
            if group.kind is LayerKind.INDEXED and group.is_latent and group.k_head_dim != SPARSE_MLA_HEAD_DIM:
                return (
                    f"fp8 on sparse MLA has one layout (fp8_ds_mla, {SPARSE_MLA_HEAD_DIM} elements), but {model.name} "
                    f"keeps {group.k_head_dim}"
                )
        if self.attention_compute_dtype != "fp8":
            return None
        if not device.supports(Dtype.FP8):
            native = ", ".join(device.native_dtypes.value)
            return (
                f"attention_compute_dtype fp8 needs native fp8 arithmetic, which {device.name} lacks (native: "
                f"{native}); use auto or bf16 to store fp8 and compute in half precision"
            )
        if self.dtype == "e5m2":
            return "attention kernels compute in fp8 only from e4m3 (vLLM FlashAttention 3); use dtype e4m3"
        return None

    def codec(self) -> Codec:
        if self.scale == "unit":
            return _Fp8Codec(self.dtype)
        return _CalibratedFp8Codec(self.dtype, per_head=self.granularity == "head")


@dataclass(frozen=True, eq=False)
class _Fp8Codec(TensorCodec):
    """Rounds every element to the nearest code, at scale 1."""

    dtype: Literal["e4m3", "e5m2"]

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        return _stored(vectors, self.dtype, np.ones((1, 1, 1), dtype=np.float32))


@dataclass(frozen=True, eq=False)
class _CalibratedFp8Codec(TensorCodec):
    """The same with scales that take the largest calibration magnitude to the largest code."""

    needs_calibration = True
    dtype: Literal["e4m3", "e5m2"]
    per_head: bool
    magnitudes: tuple[dict[TensorName, FloatArray], ...] = ()

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Take the scales from sample caches; raise InvalidSpec without any."""
        return replace(
            self, magnitudes=largest_magnitudes(samples, "fp8 with scale calibrated", per_head=self.per_head)
        )

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        scale = self.magnitudes[layer][tensor] / np.float32(LARGEST[self.dtype])
        return _stored(vectors, self.dtype, np.where(scale > 0, scale, np.float32(1.0)))


def _stored(vectors: FloatArray, dtype: Literal["e4m3", "e5m2"], scale: FloatArray) -> StoredTensor:
    codes = encode_float(vectors * reciprocal(scale), dtype)
    return StoredTensor(
        vectors=decode_float(codes, dtype) * scale,
        payload_bits=8.0 * vectors.size,
        codes=codes.astype(np.int32),
        levels=LEVELS[dtype],
    )
