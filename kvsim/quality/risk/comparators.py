"""Ways to stand for a cache by K entries, beside weighted atoms: all give entries that one formula reads.

These are functions and not strategies: they are here to be measured. Kernel thinning and random-pivoted Cholesky are
short versions of published methods; each says what it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvsim.numerics.arrays import DoubleArray, IntArray
from kvsim.numerics.response_profiles import read
from kvsim.numerics.weighted_atoms import Atoms
from kvsim.quality.risk.influence import HeadView


@dataclass(frozen=True, eq=False)
class Entries:
    """Keys (K, D), and what each adds to numerator (K, Dv) and denominator (K,) of attention, times exp(logit)."""

    keys: DoubleArray
    numerators: DoubleArray
    denominators: DoubleArray

    @staticmethod
    def weighted(keys: DoubleArray, values: DoubleArray, weights: DoubleArray) -> Entries:
        """Entries that stand for ``weights`` tokens each."""
        return Entries(keys, weights[:, None] * values, weights)

    @staticmethod
    def of_atoms(atoms: Atoms) -> Entries:
        """Weighted atoms."""
        return Entries.weighted(atoms.keys, atoms.values, np.exp(atoms.log_weights))

    def read(self, queries: DoubleArray, attention_scale: float) -> DoubleArray:
        """Outputs, (m, Dv)."""
        logits = attention_scale * (queries @ self.keys.T)
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray((scores @ self.numerators) / (scores @ self.denominators)[:, None])


def squared_error(view: HeadView, entries: Entries) -> float:
    """Mean over the view's queries of ||o - o'||^2."""
    whole = read(view.logits, view.values).outputs
    return float(((entries.read(view.queries, view.attention_scale) - whole) ** 2).sum(axis=1).mean())


def squared_output(view: HeadView) -> float:
    """Mean over queries of ||o||^2."""
    return float((read(view.logits, view.values).outputs ** 2).sum(axis=1).mean())


def _tokens(view: HeadView, kept: IntArray) -> Entries:
    return Entries.weighted(view.keys[kept], view.values[kept], np.ones(len(kept)))


def uniform_sample(view: HeadView, count: int, rng: np.random.Generator) -> Entries:
    """Draw ``count`` tokens with replacement, each at weight n / K: numerator and denominator are unbiased."""
    tokens = len(view.keys)
    kept = rng.integers(0, tokens, count)
    return Entries.weighted(view.keys[kept], view.values[kept], np.full(count, tokens / count))


def random_eviction(view: HeadView, count: int, rng: np.random.Generator) -> Entries:
    """Keep ``count`` different tokens and renormalise."""
    return _tokens(view, rng.permutation(len(view.keys))[:count])


def heavy_hitters(view: HeadView, count: int, queries: DoubleArray) -> Entries:
    """Keep the ``count`` tokens with the largest mean attention of ``queries``, (m, D)."""
    return _tokens(view, heaviest(view, queries)[:count])


def heaviest(view: HeadView, queries: DoubleArray) -> IntArray:
    """All tokens, by falling mean attention of ``queries``."""
    logits = view.attention_scale * (queries @ view.keys.T)
    received = read(logits, view.values).shares(logits).mean(axis=0)
    return np.asarray(np.argsort(-received, kind="stable"))


def similarity_scale(view: HeadView, queries: DoubleArray) -> float:
    """By what logits of keys among themselves are multiplied, so that a key is as long as a query is.

    Attention does not change when keys grow and queries shrink by one factor, but exp(k.k') does; WildCat
    (arXiv 2602.10056) rescales for that too. Root mean square lengths about the keys' mean; ours.
    """
    centred = view.keys - view.keys.mean(axis=0)
    return float(view.attention_scale * np.sqrt(np.mean(queries**2) / np.mean(centred**2)))


def pivoted_cholesky(view: HeadView, count: int, queries: DoubleArray, rng: np.random.Generator) -> Entries:
    """Random-pivoted Cholesky of exp(s k.k') with Nystrom weights (WildCat's form, arXiv 2602.10056).

    K keys S are drawn one by one, by what the others leave unexplained of them; W = exp(k_S k_S)^-1 exp(k_S k) makes
    numerators W V and denominators W 1. Keys are centred. WildCat's own choice of temperature, blocks and clipping of
    outputs are left out. Fewer than K where rounding leaves nothing to explain.
    """
    centred = view.keys - view.keys.mean(axis=0)
    scale = similarity_scale(view, queries)
    sizes = scale * (centred**2).sum(axis=1)
    factor = np.zeros((len(centred), count))
    left = np.exp(sizes - sizes.max())
    first_left, pivots = left.copy(), []
    for step in range(count):
        if left.sum() <= 0.0:
            break
        pivot = int(rng.choice(len(left), p=left / left.sum()))
        column = np.exp(scale * (centred @ centred[pivot]) - sizes.max()) - factor[:, :step] @ factor[pivot, :step]
        factor[:, step] = column / np.sqrt(left[pivot])
        # What is below rounding of the start is explained.
        left = np.where(left < 1e-12 * first_left, 0.0, np.maximum(left - factor[:, step] ** 2, 0.0))
        left[pivot] = 0.0
        pivots.append(pivot)
    found = factor[:, : len(pivots)]
    weights = np.linalg.solve(found[pivots].T, found.T)
    return Entries(view.keys[pivots], weights @ view.values, weights.sum(axis=1))
