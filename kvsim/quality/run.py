"""Run strategies on one cache, each with its three kinds of risk side by side and apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from kvsim.compression import Compression, parse_compression
from kvsim.compression.selector import layer_view
from kvsim.errors import KvsimError, NotRunnable
from kvsim.quality.amid import fit_amid, outer_layers, store_amid
from kvsim.quality.dropping import evict
from kvsim.quality.measure import MeasuredRisk, compare_caches, kept_indices
from kvsim.quality.published import published_quality
from kvsim.quality.store import FittedStrategy, StoredCache, is_exempt, needs_calibration
from kvsim.quality.theory import distortion, predict_layer
from kvsim.report import Quality
from kvsim.tensors import KvTensors, SignalName, attend

MERGED_ENTRIES: Final = (
    "its entries are merged or weighted: formulas would take what a survivor stands for as its noise, and bound only "
    "what is dropped"
)
"""Why there is no theory of a selection that merges."""


@dataclass(frozen=True)
class HeadTheory:
    """Predictions for one query head; errors are relative to the output of what was kept, the bound to the whole's.

    Attributes
    ----------
    eviction_bound : float or None
        2 m max ||v|| beside ||o||, rooted means over queries; None where nothing is dropped.
    """

    layer: int
    head: int
    logit_error: float
    output_error: float
    eviction_bound: float | None
    cautions: frozenset[str]


@dataclass(frozen=True)
class TheoryRisk:
    """Predictions for a cache."""

    heads: tuple[HeadTheory, ...]

    @property
    def output_error(self) -> float:
        """Root mean square over heads."""
        return float(np.sqrt(np.mean([head.output_error**2 for head in self.heads])))

    @property
    def logit_error(self) -> float:
        """Mean over heads."""
        return float(np.mean([head.logit_error for head in self.heads]))

    @property
    def eviction_bound(self) -> float | None:
        """Root mean square over heads; None where nothing is dropped."""
        bounds = [head.eviction_bound for head in self.heads if head.eviction_bound is not None]
        return float(np.sqrt(np.sum(np.square(bounds)) / len(self.heads))) if bounds else None

    @property
    def cautions(self) -> dict[str, int]:
        """Why predictions may fail -> how many heads it concerns, the most frequent first."""
        return dict(Counter(name for head in self.heads for name in sorted(head.cautions)).most_common())


@dataclass(frozen=True)
class ContinuationRisk:
    """What the model itself says of what comes next, with the stored cache in the place of its own.

    Attributes
    ----------
    kl : tuple of float
        Per token of the continuation, KL divergence in nats from the model's next-token distribution.
    top1_agreement : float
        Share of tokens whose likeliest successor is the same.
    """

    kl: tuple[float, ...]
    top1_agreement: float

    @property
    def mean_kl(self) -> float:
        """Mean over tokens, in nats."""
        return float(np.mean(self.kl))


@dataclass(frozen=True)
class StrategyRisk:
    """One strategy on one cache.

    ``reason`` says why it did not run, and then only ``published`` is known. ``theory_reason`` says why formulas do not
    apply to what was measured: ``theory`` is then unknown. ``native_layers`` is how many layers the
    format itself leaves alone (vLLM's TurboQuant: the first and last two), which is much of a cache of few layers.
    ``outer_layers`` is how many it leaves alone at either end of the deeper model that this cache is from the middle
    of; they are in no figure.
    """

    strategy: str
    published: Quality
    theory: TheoryRisk | None = None
    measured: MeasuredRisk | None = None
    continuation: ContinuationRisk | None = None
    reason: str | None = None
    theory_reason: str | None = None
    native_layers: int = 0
    outer_layers: int = 0


Continue = Callable[[Compression, StoredCache], ContinuationRisk]


def run_strategies(
    kv: KvTensors,
    names: Iterable[str],
    samples: Callable[[], Sequence[KvTensors]] = tuple,
    continuation: Continue | None = None,
    progress: Callable[[float], None] | None = None,
    *,
    amid: bool = False,
) -> tuple[StrategyRisk, ...]:
    """Run each strategy; one that cannot run keeps a row with the reason.

    ``samples`` gives caches of other sequences of the same model, and is asked only where a method calibrates;
    ``continuation`` runs the model itself on. ``progress`` is told the share done. ``amid``: the layers stand for those
    in the middle of a deeper model, so that a format exempts none of them.

    Raises
    ------
    UnknownName, InvalidSpec
        A name is wrong; or the cache has no queries.
    """
    parsed = [(name, parse_compression(name)) for name in names]
    rows = []
    for position, (name, compression) in enumerate(parsed):
        if progress is not None:
            progress(position / len(parsed))
        published = published_quality(compression)
        outer = outer_layers(compression, kv) if amid else 0
        try:
            stored = store_amid(_fit(compression, samples, outer), kv, outer)
        except KvsimError as error:
            rows.append(StrategyRisk(name, published, reason=_reason(error)))
            continue
        no_theory = MERGED_ENTRIES if compression.selection.merges else None
        rows.append(
            StrategyRisk(
                name,
                published,
                theory=None if no_theory else predict(kv, stored),
                measured=compare_caches(kv, stored),
                continuation=None if continuation is None else continuation(compression, stored),
                theory_reason=no_theory,
                native_layers=0 if outer else _num_exempt(compression, kv),
                outer_layers=outer,
            )
        )
    return tuple(rows)


def needed_signals(names: Iterable[str], *, to_fit: bool = False) -> frozenset[SignalName]:
    """What the strategies want to know of a prompt beside K, V and Q, or of sequences that they calibrate on."""
    selections = [parse_compression(name).selection for name in names]
    wanted = (one.fits_on_signals if to_fit else one.needs_signals for one in selections)
    return frozenset[SignalName]().union(*wanted)


def _num_exempt(compression: Compression, kv: KvTensors) -> int:
    return sum(is_exempt(compression, layer_view(kv, index)) for index in range(kv.num_layers))


def _fit(compression: Compression, samples: Callable[[], Sequence[KvTensors]], outer: int) -> FittedStrategy:
    if not needs_calibration(compression):
        return fit_amid(compression, (), outer)
    seen = samples()
    if not seen:
        raise NotRunnable(
            compression.name, "it calibrates on other sequences of the model, and none are given (--calibrate)"
        )
    return fit_amid(compression, seen, outer)


def _reason(error: KvsimError) -> str:
    return error.reason if isinstance(error, NotRunnable) else str(error)


def predict(kv: KvTensors, stored: StoredCache) -> TheoryRisk:
    """Predict the risk of what was stored from its distortion and from what was dropped."""
    heads: list[HeadTheory] = []
    for index in range(kv.num_layers):
        heads += _predict_layer(kv, stored, index)
    return TheoryRisk(tuple(heads))


def _predict_layer(kv: KvTensors, stored: StoredCache, index: int) -> list[HeadTheory]:
    before, after, mask = kv.layers[index], stored.kv.layers[index], stored.read_masks[index]
    source = kept_indices(before, after)
    kept = replace(before.take(source), log_weights=after.log_weights)
    theory = predict_layer(kept, kv.attention_scale, distortion(kept, after), mask)
    bounds = _eviction_bounds(kv, stored, index)
    return [
        HeadTheory(
            index,
            head,
            logit_error=float(theory.logit_error[head]),
            output_error=float(theory.output_error[head]),
            eviction_bound=None if bounds is None else float(bounds[head]),
            cautions=theory.cautions[head],
        )
        for head in range(len(theory.output_error))
    ]


def _eviction_bounds(kv: KvTensors, stored: StoredCache, index: int) -> np.ndarray | None:
    """2 m max ||v|| beside ||o||, (Hq,); None where all tokens are read."""
    before, after, mask = kv.layers[index], stored.kv.layers[index], stored.read_masks[index]
    held = np.repeat(after.is_seen, before.group_size, axis=0)[:, None, :]
    if mask is None and after.num_tokens == before.num_tokens and held.all():
        return None
    seen = attend(before, kv.attention_scale)
    source = np.repeat(kept_indices(before, after), before.group_size, axis=0)[:, None, :]
    shape = (*seen.weights.shape[:2], after.num_tokens)
    is_kept = np.zeros(seen.weights.shape, dtype=bool)
    is_read = np.broadcast_to(held, shape) if mask is None else mask.reshape(shape) & held
    np.put_along_axis(is_kept, np.broadcast_to(source, shape), is_read, axis=-1)
    values = np.repeat(before.values, before.group_size, axis=0)
    bound = evict(seen.weights, values, is_kept).bound
    size = (seen.outputs.astype(np.float64) ** 2).sum(axis=(1, 2))
    return np.asarray(np.sqrt((bound**2).sum(axis=1) / np.where(size > 0.0, size, 1.0)))
