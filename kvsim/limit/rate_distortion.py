"""Rate-distortion bounds of single vectors: bits per value against mean squared error relative to energy.

4^-R for rotated or isotropic vectors (Shannon; as a floor for vector quantisers of any kind in TurboQuant, arXiv
2504.19874, Theorem 3), what that becomes in finitely many dimensions, and reverse water-filling for a Gaussian with
unequal variances (Cover and Thomas, Elements of Information Theory, Theorem 10.3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, lgamma, log, pi
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray

CAP_STEPS: Final = 4096
QUADRATURE_NODES: Final = 256


def isotropic_distortion(bits: float) -> float:
    """Least relative error of ``bits`` per value on isotropic vectors: 4^-R."""
    return float(4.0**-bits)


def isotropic_bits(distortion: float) -> float:
    """Fewest bits per value for a relative error on isotropic vectors; infinite for 0."""
    if distortion <= 0:
        return inf
    return max(0.0, -0.5 * float(np.log2(distortion)))


def sphere_distortion(bits: float, dim: int) -> float:
    """Least relative error of ``bits * dim`` bits on directions in ``dim`` dimensions, whose norm costs nothing.

    Of all regions that hold 1/M of the sphere a cap has the least moment about its centre, so no code of M words does
    better than M caps would, if they could tile the sphere. The rigorous floor lies below 4^-R at high rates, as a
    direction has only ``dim - 1`` degrees of freedom, and tends to it as ``dim`` grows.

    Raises
    ------
    InvalidSpec
        ``dim`` is less than 2.
    """
    rates, distortions = _cap_curve(dim)
    if bits > rates[-1]:
        # Flat caps: d - 1 degrees of freedom share all further bits.
        return float(distortions[-1] * 4.0 ** (-(bits - rates[-1]) * dim / (dim - 1)))
    return float(np.exp(np.interp(bits, rates, np.log(distortions))))


@lru_cache(maxsize=32)
def _cap_curve(dim: int) -> tuple[DoubleArray, DoubleArray]:
    """Bits per value and relative error of caps from the whole sphere down to tiny ones.

    With s the sine of a cap's angle, its area and its mean cosine are integrals of u^(d-2) / sqrt(1 - u^2) up to s,
    taken here over w = (u / s)^(d-1) = 1 - y^2, which has no pole.
    """
    if dim < 2:
        msg = f"a direction needs at least 2 dimensions, not {dim}"
        raise InvalidSpec(msg)
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    y, weights = (nodes + 1) / 2, weights / 2
    w = 1 - y**2
    sines = np.concatenate(([1.0], np.logspace(-1e-3, -4.5, CAP_STEPS)))
    inner = 1 - (sines[:, None] ** 2) * w ** (2 / (dim - 1))
    mean_secant = (weights * 2 * y / np.sqrt(inner)).sum(axis=1)
    log_half_sphere = 0.5 * log(pi) + lgamma((dim - 1) / 2) - lgamma(dim / 2)
    log_area = (dim - 1) * np.log(sines) + np.log(mean_secant / (dim - 1)) - log_half_sphere
    rates = -log_area / (log(2) * dim)
    # 1 - 1/m^2 with m - 1 summed by itself: m is all but 1 for small caps.
    excess = (weights * 2 * y * (1 / np.sqrt(inner) - 1)).sum(axis=1)
    distortions = excess * (2 + excess) / (1 + excess) ** 2
    return np.concatenate(([0.0], rates)), np.concatenate(([1.0], distortions))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Variances of independent Gaussian components, in units of the mean energy per value.

    Attributes
    ----------
    variances : (N,)
        Descending. They sum to less than N where a known mean was taken off.
    """

    variances: DoubleArray

    @staticmethod
    def of(variances: ArrayLike) -> Spectrum:
        """Sort variances; raise InvalidSpec where one is negative or none is given."""
        given = np.asarray(variances, dtype=np.float64).ravel()
        if given.size == 0 or not np.isfinite(given).all() or (given < 0).any():
            msg = "a spectrum needs at least one variance, each finite and not negative"
            raise InvalidSpec(msg)
        return Spectrum(np.sort(given)[::-1])

    @staticmethod
    def joined(parts: list[Spectrum]) -> Spectrum:
        """Components of several vectors, among which bits may be divided freely."""
        return Spectrum.of(np.concatenate([part.variances for part in parts]))

    @property
    def size(self) -> int:
        """N."""
        return len(self.variances)

    @property
    def variance(self) -> float:
        """Relative error of storing nothing but the mean."""
        return float(self.variances.mean())

    def distortion(self, bits: float) -> float:
        """Least relative error of ``bits`` per value: water fills every component up to one level."""
        positive, logs = self._positive
        if not len(positive):
            return 0.0
        counts = np.arange(1, len(positive) + 1)
        budget = 2 * self.size * bits
        # Bits, times 2 N, that are spent when the water stands at the k-th variance; it never falls with k.
        spent = np.cumsum(logs) - counts * logs
        wet = max(1, int(np.searchsorted(spent, budget, side="left")))
        level = 2.0 ** ((logs[:wet].sum() - budget) / wet)
        return float((wet * level + positive[wet:].sum()) / self.size)

    def bits(self, distortion: float) -> float:
        """Fewest bits per value for a relative error; 0 from `variance` on, infinite for 0 where anything varies."""
        positive, logs = self._positive
        if distortion >= self.variance or not len(positive):
            return 0.0
        if distortion <= 0:
            return inf
        tails = positive.sum() - np.cumsum(positive)
        at_level = np.arange(1, len(positive) + 1) * positive + tails
        wet = max(1, int(np.searchsorted(-at_level, -distortion * self.size, side="left")))
        level = (distortion * self.size - tails[wet - 1]) / wet
        if level <= 0:
            return inf
        return float((logs[:wet].sum() - wet * np.log2(level)) / (2 * self.size))

    @property
    def _positive(self) -> tuple[DoubleArray, DoubleArray]:
        positive = self.variances[self.variances > 0]
        return positive, np.log2(positive)
