"""Response profiles of a KV head: their covariance Sigma, its spectrum, and the rates that go with it.

IF_i(q) = n a_i(q) (v_i - o(q)) is the influence of token i on query q, Sigma the covariance of these over tokens, as an
operator on functions of q with the mean over a query sample nu as inner product. The rates are those that a secondary
note gives for arXiv 2607.01520 (tail_{K/3}(Sigma) / K, tr(Sigma) / K, log(2 + t / K) / K tr(Sigma)), of squared errors,
up to constants that are not known; that Sigma is this covariance is a reconstruction.

tr(Sigma) / K is blind to retrieval: where one weight tends to 1, v_i = o, and the influence of the very token that must
not go vanishes. `kvsim.quality.dropping.random_eviction_error` has the finite form beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.response_profiles import Reading, read, squared_influence

MAX_ORDER: Final = 2048
"""Rows of a Gram matrix: 32 MiB, and seconds to decompose."""


@dataclass(frozen=True, eq=False)
class HeadView:
    """One KV head with a sample of queries that read it: all in fp64.

    Attributes
    ----------
    keys : (n, D)
    values : (n, Dv)
    queries : (m, D)
        Of all query heads that read the head.
    attention_scale : float
    """

    keys: DoubleArray
    values: DoubleArray
    queries: DoubleArray
    attention_scale: float

    @property
    def logits(self) -> DoubleArray:
        """(m, n)."""
        return np.asarray(self.attention_scale * (self.queries @ self.keys.T))

    def attention(self) -> tuple[DoubleArray, Reading]:
        """Softmax weights (m, n), and what is read."""
        logits = self.logits
        reading = read(logits, self.values)
        return reading.shares(logits), reading


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of Sigma, largest first, and its trace, which is exact where eigenvalues are of fewer queries."""

    eigenvalues: DoubleArray
    trace: float

    def tail(self, rank: float) -> float:
        """Sum of the eigenvalues after the first floor(``rank``)."""
        return float(self.eigenvalues[int(rank) :].sum())

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of eigenvalues' shares (Roy and Vetterli, EUSIPCO 2007); 0 where all vanish."""
        total = self.eigenvalues.sum()
        if total <= 0.0:
            return 0.0
        shares = self.eigenvalues[self.eigenvalues > 0.0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def query_aware_rate(self, atoms: int) -> float:
        """tail_{K/3}(Sigma) / K."""
        return self.tail(atoms / 3) / atoms

    def query_agnostic_rate(self, atoms: int) -> float:
        """tr(Sigma) / K."""
        return self.trace / atoms

    def streaming_rate(self, atoms: int, tokens: int) -> float:
        """log(2 + t / K) / K tr(Sigma)."""
        return float(np.log(2.0 + tokens / atoms)) * self.trace / atoms


def spectrum(view: HeadView, max_order: int = MAX_ORDER) -> Spectrum:
    """Decompose Sigma through the smaller of two Gram matrices.

    By tokens, (n, n), where n is at most ``max_order``; else by queries and channels, with as many queries of the
    sample, evenly chosen, as ``max_order`` rows hold, scaled to the trace over all. Profiles, (n, m Dv), are never held
    whole.
    """
    shares, reading = view.attention()
    tokens = len(view.keys)
    trace = float(tokens * squared_influence(shares, view.values, reading.outputs).sum())
    if tokens <= max_order:
        gram = _by_tokens(shares, view.values, reading.outputs)
    else:
        some = np.unique(np.linspace(0, len(shares) - 1, max(1, max_order // view.values.shape[1])).astype(np.int64))
        gram = _by_queries(shares[some], view.values, reading.outputs[some], max_order)
    found = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
    total = found.sum()
    return Spectrum(np.asarray(found * (trace / total if total > 0.0 else 1.0)), trace)


def _by_tokens(shares: DoubleArray, values: DoubleArray, outputs: DoubleArray) -> DoubleArray:
    """Gram matrix n / m sum_q a_i a_j (v_i - o).(v_j - o), (n, n)."""
    crossed = (shares * (outputs @ values.T)).T @ shares
    sizes = (shares * (outputs**2).sum(axis=1)[:, None]).T @ shares
    products = (shares.T @ shares) * (values @ values.T) - crossed - crossed.T + sizes
    return np.asarray(products * (shares.shape[1] / shares.shape[0]))


def _by_queries(shares: DoubleArray, values: DoubleArray, outputs: DoubleArray, block: int) -> DoubleArray:
    """The same operator on functions of (q, channel), (m Dv, m Dv), added up over blocks of tokens."""
    count, tokens = shares.shape
    gram = np.zeros((outputs.size, outputs.size))
    for start in range(0, tokens, block):
        part = slice(start, start + block)
        apart = values[part].T - outputs[:, :, None]
        profiles = (shares[:, None, part] * apart).reshape(outputs.size, -1)
        gram += profiles @ profiles.T
    return np.asarray(gram * (tokens / count))
