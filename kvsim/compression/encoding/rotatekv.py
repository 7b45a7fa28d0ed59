"""RotateKV: keys rotated before RoPE across heads, channels reordered, attention sinks spared."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, log2
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec, StoredLayer, Symbols
from kvsim.compression.encoding.before_rope import BeforeRopeEncoding
from kvsim.compression.encoding.grouped import token_group_bytes
from kvsim.compression.encoding.sinks import SinkCodec
from kvsim.errors import InvalidSpec
from kvsim.numerics.clipped import quantise_groups
from kvsim.numerics.hadamard import is_power_of_two, rotate
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import BoolArray, FloatArray, IntArray, KvTensors, LayerKv
from kvsim.tensors.layout import bare_keys, by_head, by_token, turned_keys

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

_FIRST_TOKENS = 4


class RotateKv(BeforeRopeEncoding):
    """RotateKV (arXiv 2501.16383; read from its abstract and released code).

    Theirs: keys before RoPE are turned by one Hadamard matrix over ``head_group`` heads together, their channels are
    then sorted over all heads by what they sum up to on calibration data, so that groups of 128 hold channels of like
    size, and each group of a token gets an fp16 scale and zero point over ``clip_ratio`` of its range (0.8 for 2
    bits). Values are turned per head, in the weights, and quantised in groups within a head. ``num_sinks`` tokens
    with massive activations stay in the model's dtype. On each read keys are sorted and turned back, and get their
    RoPE, so this work grows with the context.

    Ours: hidden states are not at hand, so sinks are the first 4 tokens and those with the smallest value norms, which
    attention sinks are known for (arXiv 2410.13835), per layer; a group of heads is as large as divides their number.
    """

    names: ClassVar = {
        "rotatekv-2": {"bits": 2, "clip_ratio": 0.8},
        "rotatekv-3": {"bits": 3, "clip_ratio": 1.0},
        "rotatekv-4": {"bits": 4, "clip_ratio": 1.0},
    }
    aliases: ClassVar = {"rotatekv": "rotatekv-2"}
    summaries: ClassVar = {
        f"rotatekv-{bits}": f"{bits}-bit keys rotated before RoPE over 4 heads, 20 sinks native; arXiv 2501.16383"
        for bits in (2, 3, 4)
    }

    family: ClassVar = "rotation"

    kind: Literal["rotatekv"] = "rotatekv"
    bits: Literal[2, 3, 4]
    clip_ratio: Annotated[float, Field(gt=0, le=1)]
    group_size: PositiveInt = 128
    """Channels that share a scale and zero point; keys over all heads in sorted order, values within a head."""
    head_group: PositiveInt = 4
    """KV heads whose keys are turned together."""
    num_sinks: NonNegativeInt = 20

    def heads_together(self, num_kv_heads: int) -> int:
        """KV heads that one rotation of keys spans."""
        return gcd(self.head_group, num_kv_heads)

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        # Keys of all heads are one vector here.
        return token_group_bytes(head_dim, self.bits, self.group_size)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return token_group_bytes(head_dim, self.bits, self.group_size)

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        if group.kv_elements_per_token == 0:
            return KvBytes(0.0)
        keys = self.key_vector_bytes(group.num_kv_heads * group.k_head_dim)
        values = self.value_vector_bytes(group.v_head_dim)
        heads = group.num_kv_heads
        return KvBytes(
            keys.payload_bytes + heads * values.payload_bytes, keys.metadata_bytes + heads * values.metadata_bytes
        )

    @property
    def sink_tokens(self) -> int:
        return self.num_sinks

    @property
    def unpack_family(self) -> str | None:
        return f"rotatekv_{self.bits}"

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if group.num_kv_heads == 0:
            return 0.0
        width = self.heads_together(group.num_kv_heads) * group.k_head_dim
        turned = group.num_kv_heads * group.k_head_dim * log2(max(2, width))
        return turned + self.rope_flops_per_token(group)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        refused = super().check(model, device)
        if refused:
            return refused
        for group in model.kv_groups:
            for dim in (self.heads_together(group.num_kv_heads) * group.k_head_dim, group.v_head_dim):
                if dim and not is_power_of_two(dim):
                    return f"rotatekv turns {dim} channels by a Hadamard matrix, not a power of two ({model.name})"
        return None

    def codec(self) -> Codec:
        return _RotateKvCodec(self)


class _RotateKvCodec(SinkCodec):
    """Learns per layer in which order key channels come."""

    needs_calibration = True

    def __init__(self, encoding: RotateKv, orders: tuple[IntArray, ...] = ()) -> None:
        self._encoding = encoding
        self._orders = orders

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        if not samples:
            msg = "rotatekv calibrates the order of key channels: give caches of other sequences, not none"
            raise InvalidSpec(msg)
        orders = []
        for index in range(samples[0].num_layers):
            turned = [self._turned(sample.layers[index], sample) for sample in samples]
            sums = np.concatenate(turned).sum(axis=0, dtype=np.float64)
            orders.append(np.argsort(sums, kind="stable"))
        return type(self)(self._encoding, tuple(orders))

    def _turned(self, layer: LayerKv, kv: KvTensors) -> FloatArray:
        """Keys before RoPE, turned over groups of heads, (n, H·D)."""
        together = self._encoding.heads_together(layer.num_kv_heads)
        return rotate(by_token(bare_keys(layer, kv.rope)), block=together * layer.keys.shape[2])

    def sinks(self, layer: LayerKv) -> BoolArray:
        """Mark the first tokens, and those with the smallest values, (n,)."""
        size = (layer.values.astype(np.float64) ** 2).sum(axis=(0, 2))
        size[:_FIRST_TOKENS] = -1.0
        marked = np.zeros(layer.num_tokens, dtype=bool)
        marked[np.argsort(size, kind="stable")[: self._encoding.num_sinks]] = True
        return marked

    def store_coded(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        if not self._orders:
            msg = "rotatekv must be fitted to calibration caches before it stores one"
            raise InvalidSpec(msg)
        encoding, order = self._encoding, self._orders[index]
        levels, group_size, clip = 2**encoding.bits, encoding.group_size, encoding.clip_ratio
        keys = quantise_groups(self._turned(layer, kv)[:, order], encoding.bits, group_size, clip)
        values = quantise_groups(rotate(layer.values), encoding.bits, group_size, clip)
        heads, _, dim = layer.keys.shape
        unsorted = np.empty_like(keys.vectors)
        unsorted[:, order] = keys.vectors
        flat = rotate(unsorted, block=encoding.heads_together(heads) * dim)
        return StoredLayer(
            turned_keys(by_head(flat, heads), layer.positions, kv.rope),
            rotate(values.vectors),
            payload_bits=keys.payload_bits + values.payload_bits,
            metadata_bits=keys.metadata_bits + values.metadata_bits,
            symbols=(Symbols("key", by_head(keys.codes, heads), levels), Symbols("value", values.codes, levels)),
        )
