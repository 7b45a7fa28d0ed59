"""KV as the model makes it: the baseline."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvsim.compression.base import KvBytes, KvEncoding
from kvsim.compression.codec import Codec, LayerCodec, StoredLayer
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import KvTensors, LayerKv


class Native(KvEncoding):
    """The model's own dtype (vLLM ``--kv-cache-dtype auto``)."""

    names: ClassVar = {"native": {}}
    aliases: ClassVar = {
        "auto": "native",
        "bf16": "native",
        "bfloat16": "native",
        "fp16": "native",
        "float16": "native",
    }
    summaries: ClassVar = {"native": "K and V in the model's own dtype; vLLM --kv-cache-dtype auto"}

    family: ClassVar = "baseline"

    kind: Literal["native"] = "native"

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        return KvBytes(group.kv_elements_per_token * DTYPE_BITS[native] / 8)

    @property
    def is_native(self) -> bool:
        return True

    def codec(self) -> Codec:
        return _NativeCodec()


class _NativeCodec(LayerCodec):
    """Stores every number as it is."""

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        elements = layer.keys.size + layer.values.size
        return StoredLayer(layer.keys, layer.values, payload_bits=float(elements * kv.native_bits))
