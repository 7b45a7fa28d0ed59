"""Merging as kvpress does it: an evicted token's value goes into the survivor whose key is nearest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.base import LOG_WEIGHT_BYTES
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.merge_selector import MergeByLayer
from kvsim.compression.selection.scorers import ScorerBackedSelection
from kvsim.numerics.merging import LEAST_NORM, complement, folded_means, nearest_by_cosine, weight_at
from kvsim.ops import OpCall, compression_calls, fold_tokens, nearest_survivors
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.selector import Selector
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, IntArray, KvTensors, LayerKv


class Merging(ScorerBackedSelection):
    """Fold each token that a scorer evicts into the survivor of largest cosine of keys, per KV head, after prefill.

    ``rule: norms`` is kvpress's MergingPress: with c the cosine, a survivor's value becomes (v_s + Σ w v_e) /
    (1 + Σ w), w = max(c, 0) ‖v_e‖ / (‖v_e‖ + ‖v_s‖); its key stays. Bytes are those of eviction. Nothing counts what it
    stands for, so it gets its own attention and no more.
    ``rule: counts`` is ours, after token merging (arXiv 2210.09461): w = 1, keys are averaged too (after RoPE, so
    positions mix), and an fp32 log-weight ln(1 + Σ w) per entry is held and added to its logits. Then equal tokens
    merge without any loss. Both in kernels/select/merge.
    """

    names: ClassVar = {"merging": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"merging_press": "merging"}
    spellings: ClassVar = ("merging(rule=counts)",)
    summaries: ClassVar = {
        "merging": "evicted values folded into the survivor of nearest key, SnapKV's scores unless set; kvpress"
    }

    family: ClassVar = "merging"

    kind: Literal["merging"] = "merging"
    rule: Literal["norms", "counts"] = "norms"
    similarity_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least cosine at which a token is merged; below it, it is dropped."""
    merge_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's tokens above the threshold that are merged: those of largest cosine."""

    @property
    def merges(self) -> bool:
        return True

    @property
    def keeps_newest(self) -> bool:
        return self.scored.keeps_newest

    def layer_band(self, layer: LayerView) -> int:
        return self.scored.layer_band(layer)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(self.scored.kept_tokens(prompt_tokens, layer))

    @property
    def _counts(self) -> bool:
        return self.rule == "counts" and self.evicts

    def scanned_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        """Entries with a log-weight: all that are held, where any was merged."""
        if not self._counts or self.scored.kept_tokens(prompt_tokens, layer) >= prompt_tokens:
            return None
        return self.resident_tokens(prompt_tokens, layer)

    def scan_bytes_per_token(self, group: LayerGroup, element_bytes: float) -> float:
        return LOG_WEIGHT_BYTES * kv_heads(group) if self._counts else 0.0

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        calls = tuple(self.scored.prefill_ops(prompt_tokens, layer, model))
        kept = self.scored.kept_tokens(prompt_tokens, layer)
        group, gone = layer.group, prompt_tokens - kept
        if not calls or gone <= 0:
            return calls
        heads, element_bytes = kv_heads(group), DTYPE_BITS[model.dtype] / 8
        channels = group.v_head_dim + (group.k_head_dim if self.rule == "counts" else 0)
        works = {
            "nearest_survivors": nearest_survivors(gone, kept, heads, group.k_head_dim, element_bytes),
            "fold_tokens": fold_tokens(gone, kept, heads, channels, element_bytes),
        }
        return (*calls, *compression_calls(works))

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        return self.scored.keep(kv, layer)

    def selector(self) -> Selector:
        """Give the algorithm."""
        return MergeByLayer(self)

    def merged(self, kv: KvTensors, layer: LayerView, kept: IntArray) -> LayerKv:
        """Give the survivors with what was folded into them."""
        before = kv.layers[layer.index]
        after, gone = before.take(kept), before.take(complement(kept, before.num_tokens))
        places, cosines = nearest_by_cosine(gone.keys, after.keys)
        is_merged = self._is_merged(cosines)
        if self.rule == "norms":
            weights = is_merged * _norm_weights(after.values, gone.values, places, cosines)
            return replace(after, values=folded_means(after.values, gone.values, places, weights))
        ones = is_merged.astype(np.float32)
        return replace(
            after,
            keys=folded_means(after.keys, gone.keys, places, ones),
            values=folded_means(after.values, gone.values, places, ones),
            log_weights=np.log1p(weight_at(places, ones, after.num_tokens)),
        )

    def _is_merged(self, cosines: FloatArray) -> FloatArray:
        """1 where a token is merged, else 0: above the threshold, and of largest cosine within its head."""
        is_near = cosines >= self.similarity_threshold
        if self.merge_fraction < 1.0:
            order = np.argsort(np.where(is_near, -cosines, np.inf), axis=1, kind="stable")
            # So many of those above the threshold, as kvpress does since PR 287.
            wanted = np.round(self.merge_fraction * is_near.sum(axis=1, keepdims=True))
            is_first = np.zeros_like(is_near)
            np.put_along_axis(is_first, order, np.arange(order.shape[1]) < wanted, axis=1)
            is_near &= is_first
        return is_near.astype(np.float32)

    def index_bits(self, layer_kv: LayerKv, layer: LayerView, native_bits: int) -> float:
        held = 0 if layer_kv.log_weights is None else layer_kv.num_kv_heads * layer_kv.num_tokens
        return 8 * LOG_WEIGHT_BYTES * held if self._counts else 0.0


def _norm_weights(values: FloatArray, gone: FloatArray, places: IntArray, cosines: FloatArray) -> FloatArray:
    """max(c, 0) ‖v_e‖ / (‖v_e‖ + ‖v_s‖), (H, e)."""
    own = np.linalg.norm(gone, axis=-1)
    of_target = np.take_along_axis(np.linalg.norm(values, axis=-1), places, axis=1)
    weights: FloatArray = np.maximum(cosines, 0) * own / (own + of_target + LEAST_NORM)
    return weights
