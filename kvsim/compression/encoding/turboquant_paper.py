"""TurboQuant as the paper has it: both algorithms, whole and fractional bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from kvsim.compression.base import KvBytes
from kvsim.compression.codec import Codec, LayerCodec, StoredLayer, Symbols
from kvsim.compression.encoding.per_vector import PerHeadEncoding
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import CodeArray
from kvsim.numerics.hadamard import is_power_of_two
from kvsim.numerics.lloyd_max import SMALLEST_DIMENSION
from kvsim.numerics.turboquant import MseQuantiser, ProdQuantiser
from kvsim.ops import Component, OpCall, Work, channel_energy, fast_hadamard, project_rows
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, IntArray, KvTensors, LayerKv, TensorName

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

_NORM_BYTES = 2.0


class Instance(NamedTuple):
    """One of the quantisers that a vector is split among: how many of its channels, and bits of each."""

    channels: int
    bits: int


class TurboQuantPaper(PerHeadEncoding):
    """Algorithm 1 (``mse``) or 2 (``prod``) of TurboQuant (arXiv 2504.19874).

    Each vector is rotated at random, stored as codes of the Lloyd-Max codebook for the law of its coordinates, and its
    norm in fp16: b·D/8 + 2 B. ``prod`` gives one of the b bits of keys to the signs of S·residual and adds the
    residual's fp16 norm, which makes inner products unbiased. Values are weighted sums and no inner products, so they
    are stored by Algorithm 1 with either; that is ours, the paper does not say.

    Fractional bits: channels are split into outliers and others, each part a vector of its own with its own rotation,
    codebook and norm. Outliers get one bit more; their share is the fraction. The paper's "2.5 bits" of 32 channels at
    3 bits and 96 at 2 are 2.25 by its own formula, and spelled so here; 2.5 has 64 of each. The paper does not say how
    outliers are found. Here they are, per head, the channels with the largest sum of squares over the prompt, as in
    QJL (arXiv 2406.03482), and a bit mask per head and tensor says which.
    """

    names: ClassVar = {
        "turboquant_mse": {"algorithm": "mse", "bits": 4.0},
        "turboquant_prod": {"algorithm": "prod", "bits": 4.0},
    }
    aliases: ClassVar = {
        f"turboquant_{algorithm}_{bits}": f"turboquant_{algorithm}:{bits}"
        for algorithm in ("mse", "prod")
        for bits in (1, 2, 3, 4)
    }
    spellings: ClassVar = (
        "turboquant_mse:3.5",
        "turboquant_mse:3",
        "turboquant_mse:2.5",
        "turboquant_mse:2",
        "turboquant_prod:3",
        "turboquant_prod:2",
    )
    summaries: ClassVar = {
        "turboquant_mse": "rotated Lloyd-Max codes, 4 bits unless set; TurboQuant algorithm 1, arXiv 2504.19874",
        "turboquant_prod": "the same, one key bit for QJL, unbiased; TurboQuant algorithm 2, arXiv 2504.19874",
    }
    inline_fields: ClassVar = ("bits",)

    family: ClassVar = "rotation"

    kind: Literal["turboquant_paper"] = "turboquant_paper"
    algorithm: Literal["mse", "prod"]
    bits: Annotated[float, Field(ge=1, le=8, multiple_of=0.125)]
    """Per element, on average over channels."""
    value_bits: Annotated[float, Field(ge=1, le=8, multiple_of=0.125)] | None = None
    """Of values, where they have others than keys; ours."""
    rotation: Literal["dense", "hadamard"] = "dense"
    """dense: any rotation, D² multiplications. hadamard: with random signs, D·log2 D additions, powers of two."""
    codebook: Literal["beta", "gaussian"] = "beta"
    """For the exact law of a coordinate in D dimensions, or for its limit."""
    norm_correction: bool = False
    """Store norms so that vectors keep their length; the paper does not."""

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        try:
            return {"bits": float(text)}
        except ValueError:
            msg = f"turboquant: {text!r} after ':' is not a number of bits, such as 4, 3.5 or 2.25"
            raise InvalidSpec(msg) from None

    def inline_text(self) -> str | None:
        return f"{self.bits:g}"

    @model_serializer(mode="wrap")
    def _without_value_bits(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A scenario that was written before values could have other bits keeps its fingerprint.
        data: dict[str, Any] = handler(self)
        if self.value_bits is None:
            data.pop("value_bits")
        return data

    def split(self, dim: int, tensor: TensorName = "key") -> tuple[Instance, ...]:
        """Parts that a vector is split into: the outlier channels first, or one part of all channels."""
        bits = self.bits if tensor == "key" or self.value_bits is None else self.value_bits
        low = int(bits)
        outliers = round((bits - low) * dim)
        parts = (Instance(outliers, low + 1), Instance(dim - outliers, low))
        return tuple(part for part in parts if part.channels)

    def _splits(self, group: LayerGroup) -> tuple[tuple[Instance, ...], ...]:
        """Parts of a key vector and of a value vector, where a layer has them."""
        widths: tuple[tuple[int, TensorName], ...] = ((group.k_head_dim, "key"), (group.v_head_dim, "value"))
        return tuple(self.split(dim, tensor) for dim, tensor in widths)

    def _vector_bytes(self, dim: int, tensor: TensorName, *, norms: int) -> KvBytes:
        parts = self.split(dim, tensor)
        payload = sum(ceil(part.channels * part.bits / 8) for part in parts)
        return KvBytes(float(payload), norms * _NORM_BYTES * len(parts))

    def key_vector_bytes(self, head_dim: int) -> KvBytes:
        if self.algorithm == "mse":
            return self._vector_bytes(head_dim, "key", norms=1)
        # A part of one bit has no codes, and so no norm but its residual's.
        whole = self._vector_bytes(head_dim, "key", norms=2)
        saved = sum(_NORM_BYTES for part in self.split(head_dim) if part.bits == 1)
        return KvBytes(whole.payload_bytes, whole.metadata_bytes - saved)

    def value_vector_bytes(self, head_dim: int) -> KvBytes:
        return self._vector_bytes(head_dim, "value", norms=1)

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        if group.kv_elements_per_token == 0:
            return 0.0
        split = (sum(part.channels for part in parts) for parts in self._splits(group) if len(parts) > 1)
        return group.num_kv_heads * sum(float(ceil(dim / 8)) for dim in split)

    @property
    def depends_on_prompt(self) -> bool:
        return any(bits is not None and bits != int(bits) for bits in (self.bits, self.value_bits))

    @property
    def unpack_family(self) -> str | None:
        return f"turboquant_{self.algorithm}"

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        quantize = tuple(super().append_ops(group, model))
        if not quantize:
            return ()
        heads, element_bytes = group.num_kv_heads, DTYPE_BITS[model.dtype] / 8
        turned = [part for parts in self._splits(group) for part in parts]
        calls = [_call("rotate_kv", self._rotate(heads, part, element_bytes)) for part in turned]
        return (*calls, *self._sketches("sketch_residual", heads, group, element_bytes), *quantize)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.num_kv_heads == 0:
            return ()
        heads, element_bytes = model.num_attention_heads, DTYPE_BITS[model.dtype] / 8
        turned = [part for parts in self._splits(group) for part in parts]
        calls = [_call("rotate_query_and_output", self._rotate(heads, part, element_bytes)) for part in turned]
        return (*calls, *self._sketches("sketch_query", heads, group, element_bytes))

    def _rotate(self, rows: float, part: Instance, element_bytes: float) -> Work:
        if self.rotation == "hadamard":
            return fast_hadamard(rows, part.channels, element_bytes)
        return project_rows(rows, part.channels, part.channels, element_bytes)

    def _sketches(self, name: str, rows: float, group: LayerGroup, element_bytes: float) -> tuple[OpCall, ...]:
        if self.algorithm == "mse":
            return ()
        parts = self.split(group.k_head_dim)
        return tuple(_call(name, project_rows(rows, part.channels, part.channels, element_bytes)) for part in parts)

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if not self.fixed_bytes_per_sequence(group, model.dtype):
            return ()
        work = channel_energy(prompt_tokens, group.kv_elements_per_token, DTYPE_BITS[model.dtype] / 8)
        return (_call("find_outlier_channels", work),)

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if self.algorithm == "mse" or group.num_kv_heads == 0:
            return 0.0
        return 2.0 * group.k_head_dim * model.num_attention_heads

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        refused = super().check(model, device)
        if refused:
            return refused
        parts = {part.channels for group in model.kv_groups for split in self._splits(group) for part in split}
        reasons = (self._refuses_width(channels) for channels in sorted(parts))
        return next((f"{reason} ({model.name})" for reason in reasons if reason), None)

    def _refuses_width(self, channels: int) -> str | None:
        if channels < SMALLEST_DIMENSION:
            return f"turboquant_{self.algorithm} rotates {channels} channels, and needs {SMALLEST_DIMENSION} or more"
        if self.rotation == "hadamard" and not is_power_of_two(channels):
            return f"a Hadamard rotation needs a power of two, not {channels} channels; use rotation=dense"
        return None

    def codec(self) -> Codec:
        return _PaperCodec(self)


def _call(name: str, work: Work) -> OpCall:
    return OpCall(name, work, Component.COMPRESSION)


class _PaperCodec(LayerCodec):
    """Splits channels where bits are fractional, and quantises each part by itself."""

    def __init__(self, encoding: TurboQuantPaper) -> None:
        self._encoding = encoding

    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        keys = self._store(layer.keys, "key")
        values = self._store(layer.values, "value")
        return StoredLayer(
            keys.vectors,
            values.vectors,
            payload_bits=keys.payload_bits + values.payload_bits,
            metadata_bits=keys.metadata_bits + values.metadata_bits,
            symbols=keys.symbols + values.symbols,
        )

    def _store(self, vectors: FloatArray, tensor: TensorName) -> _StoredTensor:
        heads, _, dim = vectors.shape
        parts = self._encoding.split(dim, tensor)
        order = _by_energy(vectors) if len(parts) > 1 else np.broadcast_to(np.arange(dim), (heads, dim))
        read_back = np.empty_like(vectors)
        stored = _StoredTensor(read_back, 0.0, 8.0 * heads * ceil(dim / 8) if len(parts) > 1 else 0.0, ())
        start = 0
        for part in parts:
            channels = order[:, None, start : start + part.channels]
            start += part.channels
            one = self._store_part(np.take_along_axis(vectors, channels, axis=2), part, tensor)
            np.put_along_axis(read_back, np.broadcast_to(channels, one.vectors.shape), one.vectors, axis=2)
            stored = _StoredTensor(
                read_back,
                stored.payload_bits + one.payload_bits,
                stored.metadata_bits + one.metadata_bits,
                stored.symbols + one.symbols,
            )
        return stored

    def _store_part(self, vectors: FloatArray, part: Instance, tensor: TensorName) -> _StoredTensor:
        encoding = self._encoding
        has_signs = encoding.algorithm == "prod" and tensor == "key"
        quantiser = (ProdQuantiser if has_signs else MseQuantiser)(
            part.channels,
            part.bits,
            rotation=encoding.rotation,
            law=encoding.codebook,
            corrects_norm=encoding.norm_correction,
        )
        codes, norms, read_back = _run(quantiser, vectors)
        count = vectors.shape[0] * vectors.shape[1]
        return _StoredTensor(
            read_back,
            payload_bits=8.0 * count * ceil(part.channels * part.bits / 8),
            metadata_bits=8.0 * _NORM_BYTES * norms * count,
            symbols=(Symbols(tensor, codes, 2**part.bits),),
        )


class _StoredTensor(NamedTuple):
    vectors: FloatArray
    payload_bits: float
    metadata_bits: float
    symbols: tuple[Symbols, ...]


def _run(quantiser: MseQuantiser | ProdQuantiser, vectors: FloatArray) -> tuple[CodeArray, int, FloatArray]:
    """Give codes (a sign is the lowest bit of its coordinate's), norms per vector, and what is read back."""
    if isinstance(quantiser, MseQuantiser):
        coded = quantiser.quantise(vectors)
        return coded.codes, 1, quantiser.read_back(coded)
    stored = quantiser.quantise(vectors)
    norms = 2 if quantiser.mse.codebook.bits else 1
    return stored.coded.codes * 2 + stored.signs, norms, quantiser.read_back(stored)


def _by_energy(vectors: FloatArray) -> IntArray:
    """Channels of each head by falling sum of squares over tokens, (H, D)."""
    energy = (vectors.astype(np.float64) ** 2).sum(axis=1)
    return np.argsort(-energy, axis=1, kind="stable")
