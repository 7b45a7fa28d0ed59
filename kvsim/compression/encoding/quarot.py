"""QuaRot's KV cache: Hadamard rotation, then integers per token in groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.grouped import token_group_bytes
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.compression.encoding.tensor_codec import StoredTensor, TensorCodec
from kvsim.numerics.clipped import quantise_groups
from kvsim.numerics.hadamard import is_power_of_two, rotate
from kvsim.ops import Component, OpCall, fast_hadamard
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, TensorName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


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
        return token_group_bytes(head_dim, self.bits, self.group_size)

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
        odd = next((dim for dim in sorted(dims) if dim and not is_power_of_two(dim)), None)
        if refused or odd is None:
            return refused
        return f"quarot rotates heads by a Hadamard matrix, which needs a power of two; {model.name} has {odd} channels"

    def codec(self) -> Codec:
        return _QuaRotCodec(self)


def _turn(name: str, heads: int, group: LayerGroup, model: ModelSpec) -> OpCall:
    work = fast_hadamard(heads, group.k_head_dim, DTYPE_BITS[model.dtype] / 8)
    return OpCall(name, work, Component.COMPRESSION)


class _QuaRotCodec(TensorCodec):
    def __init__(self, encoding: QuaRot) -> None:
        self._encoding = encoding

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        encoding = self._encoding
        made = quantise_groups(rotate(vectors), encoding.bits, encoding.group_size, encoding.clip_ratio)
        return StoredTensor(rotate(made.vectors), made.payload_bits, made.metadata_bits, made.codes, 2**encoding.bits)
