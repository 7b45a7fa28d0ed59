"""QuaRot's KV cache: Hadamard rotation, then integers per token in groups."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec, LayerCodec, StoredLayer, Symbols
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.numerics.clipped import Grouped, quantise_groups
from kvsim.numerics.hadamard import rotate
from kvsim.ops import Component, OpCall, fast_hadamard
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, KvTensors, LayerKv

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

GROUP_METADATA_BYTES = 4.0
"""An fp16 scale and an fp16 zero point."""


class QuaRot(PerHeadEncoding):
    """Asymmetric integers over Hadamard-rotated heads (arXiv 2404.00456, section 5 and its released code).

    Each group of ``group_size`` channels of one head and token has an fp16 scale and zero point, over
    ``clip_ratio`` of its range. Keys are rotated after RoPE, by a fast transform on each write, and queries in each
    step; the rotation of values is folded into the weights before and after attention and costs nothing. The paper's
    KV cache has 4 bits; 3 and 2 are from its ablation. Only the cache is modelled: the weights and activations that
    QuaRot also quantises are not.
    """

    names: ClassVar = {"quarot-4": {"bits": 4}, "quarot-3": {"bits": 3}, "quarot-2": {"bits": 2}}
    aliases: ClassVar = {"quarot": "quarot-4"}
    summaries: ClassVar = {
        f"quarot-{bits}": f"Hadamard-rotated {bits}-bit integers in groups of 128 channels; QuaRot, arXiv 2404.00456"
        for bits in (4, 3, 2)
    }

    family: ClassVar = "rotation"

    kind: Literal["quarot"] = "quarot"
    bits: Literal[2, 3, 4]
    group_size: PositiveInt = 128
    """Channels that share a scale and zero point; never more than a head has."""
    clip_ratio: Annotated[float, Field(gt=0, le=1)] = 0.95

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        groups = ceil(head_dim / self.group_size)
        return KvBytes(float(ceil(head_dim * self.bits / 8)), GROUP_METADATA_BYTES * groups)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return self.key_vector_bytes(head_dim)

    @property
    def unpack_family(self) -> str | None:
        return f"quarot_{self.bits}"

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        quantize = tuple(super().append_ops(group, model))
        return (_turn("rotate_keys", group.num_kv_heads, group, model), *quantize) if quantize else ()

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.num_kv_heads == 0:
            return ()
        return (_turn("rotate_query", model.num_attention_heads, group, model),)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        refused = super().check(model, device)
        dims = {dim for group in model.kv_groups for dim in (group.k_head_dim, group.v_head_dim)}
        odd = next((dim for dim in sorted(dims) if dim & (dim - 1)), None)
        if refused or odd is None:
            return refused
        return f"quarot rotates heads by a Hadamard matrix, which needs a power of two; {model.name} has {odd} channels"

    def codec(self) -> Codec:
        return _QuaRotCodec(self)


def _turn(name: str, heads: int, group: LayerGroup, model: ModelSpec) -> OpCall:
    work = fast_hadamard(heads, group.k_head_dim, DTYPE_BITS[model.dtype] / 8)
    return OpCall(name, work, Component.COMPRESSION)


class _QuaRotCodec(LayerCodec):
    def __init__(self, encoding: QuaRot) -> None:
        self._encoding = encoding

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        keys, values = self._store(layer.keys), self._store(layer.values)
        levels = 2**self._encoding.bits
        return StoredLayer(
            rotate(keys.vectors),
            rotate(values.vectors),
            payload_bits=keys.payload_bits + values.payload_bits,
            metadata_bits=keys.metadata_bits + values.metadata_bits,
            symbols=(Symbols("key", keys.codes, levels), Symbols("value", values.codes, levels)),
        )

    def _store(self, vectors: FloatArray) -> Grouped:
        encoding = self._encoding
        return quantise_groups(rotate(vectors), encoding.bits, encoding.group_size, encoding.clip_ratio)
