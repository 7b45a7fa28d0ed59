"""4-bit floating point with a scale per block of elements: NVFP4 and MXFP4."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsim.compression.base import KvBytes
from kvsim.compression.encoding.per_vector import PerVectorEncoding
from kvsim.specs.model import LayerKind

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


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


class MxFp4(BlockFp4):
    """MXFP4 (OCP microscaling): blocks of 32 with an E8M0 scale, 68 B per vector of 128."""

    block_elements: ClassVar[int] = 32
    names: ClassVar = {"mxfp4": {}}
    summaries: ClassVar = {"mxfp4": "4-bit float, E8M0 scale per 32 elements; OCP Microscaling formats v1.0"}

    family: ClassVar = "quantisation"

    kind: Literal["mxfp4"] = "mxfp4"
