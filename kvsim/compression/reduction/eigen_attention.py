"""EigenAttention: each head's keys and values in the principal directions of calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kvsim.compression.codec import ReductionCodec
from kvsim.compression.reduction.projected_heads import ProjectedHeads, rank_of
from kvsim.compression.reduction.projection_codec import LayerBasis, ProjectionCodec, layer_shape
from kvsim.compression.reduction.projection_fit import eigen_basis
from kvsim.specs.model import LayerGroup
from kvsim.tensors import KvTensors

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec

Fraction = Annotated[float, Field(gt=0, le=1)]


class EigenAttention(ProjectedHeads):
    """Keys and values of each KV head as coordinates of equal rank (arXiv 2408.05646).

    In a model without RoPE the key basis of a head is that of its keys and queries together, queries are projected
    too, and attention runs in rank channels. RoPE turns a key by its position and does not commute with the basis, so
    there the authors' code stores keys before RoPE in one basis for all heads of the layer, from keys alone, and
    rebuilds them at each step; so does this. Values have a basis per head, absorbed in the output projection.

    The paper's: the bases, and 0.6 as what its largest reduction retains ("up to 40 %"). Its ranks differ from layer
    to layer by an error budget; ours are equal, as bytes must not depend on data. Keys and queries weigh the same
    whatever their number. The projections are charged as products of their own; folded into weights they are free.
    """

    names: ClassVar = {"eigen_attention": {}}
    aliases: ClassVar = {"eigenattention": "eigen_attention", "eigenattn": "eigen_attention"}
    summaries: ClassVar = {
        "eigen_attention": "K and V of each head at 0.6 of their rank unless set; Eigen Attention, arXiv 2408.05646"
    }

    family: ClassVar = "low rank"

    kind: Literal["eigen_attention"] = "eigen_attention"
    retained_fraction: Fraction = 0.6
    """Rank kept, as a share of head_dim; for keys, and for values unless set apart."""
    value_retained_fraction: Fraction | None = None

    def heads(self, group: LayerGroup) -> int:
        return 1

    def key_rank(self, group: LayerGroup) -> int:
        return rank_of(self.retained_fraction, group.k_head_dim)

    def value_rank(self, group: LayerGroup) -> int:
        return rank_of(self.value_retained_fraction or self.retained_fraction, group.v_head_dim)

    def rebuilds_keys(self, model: ModelSpec) -> bool:
        return model.rotary_fraction > 0

    def codec(self) -> ReductionCodec:
        return ProjectionCodec(self.kind, self._learn, pre_rope=True)

    def _learn(self, samples: Sequence[KvTensors], index: int) -> LayerBasis:
        group = layer_shape(samples[0].layers[index])
        return eigen_basis(samples, index, ranks=(self.key_rank(group), self.value_rank(group)))
