"""Unequal bits for K and V: KV-AdaQuant, later named "Quantize What Counts"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

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
from kvsim.errors import InvalidSpec
from kvsim.tensors import FloatArray, TensorName

Bits = Annotated[int, Field(ge=1, le=8)]


class KvAdaQuant(PerHeadEncoding):
    """Asymmetric integers in groups, with more bits for keys than for values (arXiv 2502.15075).

    The paper's: unequal bits, the groups of 64 and the newest 64 tokens native (defaults of its repository). Ours: each
    group is 64 channels of one token with an fp16 scale and zero point, for K as for V, because the abstract does not
    say along which axis its quantisers (Quanto, HQQ) group; ``key_groups: channel`` groups keys as KIVI does. The
    paper's choice of bits per layer by the norms of weights needs the weights and is not here.
    """

    names: ClassVar = {"kv_adaquant": {}}
    summaries: ClassVar = {
        "kv_adaquant": "unequal bits for keys and values, 4 and 2 unless set, newest 64 tokens native; arXiv 2502.15075"
    }
    inline_fields: ClassVar = ("key_bits", "value_bits")

    family: ClassVar = "quantisation"

    kind: Literal["kv_adaquant"] = "kv_adaquant"
    key_bits: Bits = 4
    value_bits: Bits = 2
    group_size: PositiveInt = 64
    residual_length: PositiveInt = 64
    key_groups: Literal["token", "channel"] = "token"
    """What a group of key elements shares: a token, or a channel."""

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        bits = text.split("/")
        if len(bits) != len(cls.inline_fields) or not all(part.strip().isdigit() for part in bits):
            msg = f"kv_adaquant takes bits of keys and of values, such as kv_adaquant:4/2 (got {text!r})"
            raise InvalidSpec(msg)
        return dict(zip(cls.inline_fields, (int(part) for part in bits), strict=True))

    def inline_text(self) -> str:
        return f"{self.key_bits}/{self.value_bits}"

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.key_groups == "channel" and self.residual_length % self.group_size:
            msg = f"residual_length {self.residual_length} is not a multiple of group_size {self.group_size}"
            raise ValueError(msg)
        return self

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        if self.key_groups == "channel":
            return channel_group_bytes(head_dim, self.key_bits, self.group_size)
        return token_group_bytes(head_dim, self.key_bits, self.group_size)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return token_group_bytes(head_dim, self.value_bits, self.group_size)

    @property
    def residual_tokens(self) -> int:
        return self.residual_length

    @property
    def unpack_family(self) -> str | None:
        return self.kind

    def codec(self) -> Codec:
        return _KvAdaQuantCodec(self.key_bits, self.value_bits, self.group_size, self.key_groups)


@dataclass(frozen=True, eq=False)
class _KvAdaQuantCodec(TensorCodec):
    """Groups of channels of one token; keys also of tokens of one channel."""

    key_bits: int
    value_bits: int
    group_size: int
    key_groups: Literal["token", "channel"]

    def store_tensor(self, vectors: FloatArray, tensor: TensorName, layer: int) -> StoredTensor:
        if tensor == "value":
            return store_token_groups(vectors, self.value_bits, self.group_size)
        store = store_channel_groups if self.key_groups == "channel" else store_token_groups
        return store(vectors, self.key_bits, self.group_size)
