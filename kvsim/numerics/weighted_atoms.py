"""K weighted atoms in the place of n entries of a KV cache, for one KV head.

In the manner of "The risk of KV cache compression" (arXiv 2607.01520), whose text was not available. From its abstract
and a secondary note: a cache as a measure that a sparse, weighted one approximates; response profiles; balanced
clustering; a parallel prefix form and a streaming form. Ours: everything else, in particular the heavy half, the
halving along widest directions, the sketch of profiles, and what an atom is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np

from kvsim.numerics.arrays import DoubleArray, IntArray
from kvsim.numerics.balanced_clusters import add_up, balanced_clusters
from kvsim.numerics.response_profiles import Reading, read, sketch, squared_removal

Weighting: TypeAlias = Literal["attention", "count"]
_LEAST_SHARE: Final = 1e-12
"""Beside an entry's attention, this much of an even share, so that entries that nobody sees have a mean too."""


@dataclass(frozen=True, eq=False)
class Atoms:
    """Entries of one KV head, ascending by ``newest``.

    Attributes
    ----------
    keys : (n, D)
    values : (n, Dv)
    log_weights : (n,)
        Added to their logits.
    sizes : (n,)
        Tokens that each stands for.
    newest : (n,)
        Index of the newest of these.
    """

    keys: DoubleArray
    values: DoubleArray
    log_weights: DoubleArray
    sizes: DoubleArray
    newest: IntArray

    @staticmethod
    def of_tokens(keys: DoubleArray, values: DoubleArray, first: int = 0) -> Atoms:
        """Tokens as they are; ``first`` is the index of the first."""
        count = len(keys)
        return Atoms(keys, values, np.zeros(count), np.ones(count), np.arange(first, first + count))

    def __len__(self) -> int:
        """Entries."""
        return len(self.keys)

    def take(self, chosen: IntArray | slice) -> Atoms:
        """Some of them, ``chosen`` ascending."""
        return Atoms(
            self.keys[chosen], self.values[chosen], self.log_weights[chosen], self.sizes[chosen], self.newest[chosen]
        )

    @staticmethod
    def joined(several: Sequence[Atoms]) -> Atoms:
        """All of them in order of ``newest``."""
        together = Atoms(
            np.concatenate([one.keys for one in several]),
            np.concatenate([one.values for one in several]),
            np.concatenate([one.log_weights for one in several]),
            np.concatenate([one.sizes for one in several]),
            np.concatenate([one.newest for one in several]),
        )
        return together.take(np.argsort(together.newest, kind="stable"))


@dataclass(frozen=True, eq=False)
class Compressor:
    """Makes K atoms of more entries, for queries like those of a sample.

    The newest entry and the entries whose removal would do most stay as they are, K x ``heavy_fraction`` in all; the
    others go into balanced clusters of their profiles, and each cluster becomes one atom. Half and half needs about
    twice the atoms of the better of heavy entries alone and clusters alone.

    Attributes
    ----------
    queries : (m, D)
        All of which see all entries, as queries to come will.
    attention_scale : float
    weighting : "attention" or "count"
        ``count``: the mean of a cluster's members by tokens, at ln of their number; the weights add up to n.
        ``attention``: the mean by the attention that the sample gives them, at the weight at which the sample gives the
        atom what it gave the members, but never more than all merged tokens.
    heavy_fraction : float
    kernel_size : int
        Neighbouring entries over which the effect of a removal is averaged: what stands beside a token that the sample
        looks at will be looked at next (SnapKV's pooling). 1 leaves every entry to itself.
    """

    queries: DoubleArray
    attention_scale: float
    weighting: Weighting = "attention"
    heavy_fraction: float = 0.5
    kernel_size: int = 1

    def logits(self, atoms: Atoms) -> DoubleArray:
        """Of all queries and entries, (m, n), log-weights included."""
        return np.asarray(self.attention_scale * (self.queries @ atoms.keys.T) + atoms.log_weights)

    def num_heavy(self, count: int) -> int:
        """Entries among ``count`` atoms that stay as they are: all but one at most."""
        return min(count - 1, max(1, int(count * self.heavy_fraction)))

    def compress(self, atoms: Atoms, count: int, reading: Reading | None = None) -> Atoms:
        """Leave ``count`` atoms; fewer entries come back as they are.

        ``reading`` is what the queries read of the whole cache where ``atoms`` is a part of it.
        """
        if count >= len(atoms):
            return atoms
        logits = self.logits(atoms)
        seen = reading or read(logits, atoms.values)
        shares = seen.shares(logits)
        loss = _pooled(squared_removal(shares, atoms.values, seen.outputs), self.kernel_size)
        order = np.argsort(-loss, kind="stable")
        newest = len(atoms) - 1
        order = np.concatenate(([newest], order[order != newest]))
        heavy = self.num_heavy(count)
        rest = np.sort(order[heavy:])
        features = sketch(shares[:, rest], atoms.values[rest], seen.outputs)
        labels = balanced_clusters(features, atoms.sizes[rest], count - heavy)
        merged = self._merge(atoms.take(rest), labels, count - heavy, shares[:, rest].mean(axis=0), seen)
        return Atoms.joined((atoms.take(np.sort(order[:heavy])), merged))

    def _merge(self, atoms: Atoms, labels: IntArray, count: int, mass: DoubleArray, seen: Reading) -> Atoms:
        """Make an atom of each cluster; ``mass`` is the attention that entries get."""
        weights = np.exp(atoms.log_weights)
        by_count = self.weighting == "count"
        parts = weights if by_count else mass + _LEAST_SHARE * weights / weights.sum()
        held = add_up(labels, parts, count)
        keys, values = (add_up(labels, parts[:, None] * rows, count) / held[:, None]
                        for rows in (atoms.keys, atoms.values))  # fmt: skip
        newest = np.zeros(count, dtype=np.int64)
        np.maximum.at(newest, labels, atoms.newest)
        sizes = add_up(labels, atoms.sizes, count)
        plain = Atoms(keys, values, np.zeros(count), sizes, newest)
        log_weights = np.log(held) if by_count else self._matching(plain, held, seen)
        return Atoms(keys, values, log_weights, sizes, newest)

    def _matching(self, atoms: Atoms, mass: DoubleArray, seen: Reading) -> DoubleArray:
        """Log-weights at which the sample gives atoms their ``mass``; none outweighs all the tokens merged."""
        apart = self.logits(atoms) - seen.log_normaliser[:, None]
        top = apart.max(axis=0)
        received = top + np.log(np.exp(apart - top).mean(axis=0))
        return np.asarray(np.minimum(np.log(mass) - received, np.log(atoms.sizes.sum())))

    def compress_blocks(self, atoms: Atoms, count: int, block_tokens: int) -> Atoms:
        """Parallel form: compress blocks of the cache each by itself, then join neighbours in a tree.

        All that blocks share is what the queries read of the whole cache, which prefill's attention gives.
        """
        if count >= len(atoms):
            return atoms
        reading = read(self.logits(atoms), atoms.values)
        starts = range(0, len(atoms), block_tokens)
        level = [self.compress(atoms.take(slice(start, start + block_tokens)), count, reading) for start in starts]
        while len(level) > 1:
            pairs = [level[index : index + 2] for index in range(0, len(level), 2)]
            level = [self.compress(Atoms.joined(pair), count, reading) for pair in pairs]
        return level[0]


def _pooled(scores: DoubleArray, kernel_size: int) -> DoubleArray:
    """Mean over ``kernel_size`` neighbours, with zeros beyond the ends."""
    before = kernel_size // 2
    return np.asarray(np.convolve(scores, np.full(kernel_size, 1.0 / kernel_size))[before : before + len(scores)])


@dataclass(eq=False)
class AtomStream:
    """Streaming form: K atoms and a buffer of new tokens; when it is full, both become K atoms again.

    What the sample reads is taken from the atoms then held, since the tokens are gone.
    """

    compressor: Compressor
    count: int
    buffer_tokens: int
    seen_tokens: int = 0
    _held: list[Atoms] = field(default_factory=list)

    def append(self, keys: DoubleArray, values: DoubleArray) -> None:
        """Take in the next tokens, (t, D) and (t, Dv)."""
        start = 0
        while start < len(keys):
            stop = min(len(keys), start + self.count + self.buffer_tokens - self.num_entries)
            self._held.append(Atoms.of_tokens(keys[start:stop], values[start:stop], self.seen_tokens))
            self.seen_tokens += stop - start
            start = stop
            if self.num_entries == self.count + self.buffer_tokens:
                self._held = [self.compressor.compress(self.atoms, self.count)]

    @property
    def num_entries(self) -> int:
        """Atoms and waiting tokens."""
        return sum(map(len, self._held))

    @property
    def atoms(self) -> Atoms:
        """Everything held, the buffer included."""
        return Atoms.joined(self._held)
