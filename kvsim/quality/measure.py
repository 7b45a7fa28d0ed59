"""Risk measured on tensors: run the real algorithm, let the queries read what came back, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.quality.store import FittedStrategy, StoredCache, store_cache
from kvsim.tensors import Attended, BoolArray, IntArray, KvTensors, LayerKv, attend

FIRST_TOKENS: Final = 4
"""Positions that may be sinks (StreamingLLM, arXiv 2309.17453). The top-1 token is sought after them: a sink that stays
first would hide everything else."""
SOUGHT_MASS: Final = 0.1
"""Attention from which on a query is said to look for a needle."""
TOP_TOKENS: Final = 5
"""A needle survives among as many top tokens, or at its old rank if that was lower: FIRST_TOKENS and itself."""


@dataclass(frozen=True)
class HeadRisk:
    """What one query head sees of a stored cache; means over its queries.

    Attributes
    ----------
    output_error : float
        Root of E||o - o'||^2 / E||o||^2.
    lost_mass : float
        Attention, before compression, on tokens that are now gone or not read.
    logit_error : float
        Root mean square of logit changes of read tokens, less their mean per query, which softmax ignores.
    top1_agreement : float
        Share of queries whose heaviest token, after the first FIRST_TOKENS, is still the same.
    needle_survival : float or None
        Share of needles looked for that are read and still among the top; None where none is looked for.
    sought_needles : int
    """

    layer: int
    head: int
    output_error: float
    lost_mass: float
    logit_error: float
    top1_agreement: float
    needle_survival: float | None
    sought_needles: int


@dataclass(frozen=True)
class MeasuredRisk:
    """What a strategy did to one cache, or to several: heads of all layers, and the bits that it took."""

    heads: tuple[HeadRisk, ...]
    bits_per_element: float

    @property
    def worst(self) -> HeadRisk:
        """The head with the largest output error."""
        return max(self.heads, key=lambda head: head.output_error)

    def mean(self, name: str) -> float:
        """Mean over heads of an attribute of `HeadRisk`."""
        return float(np.mean([getattr(head, name) for head in self.heads]))

    @property
    def output_error(self) -> float:
        """Root mean square over heads of their relative errors."""
        return float(np.sqrt(np.mean([head.output_error**2 for head in self.heads])))

    @property
    def needle_survival(self) -> float | None:
        """Over all needles that any head looks for."""
        return _survival(self.heads)


def measure(strategy: FittedStrategy, kv: KvTensors) -> MeasuredRisk:
    """Store a cache and measure the harm.

    Raises
    ------
    InvalidSpec
        The cache has no queries.
    """
    return compare_caches(kv, store_cache(strategy, kv))


def compare_caches(kv: KvTensors, stored: StoredCache) -> MeasuredRisk:
    """Measure what queries see of ``stored`` beside what they see of ``kv``; raise as `measure`."""
    heads: list[HeadRisk] = []
    for index, (before, after) in enumerate(zip(kv.layers, stored.kv.layers, strict=True)):
        heads += _LayerPair(kv, index, before, after, stored.read_masks[index]).risks()
    elements = sum(layer.keys.size + layer.values.size for layer in kv.layers)
    return MeasuredRisk(tuple(heads), stored.total_bits / elements)


def pooled(risks: Iterable[MeasuredRisk]) -> MeasuredRisk:
    """Put the risks of several sequences together, head by head."""
    several = tuple(risks)
    heads = tuple(_pool_head(same) for same in zip(*(risk.heads for risk in several), strict=True))
    return MeasuredRisk(heads, float(np.mean([risk.bits_per_element for risk in several])))


def _pool_head(same: tuple[HeadRisk, ...]) -> HeadRisk:
    def mean(read: Callable[[HeadRisk], float]) -> float:
        return float(np.mean([read(head) for head in same]))

    return HeadRisk(
        same[0].layer,
        same[0].head,
        output_error=float(np.sqrt(mean(lambda head: head.output_error**2))),
        lost_mass=mean(lambda head: head.lost_mass),
        logit_error=float(np.sqrt(mean(lambda head: head.logit_error**2))),
        top1_agreement=mean(lambda head: head.top1_agreement),
        needle_survival=_survival(same),
        sought_needles=sum(head.sought_needles for head in same),
    )


def _survival(heads: Iterable[HeadRisk]) -> float | None:
    """Share that survives of all needles that any of ``heads`` looks for; None where none does."""
    several = tuple(heads)
    sought = sum(head.sought_needles for head in several)
    kept = sum((head.needle_survival or 0.0) * head.sought_needles for head in several)
    return kept / sought if sought else None


def kept_indices(before: LayerKv, after: LayerKv) -> IntArray:
    """Where each kept token was in the uncompressed cache, (H, kept)."""
    order = np.argsort(before.positions, axis=1)
    rows = [
        order[head][np.searchsorted(before.positions[head], after.positions[head], sorter=order[head])]
        for head in range(before.num_kv_heads)
    ]
    return np.stack(rows)


class _LayerPair:
    """One layer before and after; arrays are (Hq, m, n), or (Hq, m, kept) after."""

    def __init__(self, kv: KvTensors, index: int, before: LayerKv, after: LayerKv, read_mask: BoolArray | None) -> None:
        if not before.queries.size:
            msg = f"{kv.source}: layer {index} has no queries, so there is nothing to measure with"
            raise InvalidSpec(msg)
        self.index, self.group = index, before.group_size
        self.before: Attended = attend(before, kv.attention_scale)
        self.after: Attended = attend(after, kv.attention_scale, read_mask)
        self.source = self._per_query(kept_indices(before, after))
        self.is_read = np.isfinite(self.after.logits)
        self.log_weights = after.log_weights
        self.positions = self._per_query(before.positions)
        self.needles = kv.needles

    def _per_query(self, per_kv_head: IntArray) -> IntArray:
        """(H, k) to (Hq, 1, k), to go with a query head's arrays."""
        return np.repeat(per_kv_head, self.group, axis=0)[:, None, :]

    def risks(self) -> list[HeadRisk]:
        errors, lost, logits = self._output_error(), self._lost_mass(), self._logit_error()
        agreement = self._top1()
        sought, survived = self._needles()
        return [
            HeadRisk(
                self.index,
                head,
                float(errors[head]),
                float(lost[head]),
                float(logits[head]),
                float(agreement[head]),
                float(survived[head] / sought[head]) if sought[head] else None,
                int(sought[head]),
            )
            for head in range(len(errors))
        ]

    def _output_error(self) -> DoubleArray:
        truth = self.before.outputs.astype(np.float64)
        change = ((self.after.outputs - truth) ** 2).sum(axis=(1, 2))
        size = (truth**2).sum(axis=(1, 2))
        return np.asarray(np.sqrt(change / np.where(size > 0.0, size, 1.0)))

    def _lost_mass(self) -> DoubleArray:
        seen = np.zeros(self.before.weights.shape, dtype=bool)
        np.put_along_axis(seen, np.broadcast_to(self.source, self.is_read.shape), self.is_read, axis=-1)
        lost = np.where(seen, 0.0, self.before.weights.astype(np.float64))
        return np.asarray(lost.sum(axis=-1).mean(axis=-1))

    def _logit_error(self) -> DoubleArray:
        old = np.take_along_axis(self.before.logits, np.broadcast_to(self.source, self.is_read.shape), axis=-1)
        new = self.after.logits.astype(np.float64)
        if self.log_weights is not None:
            # A product of query and key has no weight in it.
            weights = np.where(np.isfinite(self.log_weights), self.log_weights, 0.0)
            new = new - np.repeat(weights, self.group, axis=0)[:, None, :]
        change = np.where(self.is_read, new - old, 0.0)
        count = self.is_read.sum(axis=-1, keepdims=True)
        change = np.where(self.is_read, change - change.sum(axis=-1, keepdims=True) / count, 0.0)
        return np.asarray(np.sqrt((change**2).sum(axis=(1, 2)) / count.sum(axis=(1, 2))))

    def _top1(self) -> DoubleArray:
        kept_positions = np.take_along_axis(self.positions, self.source, axis=-1)
        old = np.where(self.positions >= FIRST_TOKENS, self.before.logits, -np.inf).argmax(axis=-1)
        new = np.where(kept_positions >= FIRST_TOKENS, self.after.logits, -np.inf).argmax(axis=-1)
        new_source = np.take_along_axis(self.source[:, 0, :], new, axis=-1)
        return np.asarray((old == new_source).mean(axis=-1))

    def _needles(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """How many needles each head looks for, and how many of them it still finds."""
        heads = len(self.before.weights)
        sought, survived = np.zeros(heads, dtype=int), np.zeros(heads, dtype=int)
        for position in self.needles:
            here = (self.positions == position).astype(np.float32)
            weight = (self.before.weights * here).sum(axis=-1, keepdims=True)
            rank = 1 + (self.before.weights > weight).sum(axis=-1)
            is_sought = weight[..., 0] >= SOUGHT_MASS
            kept = (np.take_along_axis(self.positions, self.source, axis=-1) == position) & self.is_read
            new = np.where(kept, self.after.weights, -1.0).max(axis=-1, keepdims=True)
            new_rank = 1 + (self.after.weights > new).sum(axis=-1)
            found = kept.any(axis=-1) & (new_rank <= np.maximum(TOP_TOKENS, rank))
            sought += is_sought.sum(axis=-1)
            survived += (is_sought & found).sum(axis=-1)
        return sought, survived
