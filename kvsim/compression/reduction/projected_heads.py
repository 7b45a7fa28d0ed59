"""What methods share that store coordinates of K and V per group of heads, in bases fixed before the request comes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsim.compression.reduction.base import Reduction
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class ProjectedHeads(Reduction):
    """Coordinates per token and group of heads; the bases belong to the model, like weights."""

    @abstractmethod
    def heads(self, group: LayerGroup) -> int:
        """Heads that share one basis."""

    @abstractmethod
    def key_rank(self, group: LayerGroup) -> int:
        """Coordinates per token and group of heads for K."""

    @abstractmethod
    def value_rank(self, group: LayerGroup) -> int:
        """Coordinates per token and group of heads for V."""

    @abstractmethod
    def rebuilds_keys(self, model: ModelSpec) -> bool:
        """Whether attention needs the keys themselves: where they are stored before RoPE."""

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        if group.kv_elements_per_token == 0:
            return group
        shape = {
            "num_kv_heads": group.num_kv_heads // self.heads(group),
            "k_head_dim": self.key_rank(group),
            "v_head_dim": self.value_rank(group),
        }
        return group.model_copy(update=shape)

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        heads = self.heads(group)
        head_groups = group.num_kv_heads // heads
        shapes = ((heads * group.k_head_dim, self.key_rank(group)), (heads * group.v_head_dim, self.value_rank(group)))
        return tuple(
            OpCall(
                "project_kv",
                project_rows(head_groups, full, rank, DTYPE_BITS[model.dtype] / 8),
                Component.COMPRESSION,
            )
            for full, rank in shapes
        )

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.num_kv_heads == 0:
            return ()
        element_bytes, queries = DTYPE_BITS[model.dtype] / 8, model.num_attention_heads
        expand = project_rows(queries, self.value_rank(group), group.v_head_dim, element_bytes)
        calls = (OpCall("expand_output", expand, Component.COMPRESSION),)
        if self.rebuilds_keys(model):
            return calls
        project = project_rows(queries, group.k_head_dim, self.key_rank(group), element_bytes)
        return (OpCall("project_query", project, Component.COMPRESSION), *calls)

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if group.num_kv_heads == 0:
            return 0.0
        if self.rebuilds_keys(model):
            keys = 2.0 * self.key_rank(group) * group.num_kv_heads * group.k_head_dim
        else:
            keys = 2.0 * model.num_attention_heads * max(0, self.key_rank(group) - group.k_head_dim)
        # The weighted sum runs over rank coordinates instead of v_head_dim channels; a smaller rank is not credited.
        wider_values = 2.0 * model.num_attention_heads * max(0, self.value_rank(group) - group.v_head_dim)
        return keys + wider_values

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        for group in model.kv_groups:
            if group.is_latent:
                return f"{model.name} already stores a low-rank latent (MLA); {self.kind} projects K and V per head"
            if group.num_kv_heads % self.heads(group):
                return (
                    f"{self.kind} shares a basis among {self.heads(group)} heads, which does not divide the "
                    f"{group.num_kv_heads} KV heads of {model.name}"
                )
        return None


def rank_of(retained_fraction: float, full_rank: int) -> int:
    """Rank that keeps a share of the full one: at least 1, and 0 of nothing."""
    return max(1, round(retained_fraction * full_rank)) if full_rank else 0
