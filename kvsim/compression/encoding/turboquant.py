"""TurboQuant as vLLM ships it: rotated Lloyd-Max keys, uniform values."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple

from kvsim.compression.base import KvBytes
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup

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
                if not group.is_latent and group.k_head_dim & (group.k_head_dim - 1):
                    return (
                        f"{self.preset} rotates keys by a Hadamard matrix, which needs a power of two, but "
                        f"{model.name} has head_dim {group.k_head_dim}; turboquant_k8v4 does not rotate"
                    )
        return super().check(model, device)
