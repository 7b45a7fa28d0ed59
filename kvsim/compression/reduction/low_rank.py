"""Low rank: K and V of a group of heads stored as coordinates in a smaller basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from kvsim.compression.codec import ReductionCodec
from kvsim.compression.reduction.projected_heads import ProjectedHeads, rank_of
from kvsim.compression.reduction.projection_codec import LayerBasis, ProjectionCodec, layer_shape
from kvsim.compression.reduction.projection_fit import head_group_basis
from kvsim.specs.model import LayerGroup
from kvsim.tensors import KvTensors

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec

Fraction = Annotated[float, Field(gt=0, le=1)]


class LowRank(ProjectedHeads):
    """Palu-style projection of groups of heads (arXiv 2407.21118), coordinates stored as the encoding says.

    ``rank`` = retained fraction x group_size x head_dim per group of heads: Palu's M-LRD at group_size 1, G-LRD, and
    J-LRD at all heads. Each step rebuilds the keys it attends from their coordinates (2·rank·D FLOPs per head and
    token). The value basis is absorbed: the weighted sum runs over coordinates, and its result is expanded once per
    query head. Projection of new tokens is charged as an extra product; Palu folds it into the K and V weights, so
    this is an upper bound.

    Palu decomposes W_K and W_V, whitened by activations. From tensors alone the codec takes what that aims at, the best
    basis of the keys and values of calibration sequences. Palu's ranks differ from layer to layer by Fisher
    information; ours are equal, as bytes must not depend on data. ``kq_svd`` (arXiv 2512.05916) minimises the error of
    Q K' over queries of the calibration sequences instead. With keys after RoPE the query is projected and nothing is
    rebuilt; that keys are stored after RoPE, and V by plain SVD, is our reading of an abstract.
    """

    names: ClassVar = {
        "low_rank": {"objective": "kv"},
        "kq_svd": {"objective": "kq", "keys": "post_rope", "group_size": 1},
    }
    aliases: ClassVar = {"palu": "low_rank"}
    summaries: ClassVar = {
        "low_rank": "K and V projected to half their rank unless set, in groups of 4 heads; Palu, arXiv 2407.21118",
        "kq_svd": "K and V of each head at half rank, K by its products with queries; KQ-SVD, arXiv 2512.05916",
    }

    family: ClassVar = "low rank"

    kind: Literal["low_rank"] = "low_rank"
    retained_fraction: Fraction = 0.5
    """Rank kept, as a share of the full rank of a group of heads; for keys, and for values unless set apart."""
    value_retained_fraction: Fraction | None = None
    group_size: PositiveInt = 4
    """Heads that share one basis; fewer where a layer has fewer."""
    objective: Literal["kv", "kq"] = "kv"
    """What the key basis keeps best: keys, or their products with queries. Values are always kept for themselves."""
    keys: Literal["pre_rope", "post_rope"] = "pre_rope"
    """Whether keys are stored before RoPE (lower rank, rebuilt at each step) or after it (attended as they are)."""
    hadamard: bool = False
    """Turn coordinates by a Hadamard matrix, folded into the bases, before they are quantised (Palu)."""

    def heads(self, group: LayerGroup) -> int:
        return min(self.group_size, group.num_kv_heads)

    def key_rank(self, group: LayerGroup) -> int:
        return rank_of(self.retained_fraction, self.heads(group) * group.k_head_dim)

    def value_rank(self, group: LayerGroup) -> int:
        return rank_of(self.value_retained_fraction or self.retained_fraction, self.heads(group) * group.v_head_dim)

    def rebuilds_keys(self, model: ModelSpec) -> bool:
        return self.keys == "pre_rope"

    def codec(self) -> ReductionCodec:
        return ProjectionCodec(self.kind, self._learn, pre_rope=self.keys == "pre_rope")

    def _learn(self, samples: Sequence[KvTensors], index: int) -> LayerBasis:
        group = layer_shape(samples[0].layers[index])
        basis = head_group_basis(
            samples,
            index,
            heads=self.heads(group),
            ranks=(self.key_rank(group), self.value_rank(group)),
            query_aware=self.objective == "kq",
            pre_rope=self.keys == "pre_rope",
        )
        return basis.turned() if self.hadamard else basis
