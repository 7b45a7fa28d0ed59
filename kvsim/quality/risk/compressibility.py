"""How compressible a cache is, KV head by KV head: what `kvsim risk` answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from kvsim.compression.selection.weighted_atoms import WeightedAtoms, prompt_queries
from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.query_samples import isotropic_queries, resolved_spread
from kvsim.numerics.weighted_atoms import Atoms, Compressor
from kvsim.quality.dropping import random_eviction_error
from kvsim.quality.risk.comparators import Entries, heaviest, squared_error, squared_output
from kvsim.quality.risk.influence import HeadView, spectrum
from kvsim.quality.risk.search import RESOLUTION, fewest
from kvsim.specs.base import Spec
from kvsim.tensors import KvTensors, LayerKv

SURPRISE_RATIO: Final = 3.0
"""Later queries are called surprising where atoms err this many times as much for them as for known ones; ours."""
BLIND_RATIO: Final = 2.0
"""tr(Sigma) / K is called blind where the finite form predicts an error this many times as large."""


class HeadCompressibility(Spec):
    """One KV head, over the queries that read it. Errors are root mean squares relative to the outputs'."""

    layer: int
    kv_head: int
    effective_tokens: float
    """N_eff = 1 / sum a_i^2, mean over queries."""
    heaviest_weight: float
    """Largest softmax weight of a query, mean over queries."""
    relative_trace: float
    """tr(Sigma) beside the mean squared output: squared error of K random tokens is that over K, by the plain rate."""
    effective_rank: float
    """Of Sigma: exp of the entropy of its eigenvalues' shares."""
    atoms_random: int
    """Tokens for the error target by random eviction, by the finite-influence formula."""
    atoms_compressed: int
    """Weighted atoms for it, measured by bisection."""
    atoms_heavy: int
    """Heavy hitters of the prompt's queries for it, measured by bisection."""
    error_random: float
    """At the budget: random eviction, by the finite-influence formula."""
    error_plain_rate: float
    """At the budget: random eviction by (1 - p) tr(Sigma) / K, which is blind to retrieval."""
    error_compressed: float
    """At the budget: weighted atoms, measured."""
    error_known: float
    """The same with the queries that the atoms were made for."""
    error_heavy: float
    """At the budget: heavy hitters, measured."""

    @property
    def name(self) -> str:
        """Such as L2H0."""
        return f"L{self.layer}H{self.kv_head}"

    @property
    def is_rate_blind(self) -> bool:
        """Whether tr(Sigma) / K misses what random eviction really does."""
        return self.error_random > BLIND_RATIO * self.error_plain_rate

    @property
    def is_surprised(self) -> bool:
        """Whether later queries look at what the known ones did not."""
        return self.error_compressed > SURPRISE_RATIO * self.error_known


class Compressibility(Spec):
    """A whole cache."""

    source: str
    num_layers: int
    num_kv_heads: int
    num_tokens: int
    target_error: float
    budget_atoms: int
    query_aware: bool
    """Whether profiles and heavy hitters are those of the prompt's queries; else of isotropic ones."""
    heads: tuple[HeadCompressibility, ...]

    def share(self, name: str) -> float:
        """Share of all entries that heads need together; ``name`` of `HeadCompressibility`'s atoms."""
        return float(np.mean([getattr(head, name) for head in self.heads])) / self.num_tokens

    @property
    def breaking(self) -> tuple[HeadCompressibility, ...]:
        """Heads by error of the compressor at the budget, the worst first."""
        return tuple(sorted(self.heads, key=lambda head: -head.error_compressed))

    @property
    def worst_layer(self) -> tuple[int, float]:
        """Layer with the largest error of the compressor at the budget, and that: root mean square over heads."""
        errors = {
            layer: float(np.sqrt(np.mean([head.error_compressed**2 for head in self.heads if head.layer == layer])))
            for layer in range(self.num_layers)
        }
        return max(errors.items(), key=lambda one: one[1])


def compressibility(
    kv: KvTensors, target_error: float, budget_atoms: int, progress: Callable[[float], None] | None = None
) -> Compressibility:
    """Measure every KV head of a cache; ``progress`` is told the share done.

    Raises
    ------
    InvalidSpec
        A layer has no queries to measure with; layers hold different numbers of tokens.
    """
    tokens = _tokens(kv)
    places = [(index, head) for index, layer in enumerate(kv.layers) for head in range(layer.num_kv_heads)]
    heads = []
    for done, (index, head) in enumerate(places):
        if progress is not None:
            progress(done / len(places))
        view, sample = _views(kv.layers[index], head, kv.attention_scale, budget_atoms)
        heads.append(_measure(index, head, view, sample, target_error, min(budget_atoms, tokens)))
    return Compressibility(
        source=kv.source,
        num_layers=kv.num_layers,
        num_kv_heads=kv.layers[0].num_kv_heads,
        num_tokens=tokens,
        target_error=target_error,
        budget_atoms=min(budget_atoms, tokens),
        query_aware=bool(kv.layers[0].prompt_queries.size),
        heads=tuple(heads),
    )


def _tokens(kv: KvTensors) -> int:
    counts = {layer.num_tokens for layer in kv.layers}
    if len(counts) > 1:
        msg = f"{kv.source}: layers hold {min(counts)} to {max(counts)} tokens; one budget needs equally many"
        raise InvalidSpec(msg)
    for index, layer in enumerate(kv.layers):
        if not layer.queries.size:
            msg = f"{kv.source}: layer {index} has no queries, so there is nothing to measure with"
            raise InvalidSpec(msg)
    return counts.pop()


def head_view(layer: LayerKv, head: int, attention_scale: float) -> HeadView:
    """One KV head with the queries that come after the prompt."""
    queries = layer.queries.reshape(layer.num_kv_heads, -1, layer.queries.shape[2])[head]
    keys, values, asked = (part.astype(np.float64) for part in (layer.keys[head], layer.values[head], queries))
    return HeadView(keys, values, asked, attention_scale)


def _views(layer: LayerKv, head: int, attention_scale: float, budget: int) -> tuple[HeadView, DoubleArray]:
    """Give the head, and queries that a compressor may know."""
    view = head_view(layer, head, attention_scale)
    window = WeightedAtoms.model_fields["window_size"].default
    if layer.prompt_queries.size:
        return view, prompt_queries(layer, head, window)
    spread = resolved_spread(len(view.keys), budget)
    return view, isotropic_queries(view.keys, attention_scale, window, spread)


def _measure(
    layer: int, head: int, view: HeadView, sample: DoubleArray, target: float, budget: int
) -> HeadCompressibility:
    size = squared_output(view)
    tokens = len(view.keys)
    shares, _ = view.attention()
    order = heaviest(view, sample)
    entries = Atoms.of_tokens(view.keys, view.values)
    compressor = Compressor(sample, view.attention_scale)

    def relative(error: float) -> float:
        return float(np.sqrt(error / size)) if size > 0.0 else 0.0

    def random(count: int) -> tuple[float, float]:
        plain, finite = random_eviction_error(shares[None], view.values[None], count)
        return relative(float(plain.mean())), relative(float(finite.mean()))

    def compressed(count: int) -> float:
        return _relative_error(view, compressor.compress(entries, count))

    def heavy(count: int) -> float:
        kept = order[:count]
        return relative(squared_error(view, Entries.weighted(view.keys[kept], view.values[kept], np.ones(count))))

    known = replace(view, queries=sample)
    found = spectrum(view)
    plain_error, finite_error = random(budget)
    return HeadCompressibility(
        layer=layer,
        kv_head=head,
        effective_tokens=float((1.0 / (shares**2).sum(axis=1)).mean()),
        heaviest_weight=float(shares.max(axis=1).mean()),
        relative_trace=found.trace / size if size > 0.0 else 0.0,
        effective_rank=found.effective_rank,
        atoms_random=fewest(lambda count: random(count)[1] <= target, tokens),
        atoms_compressed=fewest(lambda count: compressed(count) <= target, tokens, RESOLUTION),
        atoms_heavy=fewest(lambda count: heavy(count) <= target, tokens, RESOLUTION),
        error_random=finite_error,
        error_plain_rate=plain_error,
        error_compressed=compressed(budget),
        error_known=_relative_error(known, compressor.compress(entries, budget)),
        error_heavy=heavy(budget),
    )


def _relative_error(view: HeadView, atoms: Atoms) -> float:
    size = squared_output(view)
    return float(np.sqrt(squared_error(view, Entries.of_atoms(atoms)) / size)) if size > 0.0 else 0.0
