"""4-bit floating point with a scale per block of elements: NVFP4 and MXFP4."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Self

import numpy as np

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.per_vector import PerVectorEncoding
from kvsim.compression.encoding.tensor_codec import (
    StoredTensor,
    TensorCodec,
    codes_out_of_blocks,
    in_blocks,
    largest_magnitudes,
    out_of_blocks,
)
from kvsim.numerics.floats import LARGEST, LEVELS, decode_float, encode_float, round_float
from kvsim.numerics.uniform import largest_magnitude, reciprocal
from kvsim.specs.model import LayerKind
from kvsim.tensors import FloatArray, KvTensors, TensorName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


E2M1_MAX_EXPONENT: Final = 2
"""Of the largest E2M1 value, 6 = 1.5 * 2^2."""


class BlockFp4(PerVectorEncoding):
    """E2M1 elements in blocks that share a one-byte scale."""

    block_elements: ClassVar[int]

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return KvBytes(float(ceil(head_dim / 2)), float(ceil(head_dim / self.block_elements)))

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return self.key_vector_bytes(head_dim)

    @property
    def unpack_family(self) -> str | None:
        return self.kind

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.kind is LayerKind.INDEXED for group in model.kv_groups):
            return (
                f"the layout of {self.kind} for sparse attention ({model.name}) is not published; fp8 has one "
                "(fp8_ds_mla)"
            )
        return None


class NvFp4(BlockFp4):
    """NVFP4: blocks of 16 with an E4M3 scale, 72 B per vector of 128.

    The fp32 scale per tensor is a constant of the model and not part of the cache. Engines with a native path ask for
    Blackwell; elsewhere the elements are unpacked in software, which the unpack prior prices.
    """

    block_elements: ClassVar[int] = 16
    names: ClassVar = {"nvfp4": {}}
    summaries: ClassVar = {"nvfp4": "4-bit float, E4M3 scale per 16 elements; NVIDIA blog 2025-12-08, vLLM nvfp4"}

    family: ClassVar = "quantisation"

    kind: Literal["nvfp4"] = "nvfp4"

    def codec(self) -> Codec:
        return _NvFp4Codec()


class MxFp4(BlockFp4):
    """MXFP4 (OCP microscaling): blocks of 32 with an E8M0 scale, 68 B per vector of 128."""

    block_elements: ClassVar[int] = 32
    names: ClassVar = {"mxfp4": {}}
    summaries: ClassVar = {"mxfp4": "4-bit float, E8M0 scale per 32 elements; OCP Microscaling formats v1.0"}

    family: ClassVar = "quantisation"

    kind: Literal["mxfp4"] = "mxfp4"

    def codec(self) -> Codec:
        return _MxFp4Codec()


class _BlockFp4Codec(TensorCodec):
    """Scales each block so that its largest element lies near the largest E2M1 value, 6, and rounds to nearest."""

    block_elements: ClassVar[int]

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        dim = vectors.shape[-1]
        blocks = in_blocks(vectors, self.block_elements)
        scale = self.scales(largest_magnitude(blocks), tensor, layer)
        codes = encode_float(blocks * reciprocal(scale), "e2m1")
        num_vectors = vectors.size // dim
        return StoredTensor(
            vectors=out_of_blocks(decode_float(codes, "e2m1") * scale, dim),
            payload_bits=8.0 * ceil(dim / 2) * num_vectors,
            metadata_bits=8.0 * scale.size,
            codes=codes_out_of_blocks(codes.astype(np.int32), dim),
            levels=LEVELS["e2m1"],
        )

    @abstractmethod
    def scales(self, largest: FloatArray, tensor: TensorName, layer: int) -> FloatArray:
        """Give what the stored one-byte scales stand for, of blocks with these largest magnitudes."""


@dataclass(frozen=True, eq=False)
class _NvFp4Codec(_BlockFp4Codec):
    """Scales are E4M3 numbers times an fp32 scale per tensor, which takes the largest calibration magnitude to 6 * 448.

    Unfitted, or without a sample, that scale is 1, as engines take it for a checkpoint without scales.
    """

    block_elements = NvFp4.block_elements
    needs_calibration = True
    magnitudes: tuple[dict[TensorName, FloatArray], ...] = ()

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Take the scales per tensor from sample caches."""
        return replace(self, magnitudes=largest_magnitudes(samples, "nvfp4")) if samples else self

    def scales(self, largest: FloatArray, tensor: TensorName, layer: int) -> FloatArray:
        shared = self._tensor_scale(tensor, layer)
        factor = np.float32(1.0 / (LARGEST["e2m1"] * float(shared)))
        return round_float(largest * factor, "e4m3") * shared

    def _tensor_scale(self, tensor: TensorName, layer: int) -> np.float32:
        largest = float(self.magnitudes[layer][tensor].item()) if self.magnitudes else 0.0
        return np.float32(largest / (LARGEST["e2m1"] * LARGEST["e4m3"]) if largest else 1.0)


class _MxFp4Codec(_BlockFp4Codec):
    """Scales are powers of two: the exponent of the largest magnitude less 2 (OCP Microscaling v1.0, section 6.3).

    So elements above 6 times the scale saturate: those within a quarter of the next power of two.
    """

    block_elements = MxFp4.block_elements

    def scales(self, largest: FloatArray, tensor: TensorName, layer: int) -> FloatArray:
        biased_exponent = (np.ascontiguousarray(largest).view(np.uint32) >> np.uint32(23)).astype(np.int64)
        stored = np.clip(biased_exponent - E2M1_MAX_EXPONENT, 1, 254).astype(np.uint32)
        return (stored << np.uint32(23)).view(np.float32)
