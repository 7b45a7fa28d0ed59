"""CaM: an evicted value is spread over the tokens after it, with a chance that its attention decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.h2o import HeavyHitterSelection
from kvsim.compression.selection.merge_selector import MergeByLayer
from kvsim.compression.selection.prompt_attention import received_attention
from kvsim.numerics.merging import complement
from kvsim.ops import Component, OpCall, spread_values
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.compression.selector import Selector
    from kvsim.numerics.arrays import DoubleArray
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, KvTensors, LayerKv


class Cam(HeavyHitterSelection):
    """H2O's kept set and bound; an evicted value V_i is added as V_i / m to the m kept values after it, or not at all.

    Cache Merging (CaM, ICML 2024, openreview LCTmppB165): with A the accumulated attention, a token is merged with
    probability min(1, A_i / mean A of those m). Keys and counts do not change, so bytes are those of H2O. The last kept
    tokens have fewer than m after them, and take V_i over their number.

    The paper's, as its repository (zyxxmu/cam) and kvpress's CAMPress have it: all of the above, over any eviction.
    The repository divides by the largest A instead of the mean; kvpress says that it follows the paper's equation 14,
    and we follow kvpress. Ours: H2O below it; all tokens that a prompt evicts are merged at once, from their own values
    (each step of a decode merges one, as in the paper); one draw per layer and token, the same in all heads.
    """

    names: ClassVar = {"cam": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"cam_press": "cam"}
    summaries: ClassVar = {
        "cam": "h2o, evicted values spread over the 32 kept after them by a chance; CaM, openreview LCTmppB165"
    }

    family: ClassVar = "merging"

    kind: Literal["cam"] = "cam"
    merge_budget: PositiveInt = 32
    """Kept tokens that a value is spread over (kvpress's default)."""
    seed: NonNegativeInt = 0
    """Of the draws."""

    @property
    def merges(self) -> bool:
        return True

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        calls = tuple(super().prefill_ops(prompt_tokens, layer, model))
        kept = self.budget(prompt_tokens)
        if not calls or kept >= prompt_tokens:
            return calls
        return (*calls, self._spread(prompt_tokens - kept, kept, layer, model))

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        calls = tuple(super().decode_ops(layer, model))
        return (*calls, self._spread(1, self.merge_budget, layer, model)) if calls else calls

    def _spread(self, gone: int, kept: int, layer: LayerView, model: ModelSpec) -> OpCall:
        group, element_bytes = layer.group, DTYPE_BITS[model.dtype] / 8
        work = spread_values(gone, kept, self.merge_budget, kv_heads(group), group.v_head_dim, element_bytes)
        return OpCall("spread_values", work, Component.COMPRESSION)

    def selector(self) -> Selector:
        """Give the algorithm."""
        return MergeByLayer(self)

    def merged(self, kv: KvTensors, layer: LayerView, kept: IntArray) -> LayerKv:
        """Give the kept tokens with the values that were spread over them."""
        before = kv.layers[layer.index]
        received = received_attention(before, kv.attention_scale)
        gone = complement(kept, before.num_tokens)
        draws = np.random.default_rng((self.seed, layer.index)).random(before.num_tokens)
        after = before.take(kept)
        values = [
            value + self._spread_over(score, before.values[head], kept[head], gone[head], draws)
            for head, (value, score) in enumerate(zip(after.values, received, strict=True))
        ]
        return replace(after, values=np.stack(values).astype(np.float32))

    def _spread_over(
        self, score: FloatArray, values: FloatArray, kept: IntArray, gone: IntArray, draws: DoubleArray
    ) -> DoubleArray:
        """What one head's kept tokens are given, (kept, Dv)."""
        first = np.searchsorted(kept, gone)
        end = np.minimum(first + self.merge_budget, len(kept))
        count = end - first
        summed = np.concatenate(([0.0], np.cumsum(score[kept], dtype=np.float64)))
        with np.errstate(divide="ignore", invalid="ignore"):
            chance = np.nan_to_num(score[gone] * count / (summed[end] - summed[first]), nan=0.0, posinf=1.0)
        # The draw is below a chance above 1 as well.
        share = np.where((count > 0) & (draws[gone] < chance), 1.0 / np.maximum(count, 1), 0.0)
        # A value is given to all of first..end: added at first, taken away at end, and summed up.
        steps = np.zeros((len(kept) + 1, values.shape[1]))
        given = share[:, None] * values[gone]
        np.add.at(steps, first, given)
        np.subtract.at(steps, end, given)
        return np.cumsum(steps[:-1], axis=0)
