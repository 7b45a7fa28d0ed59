"""D2O: layers of even attention keep more, and evicted tokens near to a survivor go into it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.h2o import HeavyHitterSelection, half_heavy_half_new
from kvsim.compression.selection.merge_selector import stored_natively
from kvsim.compression.selection.prompt_attention import received_attention
from kvsim.compression.selector import Selector, layer_view
from kvsim.errors import NotRunnable
from kvsim.numerics.merging import complement, folded_means, nearest_by_cosine
from kvsim.numerics.shares import share_out
from kvsim.ops import Component, OpCall, compression_calls, fold_tokens, nearest_survivors
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsim.numerics.arrays import DoubleArray
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, KvTensors, LayerKv


class D2O(HeavyHitterSelection):
    """H2O's kept set with budgets by layer, and merging by similarity (Dynamic Discriminative Operations, 2406.13035).

    The total over layers is H2O's. Layers whose attention varies less over tokens keep more: shares are
    exp(-F_l / mean F) with F the variance of accumulated attention over the square of its mean. An evicted token whose
    nearest kept key has a cosine of at least τ is merged, else dropped; τ is the mean of these cosines, per head. With
    u the cosine, keys and values both become (e x_s + Σ e^u x_e) / (e + Σ e^u). No entry counts what it stands for.

    The paper's (abstract; equations 9 to 12 as a third party's code states them, the paper's own text was not at hand):
    accumulated attention, shares that fall with its variance by a softmax, nearest key by cosine, the first threshold
    and the weights. Its threshold then follows later evictions of a decode as a moving average; nothing decodes here,
    and the work of it is priced. Ours: F made free of scale, half heavy and half new, keys averaged as they are cached.
    """

    names: ClassVar = {"d2o": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    summaries: ClassVar = {
        "d2o": "h2o with budgets by layer, evicted K and V folded into the nearest survivor; D2O, arXiv 2406.13035"
    }

    family: ClassVar = "merging"

    kind: Literal["d2o"] = "d2o"

    @property
    def merges(self) -> bool:
        return True

    @property
    def moves_budgets(self) -> bool:
        return self.evicts

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        calls = tuple(super().prefill_ops(prompt_tokens, layer, model))
        kept = self.budget(prompt_tokens)
        gone = prompt_tokens - kept
        if not calls or gone <= 0:
            return calls
        group, element_bytes = layer.group, DTYPE_BITS[model.dtype] / 8
        heads, channels = kv_heads(group), group.k_head_dim + group.v_head_dim
        works = {
            "nearest_survivors": nearest_survivors(gone, kept, heads, group.k_head_dim, element_bytes),
            "fold_tokens": fold_tokens(gone, kept, heads, channels, element_bytes),
        }
        return (*calls, *compression_calls(works))

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        calls = tuple(super().decode_ops(layer, model))
        if not calls:
            return calls
        group, element_bytes = layer.group, DTYPE_BITS[model.dtype] / 8
        channels = group.k_head_dim + group.v_head_dim
        return (*calls, OpCall("fold_tokens", fold_tokens(1, 1, kv_heads(group), channels, element_bytes),
                               Component.COMPRESSION))  # fmt: skip

    def decode_score_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        added = super().decode_score_flops_per_token(group, model)
        # The evicted key against each kept one, which attention has in hand: a multiply-add per channel.
        return added + 2.0 * group.num_kv_heads * group.k_head_dim if added else 0.0

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        raise NotRunnable(self.kind, "its layers share one budget by what all of them attend to")

    def selector(self) -> Selector:
        """Give the algorithm."""
        return D2OSelector(self)


class D2OSelector(Selector):
    """Shares the budget out over layers, evicts and merges."""

    def __init__(self, method: D2O) -> None:
        self.method = method

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays, with what was folded into it."""
        kept = [
            self.method.resident_tokens(layer.num_tokens, layer_view(kv, index))(0)
            for index, layer in enumerate(kv.layers)
        ]
        tokens = min(layer.num_tokens for layer in kv.layers)
        if max(kept) >= tokens:
            return kv
        scores = [received_attention(layer, kv.attention_scale) for layer in kv.layers]
        # Every layer keeps its newest token at least.
        budgets = share_out(layer_shares(scores), sum(kept), 1, tokens)
        layers = [_merged(*one, kv.native_bits) for one in zip(kv.layers, scores, budgets.tolist(), strict=True)]
        return replace(kv, layers=tuple(layers))


def layer_shares(scores: Sequence[FloatArray]) -> DoubleArray:
    """What each layer keeps beside the others, (L,), from its accumulated attention, (H, n) each."""
    variances = np.array([(one.var(axis=1) / np.maximum(one.mean(axis=1), 1e-30) ** 2).mean() for one in scores])
    mean = variances.mean()
    shares: DoubleArray = np.exp(-variances / mean) if mean > 0 else np.ones_like(variances)
    return shares


def _merged(layer: LayerKv, scores: FloatArray, kept: int, native_bits: int) -> LayerKv:
    if kept >= layer.num_tokens:
        return layer
    indices = half_heavy_half_new(scores, kept)
    after, gone = layer.take(indices), layer.take(complement(indices, layer.num_tokens))
    places, cosines = nearest_by_cosine(gone.keys, after.keys)
    is_near = cosines >= cosines.mean(axis=1, keepdims=True)
    # e^u / e: the survivor's own weight is then 1.
    weights = (is_near * np.exp(cosines - 1.0)).astype(np.float32)
    merged = replace(
        after,
        keys=folded_means(after.keys, gone.keys, places, weights),
        values=folded_means(after.values, gone.values, places, weights),
    )
    return stored_natively(after, merged, native_bits)
