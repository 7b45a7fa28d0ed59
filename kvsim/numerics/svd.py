"""Low-rank maps of row vectors, each the optimum of a stated objective, found in fp64.

A map takes a row ``x`` of d channels to ``r`` coordinates ``x @ down`` and back to ``coordinates @ up``. All maps here
are projections (done twice they do what they do once), and the rows of ``up`` are orthonormal, so an error in the
coordinates is as large as the error that it makes in what is restored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray, FloatArray
from kvsim.numerics.floats import round_bf16
from kvsim.numerics.hadamard import largest_block, rotate

_SKETCH_SEED: Final = 2503
"""The sketch is drawn once, whatever the data, so that storing twice gives the same."""


@dataclass(frozen=True, eq=False)
class Projection:
    """A low-rank map.

    Attributes
    ----------
    down : (d, r)
        Channels to coordinates.
    up : (r, d)
        Coordinates to channels; orthonormal rows.
    """

    down: DoubleArray
    up: DoubleArray

    @property
    def rank(self) -> int:
        """Coordinates."""
        return int(self.up.shape[0])

    def reduce(self, rows: FloatArray) -> FloatArray:
        """Coordinates (..., r) of rows (..., d)."""
        return (rows.astype(np.float64) @ self.down).astype(np.float32)

    def restore(self, coordinates: FloatArray) -> FloatArray:
        """Rows (..., d) of coordinates (..., r)."""
        return (coordinates.astype(np.float64) @ self.up).astype(np.float32)

    def turned(self) -> Projection:
        """Same map with coordinates turned by a Hadamard matrix, so that none is larger than the rest by nature.

        In blocks of the largest power of two that divides the rank.
        """
        block = largest_block(self.rank)
        turn = rotate(np.eye(self.rank, dtype=np.float32), block).astype(np.float64)
        return Projection(self.down @ turn, turn.T @ self.up)

    def stored(self, bits: int) -> Projection:
        """Both matrices as an element of ``bits`` holds them: bf16 at 16, as they are at 32."""
        return Projection(_rounded(self.down, bits), _rounded(self.up, bits))


def second_moment(rows: FloatArray) -> DoubleArray:
    """Sum of outer products of rows (..., n, d), over all leading axes: (d, d)."""
    flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    moment: DoubleArray = flat.T @ flat
    return moment


def principal_projection(moment: DoubleArray, rank: int) -> Projection:
    """Best projection of the rows with this second moment: the leading right singular vectors (Eckart-Young)."""
    basis = _leading_eigenvectors(moment, rank)
    return Projection(basis, basis.T)


def query_aware_projection(
    key_moment: DoubleArray, query_moment: DoubleArray, rank: int, *, ridge: float = 0.0
) -> Projection:
    """Projection of keys that changes their products with the queries least (KQ-SVD, arXiv 2512.05916).

    With ``K' K = key_moment`` and ``Q' Q = query_moment`` it minimises ``||K Q' - K down up Q'||_F`` over all maps of
    this rank: K Q' has the left singular vectors U of ``K Q_half`` (``Q_half`` the root of the query moment), and the
    optimum is ``U_r U_r' K Q'``. So ``down`` spans ``Q_half V_r``, and ``up`` regresses K on the coordinates, which is
    also the smallest error of K itself among all optima. The error is the sum of the squared singular values left out.

    Parameters
    ----------
    ridge : float
        Added to the query moment along every direction, as a share of its mean, so that what no known query reads is
        kept by its energy once all that is read has been.
    """
    width = len(key_moment)
    if rank >= width:
        return Projection(np.eye(width), np.eye(width))
    root = _square_root(query_moment + ridge * np.trace(query_moment) / width * np.eye(width))
    down = root @ _leading_eigenvectors(root @ key_moment @ root, rank)
    spread = down.T @ key_moment @ down
    up = np.linalg.pinv(spread, rcond=1e-13, hermitian=True) @ (down.T @ key_moment)
    left, sizes, rows = np.linalg.svd(up, full_matrices=False)
    used = int((sizes > 1e-9 * sizes[0]).sum()) if sizes[0] > 0 else 0
    # Where keys or queries span less than the rank, the coordinates left over are zero.
    mixed = np.zeros((width, rank))
    mixed[:, :used] = down @ (left[:, :used] * sizes[:used])
    return Projection(mixed, _completed(rows[:used].T, rank).T)


def randomised_projection(rows: FloatArray, rank: int, power_iterations: int) -> Projection:
    """Leading right singular vectors of rows (n, d) by a Gaussian sketch with power iterations (arXiv 0909.4061).

    ``rank`` columns are sketched, without oversampling. Where the rows have rank ``rank`` or less, or ``rank`` is d,
    the result is exact.
    """
    matrix = rows.astype(np.float64)
    tokens, width = matrix.shape
    if rank >= width:
        return Projection(np.eye(width), np.eye(width))
    if not tokens:
        return Projection(np.eye(width)[:, :rank], np.eye(width)[:rank])
    sketch = np.random.default_rng(_SKETCH_SEED).standard_normal((width, min(rank, tokens)))
    span = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(power_iterations):
        span = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ span)[0])[0]
    found = np.linalg.svd(span.T @ matrix, full_matrices=False)[2]
    basis = _completed(found.T, rank)
    return Projection(basis, basis.T)


def discarded_energy(moment: DoubleArray, rank: int) -> float:
    """Sum of the squared singular values beyond the leading ``rank``: ||K - K_r||_F^2 of the best K_r."""
    values = np.linalg.eigvalsh(moment)
    return float(np.clip(values[: max(0, len(values) - rank)], 0.0, None).sum())


def discarded_product_energy(key_moment: DoubleArray, query_moment: DoubleArray, rank: int) -> float:
    """Sum of the squared singular values of K Q' beyond the leading ``rank``: the error of its best approximation."""
    root = _square_root(query_moment)
    return discarded_energy(root @ key_moment @ root, rank)


def rank_for_energy(moment: DoubleArray, share: float) -> int:
    """Fewest singular directions that hold ``share`` of the energy of the rows with this second moment."""
    values = np.clip(np.linalg.eigvalsh(moment)[::-1], 0.0, None)
    held = np.cumsum(values) / values.sum()
    return int(np.searchsorted(held, share * (1.0 - 1e-12))) + 1


def logit_error_bound(queries: FloatArray, key_errors: FloatArray, attention_scale: float) -> DoubleArray:
    """Largest change of each logit, (m, n), that key errors (n, d) can make: scale |q| |k - k_r| (Cauchy-Schwarz)."""
    lengths = np.linalg.norm(queries.astype(np.float64), axis=-1)
    errors = np.linalg.norm(key_errors.astype(np.float64), axis=-1)
    bound: DoubleArray = attention_scale * np.outer(lengths, errors)
    return bound


def stored_as(values: FloatArray, bits: int) -> FloatArray:
    """Round to what an element of ``bits`` holds: bf16 at 16, nothing to do at 32.

    Raises
    ------
    InvalidSpec
        Another width.
    """
    if bits == 16:
        return round_bf16(values)
    if bits != 32:
        msg = f"coordinates are kept in 16 or 32 bits before they are encoded, not {bits}"
        raise InvalidSpec(msg)
    return values


def _rounded(matrix: DoubleArray, bits: int) -> DoubleArray:
    return matrix if bits == 32 else stored_as(matrix.astype(np.float32), bits).astype(np.float64)


def _leading_eigenvectors(moment: DoubleArray, rank: int) -> DoubleArray:
    """Columns, largest eigenvalue first; each with its largest entry positive, so that signs are the same anywhere."""
    vectors = np.linalg.eigh(moment)[1][:, ::-1][:, :rank]
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    signed: DoubleArray = vectors * np.where(peaks < 0, -1.0, 1.0)
    return signed


def _square_root(moment: DoubleArray) -> DoubleArray:
    values, vectors = np.linalg.eigh(moment)
    root: DoubleArray = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    return root


def _completed(columns: DoubleArray, rank: int) -> DoubleArray:
    """Add orthonormal columns until there are ``rank``."""
    missing = rank - columns.shape[1]
    if missing <= 0:
        return columns[:, :rank]
    if not columns.shape[1]:
        return np.eye(columns.shape[0])[:, :rank]
    others = np.linalg.qr(columns, mode="complete")[0][:, columns.shape[1] :]
    completed: DoubleArray = np.concatenate((columns, others[:, :missing]), axis=1)
    return completed
