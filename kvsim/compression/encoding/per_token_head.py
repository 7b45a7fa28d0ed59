"""Dynamic 8- or 4-bit quantisation with one scale per token and head."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsim.compression.base import KvBytes
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


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
