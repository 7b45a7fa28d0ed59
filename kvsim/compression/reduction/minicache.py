"""MiniCache: adjacent layers of the deeper half share the direction of each vector and keep its length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvsim.compression.base import LayerView
from kvsim.compression.codec import Reduced, ReductionCodec
from kvsim.compression.reduction.base import Reduction
from kvsim.compression.reduction.none import NoReduction
from kvsim.numerics.floats import round_bf16, round_fp16
from kvsim.numerics.ranking import mark_largest
from kvsim.numerics.slerp import angles, slerp, unit
from kvsim.ops import Component, OpCall, merge_directions, select_top_k
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import BoolArray, FloatArray, KvTensors

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

Share = Annotated[float, Field(ge=0, le=1)]


class MiniCache(Reduction):
    """Pairs of adjacent layers, from the middle one on, are merged (arXiv 2405.14366).

    Of each K and each V vector the pair holds one direction, interpolated on the sphere, and the length that it has in
    either layer (fp16). Where the two directions differ most, the pair is not merged: the first layer's slot then holds
    its own direction, and the second layer holds its own vectors in the model's dtype; a bit per token, head and tensor
    says where. A decode step restores and reads both layers whole: memory shrinks, traffic does not.

    The paper's, as far as its abstract and figures say: directions and lengths, SLERP, the middle layer as start,
    retained tokens. The weight 0.6 is recalled from the paper and was not opened again. Ours: the paper retains by a
    threshold of angular distance, so its share depends on the data; here a share is given (5 %, as a public port has
    it) and exactly that many tokens per head are retained, so that bytes are known; K and V choose their own;
    directions are stored times sqrt(head_dim), so that numbers have the size of one.
    """

    names: ClassVar = {"minicache": {}}
    aliases: ClassVar = {"mini_cache": "minicache"}
    summaries: ClassVar = {
        "minicache": "adjacent layers of the deeper half share directions, lengths apart; MiniCache, arXiv 2405.14366"
    }
    family: ClassVar = "cross-layer"

    kind: Literal["minicache"] = "minicache"
    start_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Layers before this share of the depth stay as they are."""
    interpolation: Share = 0.6
    """Weight of the second layer's direction."""
    retained_fraction: Share = 0.05
    """Share of tokens per head whose vectors stay apart."""

    def pairs(self, layers: tuple[int, ...], num_layers: int) -> tuple[tuple[int, int], ...]:
        """Merged pairs among ``layers`` of one group; an odd last layer stays by itself."""
        deep = [index for index in layers if index >= int(self.start_fraction * num_layers)]
        return tuple(zip(deep[::2], deep[1::2], strict=False))

    def retained_tokens(self, tokens: int) -> int:
        """Tokens per head that are not merged."""
        return round(self.retained_fraction * tokens)

    def stored_with(self, layer: LayerView) -> tuple[int, ...]:
        pairs = self.pairs(layer.group.layers, layer.num_layers)
        return next((pair for pair in pairs if layer.index in pair), (layer.index,))

    def at_layer(self, layer: LayerView) -> Reduction:
        together = self.stored_with(layer)
        if len(together) == 1:
            return NoReduction()
        part = _FirstOfPair if layer.index == together[0] else _SecondOfPair
        return part.model_validate(self.model_dump())

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        return group

    @property
    def joins_layers(self) -> bool:
        return True

    @property
    def depends_on_prompt(self) -> bool:
        # Which tokens stay apart is decided among all of the prompt's.
        return 0.0 < self.retained_fraction < 1.0

    def metadata_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        # Two fp16 magnitudes per head, of K and of V.
        return 4.0 * group.num_kv_heads if group.kv_elements_per_token else 0.0

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        # A length scales the logit of its key, another the weight of its value: no vector needs to be rebuilt.
        return 2.0 * model.num_attention_heads if group.num_kv_heads else 0.0

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.is_latent for group in model.kv_groups):
            return f"minicache merges K and V per head, but {model.name} keeps one latent for all heads (MLA)"
        return None

    def codec(self) -> ReductionCodec:
        return _MiniCacheCodec(self)


class _FirstOfPair(MiniCache):
    """The layer that holds the pair's directions."""


class _SecondOfPair(MiniCache):
    """The layer that holds its lengths and what was not merged."""

    @property
    def resident_share(self) -> float:
        return 0.0

    def metadata_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        if group.kv_elements_per_token == 0:
            return 0.0
        apart = self.retained_fraction * group.kv_elements_per_token * DTYPE_BITS[native] / 8
        return super().metadata_bytes_per_token(group, native) + group.num_kv_heads * 2 / 8 + apart

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        channels = group.k_head_dim + group.v_head_dim
        work = merge_directions(1.0, group.num_kv_heads, channels, DTYPE_BITS[model.dtype] / 8)
        return (OpCall("merge_directions", work, Component.COMPRESSION),)

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0 or self.retained_fraction in {0.0, 1.0}:
            return ()
        # K and V choose their own tokens.
        return (OpCall("retain_tokens", select_top_k(prompt_tokens, 2 * group.num_kv_heads), Component.COMPRESSION),)


@dataclass(frozen=True, eq=False)
class _MergedTensor:
    """K or V of a pair: stored numbers (H, n, D), magnitudes (H, n) of each layer, and where the second is apart."""

    stored: FloatArray
    lengths: tuple[FloatArray, FloatArray]
    apart: BoolArray
    second: FloatArray

    def restored(self, read_back: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Give both layers' vectors from the stored numbers as they are read back."""
        direction = read_back / np.float32(np.sqrt(self.stored.shape[2]))
        first, second = (direction * length[..., None] for length in self.lengths)
        return first, np.where(self.apart[..., None], self.second, second)


class _MiniCacheCodec(ReductionCodec):
    def __init__(self, method: MiniCache) -> None:
        self._method = method

    def reduce(self, kv: KvTensors) -> Reduced:
        """Merge pairs; only the first layer of each is stored."""
        pairs = self._method.pairs(tuple(range(kv.num_layers)), kv.num_layers)
        merged = {
            first: (
                self._merge(kv.layers[first].keys, kv.layers[second].keys, kv.native_bits),
                self._merge(kv.layers[first].values, kv.layers[second].values, kv.native_bits),
            )
            for first, second in pairs
        }
        layers = list(kv.layers)
        for first, second in pairs:
            keys, values = merged[first]
            layers[first] = replace(layers[first], keys=keys.stored, values=values.stored)
            layers[second] = layers[second].emptied()

        def restore(stored: KvTensors) -> KvTensors:
            full = list(stored.layers)
            for first, second in pairs:
                keys, values = merged[first]
                first_keys, second_keys = keys.restored(stored.layers[first].keys)
                first_values, second_values = values.restored(stored.layers[first].values)
                full[first] = replace(kv.layers[first], keys=first_keys, values=first_values)
                full[second] = replace(kv.layers[second], keys=second_keys, values=second_values)
            return replace(kv, layers=tuple(full))

        bits = tuple(self._bits(kv, index, pairs) for index in range(kv.num_layers))
        return Reduced(replace(kv, layers=tuple(layers)), restore, bits)

    def _merge(self, first: FloatArray, second: FloatArray, native_bits: int) -> _MergedTensor:
        (one, one_length), (other, other_length) = unit(first), unit(second)
        between = angles(one, other)
        apart = mark_largest(between, self._method.retained_tokens(between.shape[1]))
        direction = np.where(apart[..., None], one, slerp(one, other, self._method.interpolation))
        stored = (direction * np.sqrt(direction.shape[2])).astype(np.float32)
        return _MergedTensor(
            stored=round_bf16(stored) if native_bits == 16 else stored,
            lengths=(round_fp16(one_length.astype(np.float32)), round_fp16(other_length.astype(np.float32))),
            apart=apart,
            second=second,
        )

    def _bits(self, kv: KvTensors, index: int, pairs: tuple[tuple[int, int], ...]) -> float:
        """Magnitudes of K and V; for the second layer of a pair also two bitmaps and the vectors held apart."""
        layer = kv.layers[index]
        heads, tokens = layer.num_kv_heads, layer.num_tokens
        if any(index == second for _, second in pairs):
            channels = layer.keys.shape[2] + layer.values.shape[2]
            apart = self._method.retained_tokens(tokens) * heads * channels * kv.native_bits
            return float(2 * 16 * heads * tokens + 2 * heads * tokens + apart)
        return float(2 * 16 * heads * tokens) if any(index == first for first, _ in pairs) else 0.0
