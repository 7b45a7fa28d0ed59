"""llama.cpp's cache types: ggml blocks of 32 elements, rotated first as llama.cpp does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.compression.encoding.tensor_codec import (
    StoredTensor,
    TensorCodec,
    codes_out_of_blocks,
    in_blocks,
    out_of_blocks,
)
from kvsim.numerics.floats import round_fp16
from kvsim.numerics.ggml import BITS, BLOCK, METADATA_BITS, GgmlType, quantise_blocks
from kvsim.numerics.hadamard import largest_block, rotate
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, TensorName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

CacheType = Literal["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16"]

SMALLEST_ROTATION: Final = 64
"""Block of llama.cpp's rotation of V, and the least one of K; head sizes that it does not divide are not turned."""
_HARDEST_FIRST: Final[tuple[GgmlType, ...]] = ("q5_1", "q5_0", "q4_1", "q4_0", "q8_0")
"""By the work to unpack an element: q5 takes its high bit from a second place."""


class Ggml(PerHeadEncoding):
    """llama.cpp ``--cache-type-k`` and ``--cache-type-v``, one type for each.

    A block of 32 elements: q8_0 34 B, q5_1 24 B, q5_0 22 B, q4_1 20 B, q4_0 18 B. Since PR 21038 (April 2026) llama.cpp
    turns what it quantises by a Hadamard matrix wherever 64 divides the head size: keys, and so queries, in blocks of
    the largest power of two that divides it; values, and so outputs, in blocks of 64.
    """

    names: ClassVar = {
        "q8_0": {"key_type": "q8_0", "value_type": "q8_0"},
        "q5_1": {"key_type": "q5_1", "value_type": "q5_1"},
        "q4_0": {"key_type": "q4_0", "value_type": "q4_0"},
        "q8_0/q4_0": {"key_type": "q8_0", "value_type": "q4_0"},
    }
    summaries: ClassVar = {
        "q8_0": "rotated 8-bit integer, fp16 step per 32 elements; llama.cpp -ctk q8_0 -ctv q8_0 (PR 21038)",
        "q5_1": "rotated 5-bit integer, fp16 step and minimum per 32 elements; llama.cpp -ctk q5_1 -ctv q5_1",
        "q4_0": "rotated 4-bit integer, fp16 step per 32 elements; llama.cpp -ctk q4_0 -ctv q4_0 (PR 21038)",
        "q8_0/q4_0": "8-bit keys, 4-bit values in ggml blocks; llama.cpp -ctk q8_0 -ctv q4_0",
    }

    family: ClassVar = "quantisation"

    kind: Literal["ggml"] = "ggml"
    key_type: CacheType
    value_type: CacheType
    hadamard: bool = True
    """Whether to rotate, as llama.cpp does unless LLAMA_ATTN_ROT_DISABLE is set."""

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return _vector_bytes(head_dim, self.key_type)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return _vector_bytes(head_dim, self.value_type)

    @property
    def unpack_family(self) -> str | None:
        used = next((form for form in _HARDEST_FIRST if form in (self.key_type, self.value_type)), None)
        return f"ggml_{used}" if used else None

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        quantize = tuple(super().append_ops(group, model))
        if not quantize:
            return ()
        heads = group.num_kv_heads
        keys = self._rotation("rotate_keys", "key", heads, group, model)
        return (*keys, *self._rotation("rotate_values", "value", heads, group, model), *quantize)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.num_kv_heads == 0:
            return ()
        heads = model.num_attention_heads
        query = self._rotation("rotate_query", "key", heads, group, model)
        return (*query, *self._rotation("rotate_output", "value", heads, group, model))

    def _rotation(
        self, name: str, tensor: TensorName, heads: int, group: LayerGroup, model: ModelSpec
    ) -> tuple[OpCall, ...]:
        dim, form = (group.k_head_dim, self.key_type) if tensor == "key" else (group.v_head_dim, self.value_type)
        block = rotated_block(dim, tensor)
        if not self.hadamard or form == "f16" or not dim or not block:
            return ()
        work = project_rows(heads * dim / block, block, block, DTYPE_BITS[model.dtype] / 8)
        return (OpCall(name, work, Component.COMPRESSION),)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        for group in model.kv_groups:
            for dim, form, flag in (
                (group.k_head_dim, self.key_type, "-ctk"),
                (group.v_head_dim, self.value_type, "-ctv"),
            ):
                if not group.is_latent and form != "f16" and dim % BLOCK:
                    return (
                        f"{flag} {form} stores blocks of {BLOCK} elements, which do not divide the {dim} of a head of "
                        f"{model.name}; native or fp8 can store it"
                    )
        return super().check(model, device)

    def codec(self) -> Codec:
        return _GgmlCodec(self.key_type, self.value_type, hadamard=self.hadamard)


def rotated_block(head_dim: int, tensor: TensorName) -> int:
    """Give the channels that llama.cpp turns together, or 0 where it leaves the head size alone."""
    if head_dim % SMALLEST_ROTATION:
        return 0
    return largest_block(head_dim) if tensor == "key" else SMALLEST_ROTATION


def _vector_bytes(head_dim: int, form: CacheType) -> KvBytes:
    if form == "f16":
        return KvBytes(2.0 * head_dim)
    blocks = ceil(head_dim / BLOCK)
    return KvBytes(blocks * BLOCK * BITS[form] / 8, blocks * METADATA_BITS[form] / 8)


@dataclass(frozen=True, eq=False)
class _GgmlCodec(TensorCodec):
    """Rotates, quantises block by block, reads back and turns back."""

    key_type: CacheType
    value_type: CacheType
    hadamard: bool

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        form = self.key_type if tensor == "key" else self.value_type
        if form == "f16":
            return StoredTensor(round_fp16(vectors), payload_bits=16.0 * vectors.size)
        block = rotated_block(vectors.shape[-1], tensor) if self.hadamard else 0
        stored = _store_blocks(rotate(vectors, block) if block else vectors, form)
        if not block:
            return stored
        return StoredTensor(
            rotate(stored.vectors, block), stored.payload_bits, stored.metadata_bits, stored.codes, stored.levels
        )


def _store_blocks(vectors: FloatArray, form: GgmlType) -> StoredTensor:
    dim = vectors.shape[-1]
    made = quantise_blocks(in_blocks(vectors, BLOCK), form)
    return StoredTensor(
        vectors=out_of_blocks(made.read_back(), dim),
        payload_bits=float(made.codes.size * BITS[form]),
        metadata_bits=float(made.step.size * METADATA_BITS[form]),
        codes=codes_out_of_blocks(made.codes, dim),
        levels=2 ** BITS[form],
    )
