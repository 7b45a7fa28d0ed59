"""Low rank: K and V of a group of heads stored as coordinates in a smaller basis."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from kvsim.compression.reduction.base import Reduction
from kvsim.errors import NotRunnable
from kvsim.ops import Component, OpCall, project_rows
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.codec import ReductionCodec
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

Fraction = Annotated[float, Field(gt=0, le=1)]


class LowRank(Reduction):
    """Palu-style projection of groups of heads (arXiv 2407.21118), coordinates stored as the encoding says.

    ``rank`` = retained fraction x group_size x head_dim per group of heads. Each step rebuilds the keys it attends
    from their coordinates (2·rank·D FLOPs per head and token). The value basis is absorbed: the weighted sum runs
    over coordinates, and its result is expanded once per query head. Projection of new tokens is charged as an
    extra product; Palu folds it into the K and V weights, so this is an upper bound.
    """

    names: ClassVar = {"low_rank": {}}
    aliases: ClassVar = {"palu": "low_rank"}
    summaries: ClassVar = {
        "low_rank": "K and V projected to half their rank unless set, in groups of 4 heads; Palu, arXiv 2407.21118"
    }

    family: ClassVar = "low rank"

    kind: Literal["low_rank"] = "low_rank"
    retained_fraction: Fraction = 0.5
    """Rank kept, as a share of the full rank of a group of heads; for keys, and for values unless set apart."""
    value_retained_fraction: Fraction | None = None
    group_size: PositiveInt = 4
    """Heads that share one basis; fewer where a layer has fewer."""

    def key_rank(self, group: LayerGroup) -> int:
        """Coordinates per token and group of heads for K."""
        return _rank(self.retained_fraction, self._heads(group) * group.k_head_dim)

    def value_rank(self, group: LayerGroup) -> int:
        """Coordinates per token and group of heads for V."""
        return _rank(self.value_retained_fraction or self.retained_fraction, self._heads(group) * group.v_head_dim)

    def _heads(self, group: LayerGroup) -> int:
        return min(self.group_size, group.num_kv_heads)

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        if group.kv_elements_per_token == 0:
            return group
        shape = {
            "num_kv_heads": group.num_kv_heads // self._heads(group),
            "k_head_dim": self.key_rank(group),
            "v_head_dim": self.value_rank(group),
        }
        return group.model_copy(update=shape)

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        heads = self._heads(group)
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
        work = project_rows(
            model.num_attention_heads, self.value_rank(group), group.v_head_dim, DTYPE_BITS[model.dtype] / 8
        )
        return (OpCall("expand_output", work, Component.COMPRESSION),)

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        if group.num_kv_heads == 0:
            return 0.0
        rebuild_keys = 2.0 * self.key_rank(group) * group.num_kv_heads * group.k_head_dim
        # The weighted sum runs over rank coordinates instead of v_head_dim channels; a smaller rank is not credited.
        wider_values = 2.0 * model.num_attention_heads * max(0, self.value_rank(group) - group.v_head_dim)
        return rebuild_keys + wider_values

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        for group in model.kv_groups:
            if group.is_latent:
                return f"{model.name} already stores a low-rank latent (MLA); low_rank projects K and V per head"
            if group.num_kv_heads % self._heads(group):
                return (
                    f"low_rank shares a basis among {self.group_size} heads, which does not divide the "
                    f"{group.num_kv_heads} KV heads of {model.name}"
                )
        return None

    def codec(self) -> ReductionCodec:
        raise NotRunnable(self.kind)


def _rank(retained_fraction: float, full_rank: int) -> int:
    return max(1, round(retained_fraction * full_rank)) if full_rank else 0
