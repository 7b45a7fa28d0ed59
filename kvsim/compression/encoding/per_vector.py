"""What formats share that encode each K and each V vector of a head by itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsim.compression.base import KvBytes, KvEncoding
from kvsim.ops import Component, OpCall, quantize
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class PerVectorEncoding(KvEncoding):
    """A format whose bytes per token are a sum over heads of its key and value vectors."""

    @abstractmethod
    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        """Bytes of one key vector of ``head_dim`` elements."""

    @abstractmethod
    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        """Bytes of one value vector of ``head_dim`` elements."""

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        if group.kv_elements_per_token == 0:
            return KvBytes(0.0)
        key = self.key_vector_bytes(group.k_head_dim)
        value = self.value_vector_bytes(group.v_head_dim) if group.v_head_dim else KvBytes(0.0)
        heads = group.num_kv_heads
        return KvBytes(
            heads * (key.payload_bytes + value.payload_bytes), heads * (key.metadata_bytes + value.metadata_bytes)
        )

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        elements = group.kv_elements_per_token
        if elements == 0:
            return ()
        native_bytes = elements * DTYPE_BITS[model.dtype] / 8
        work = quantize(elements, native_bytes, self.bytes_per_token(group, model.dtype).total_bytes)
        return (OpCall("quantize_kv", work, Component.COMPRESSION),)


class PerHeadEncoding(PerVectorEncoding):
    """A per-vector format that engines run only where K and V exist per head, never on a shared latent (MLA)."""

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.is_latent for group in model.kv_groups):
            return (
                f"{self.kind} stores K and V per head, but {model.name} keeps one latent vector for all heads (MLA); "
                "native, fp8, nvfp4 and mxfp4 can store it"
            )
        return None
