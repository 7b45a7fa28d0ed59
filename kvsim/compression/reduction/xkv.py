"""xKV: adjacent layers share one low-rank basis, found in each request's own prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from kvsim.compression.base import LayerView
from kvsim.compression.codec import ReductionCodec
from kvsim.compression.reduction.base import Reduction
from kvsim.compression.reduction.xkv_codec import XkvCodec
from kvsim.ops import Component, OpCall, Work, expand_in_own_basis, project_rows, randomised_svd
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class Xkv(Reduction):
    """Keys (before RoPE) and values of ``layer_group_size`` layers side by side, by their SVD (arXiv 2503.18893).

    The prompt's n x (layers·H·D) matrix of keys becomes n x rank_k coordinates, held once for all its layers, and a
    basis of rank_k·H·D elements per layer in the model's dtype, held once per request; so do values. Each layer reads
    all coordinates and rebuilds its keys from them; values are absorbed, which is the same sum in another order. A last
    group of fewer layers has a proportionally smaller rank. Layers are adjacent among those of their kind.

    The paper's: what is decomposed, the ranks and that layers share. Its code decomposes by sketching with two power
    iterations where it is measured for speed, as priced and run here, and leaves tokens generated later uncompressed.
    Ours: those are projected on the prompt's basis once the group's last layer has run. With tensor parallelism each
    rank is charged its share of coordinates and basis, as if it decomposed its own heads at its share of the rank.
    """

    names: ClassVar = {"xkv": {}}
    summaries: ClassVar = {
        "xkv": "groups of 4 layers share a basis of rank 512 (K) and 768 (V) found in the prompt; xKV, arXiv 2503.18893"
    }

    family: ClassVar = "low rank"

    kind: Literal["xkv"] = "xkv"
    layer_group_size: PositiveInt = 4
    """Layers that share a basis."""
    rank_k: PositiveInt = 512
    """Coordinates per token and group of layers for K; at most what the layers have."""
    rank_v: PositiveInt = 768
    """The same for V."""
    power_iterations: NonNegativeInt = 2
    """Of the sketched SVD."""
    hadamard: bool = False
    """Turn coordinates by a Hadamard matrix, folded into the bases, before they are quantised."""

    def key_rank(self, group: LayerGroup) -> int:
        """Coordinates per token for the keys of a whole group of layers."""
        return min(self.rank_k, self.layer_group_size * group.num_kv_heads * group.k_head_dim)

    def value_rank(self, group: LayerGroup) -> int:
        """The same for values."""
        return min(self.rank_v, self.layer_group_size * group.num_kv_heads * group.v_head_dim)

    @property
    def depends_on_prompt(self) -> bool:
        return True

    @property
    def joins_layers(self) -> bool:
        return self.layer_group_size > 1

    def stored_with(self, layer: LayerView) -> tuple[int, ...]:
        place = layer.group.layers.index(layer.index)
        start = place - place % self.layer_group_size
        return layer.group.layers[start : start + self.layer_group_size]

    def at_layer(self, layer: LayerView) -> Xkv:
        return self.of_layers(len(self.stored_with(layer)))

    def of_layers(self, layers: int) -> Xkv:
        """Give the method for a group of so many layers, at the same share of the rank."""
        if layers == self.layer_group_size:
            return self
        share = layers / self.layer_group_size
        ranks = {"rank_k": max(1, round(self.rank_k * share)), "rank_v": max(1, round(self.rank_v * share))}
        return self.model_copy(update={"layer_group_size": layers, **ranks})

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        if group.kv_elements_per_token == 0:
            return group
        shape = {"num_kv_heads": 1, "k_head_dim": self.key_rank(group), "v_head_dim": self.value_rank(group)}
        return group.model_copy(update=shape)

    @property
    def resident_share(self) -> float:
        return 1.0 / self.layer_group_size

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        if group.kv_elements_per_token == 0:
            return 0.0
        keys = self.key_rank(group) * group.num_kv_heads * group.k_head_dim
        values = self.value_rank(group) * group.num_kv_heads * group.v_head_dim
        return (keys + values) * DTYPE_BITS[native] / 8

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        return tuple(
            _call("project_kv", project_rows(1, channels, rank, DTYPE_BITS[model.dtype] / 8))
            for channels, rank in self._shapes(group)
        )

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if not prompt_tokens or group.kv_elements_per_token == 0:
            return ()
        works = (
            randomised_svd(
                prompt_tokens,
                self.layer_group_size * channels,
                rank,
                self.power_iterations,
                DTYPE_BITS[model.dtype] / 8,
            )
            for channels, rank in self._shapes(group)
        )
        return tuple(_call("find_shared_basis", _one_of(self.layer_group_size, work)) for work in works)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.num_kv_heads == 0:
            return ()
        element_bytes = DTYPE_BITS[model.dtype] / 8
        (key_channels, key_rank), (value_channels, value_rank) = self._shapes(group)
        # Both bases are read to attend and again to project the new token, by each sequence for itself.
        keys = expand_in_own_basis(0, key_rank, key_channels, element_bytes, basis_reads=2.0)
        per_head = expand_in_own_basis(
            model.num_attention_heads,
            value_rank,
            group.v_head_dim,
            element_bytes,
            basis_reads=2.0 * value_channels / group.v_head_dim,
        )
        return (_call("read_key_basis", keys), _call("expand_output", per_head))

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if group.num_kv_heads == 0:
            return 0.0
        (key_channels, key_rank), (_, value_rank) = self._shapes(group)
        wider_values = 2.0 * model.num_attention_heads * max(0, value_rank - group.v_head_dim)
        return 2.0 * key_rank * key_channels + wider_values

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.is_latent for group in model.kv_groups):
            return (
                f"xkv decomposes K and V per head, but {model.name} keeps one latent vector for all heads (MLA); the "
                "paper's variant for latents is not modelled"
            )
        return None

    def codec(self) -> ReductionCodec:
        return XkvCodec(self)

    def _shapes(self, group: LayerGroup) -> tuple[tuple[int, int], ...]:
        """(channels of one layer, rank) of K and of V."""
        return (
            (group.num_kv_heads * group.k_head_dim, self.key_rank(group)),
            (group.num_kv_heads * group.v_head_dim, self.value_rank(group)),
        )


def _call(name: str, work: Work) -> OpCall:
    return OpCall(name, work, Component.COMPRESSION)


def _one_of(layers: int, work: Work) -> Work:
    """Share of one layer in work that a group of layers does once."""
    return replace(
        work,
        flops=work.flops / layers,
        bytes_read=work.bytes_read / layers,
        bytes_written=work.bytes_written / layers,
        launches=work.launches / layers,
    )
