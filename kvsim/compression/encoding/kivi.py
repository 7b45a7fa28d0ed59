"""KIVI: keys quantised per channel, values per token, newest tokens kept in full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.grouped import (
    channel_group_bytes,
    store_channel_groups,
    store_token_groups,
    token_group_bytes,
)
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.compression.encoding.tensor_codec import StoredTensor, TensorCodec
from kvsim.tensors import FloatArray, TensorName


class Kivi(PerHeadEncoding):
    """Asymmetric 4- or 2-bit integers in groups (arXiv 2402.02750).

    Each group of ``group_size`` elements has an fp16 scale and zero point. A key group runs over tokens of one
    channel, so a key vector bears 4 B·D/group_size of it; a value group runs over channels of one token.
    The newest ``residual_length`` tokens stay in the native dtype.
    """

    names: ClassVar = {"kivi-4": {"bits": 4}, "kivi-2": {"bits": 2}}
    summaries: ClassVar = {
        "kivi-4": "4-bit, keys per channel and values per token, newest 128 tokens native; KIVI, arXiv 2402.02750",
        "kivi-2": "2-bit, keys per channel and values per token, newest 128 tokens native; KIVI, arXiv 2402.02750",
    }

    family: ClassVar = "quantisation"

    kind: Literal["kivi"] = "kivi"
    bits: Literal[2, 4]
    group_size: PositiveInt = 32
    residual_length: PositiveInt = 128

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.residual_length % self.group_size:
            msg = f"residual_length {self.residual_length} is not a multiple of group_size {self.group_size}"
            raise ValueError(msg)
        return self

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        return channel_group_bytes(head_dim, self.bits, self.group_size)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return token_group_bytes(head_dim, self.bits, self.group_size)

    @property
    def residual_tokens(self) -> int:
        return self.residual_length

    @property
    def unpack_family(self) -> str | None:
        return f"kivi_{self.bits}"

    def codec(self) -> Codec:
        return _KiviCodec(self.bits, self.group_size)


@dataclass(frozen=True, eq=False)
class _KiviCodec(TensorCodec):
    """Keys in groups of tokens of one channel, values in groups of channels of one token."""

    bits: int
    group_size: int

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        store = store_channel_groups if tensor == "key" else store_token_groups
        return store(vectors, self.bits, self.group_size)
