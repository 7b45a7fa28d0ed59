"""TurboQuant's two vector quantisers (arXiv 2504.19874), and QJL, which the second is made with.

Norms are rounded to fp16, in which they are stored, before anything is read back.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from kvsim.numerics.arrays import CodeArray, FloatArray
from kvsim.numerics.floats import round_fp16
from kvsim.numerics.lloyd_max import lloyd_max
from kvsim.numerics.rotation import Rotation, RotationKind, gaussian_projection, multiply

CodebookLaw = Literal["beta", "gaussian"]

ROTATION_SEED = 2504
PROJECTION_SEED = 19874


class Coded(NamedTuple):
    """Vectors as `MseQuantiser` stores them: codes, (..., D), and fp16 norms, (..., 1)."""

    codes: CodeArray
    norm: FloatArray


class ProdCoded(NamedTuple):
    """Vectors as `ProdQuantiser` stores them: those codes, signs of the projected residual (0 or 1), and its norm."""

    coded: Coded
    signs: CodeArray
    residual_norm: FloatArray


def lengths(vectors: FloatArray) -> FloatArray:
    """Euclidean norms, (..., 1)."""
    norms: FloatArray = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return norms


def over(vectors: FloatArray, norm: FloatArray) -> FloatArray:
    """Divide vectors, (..., D), by their norms, (..., 1); those of no length stay as they are."""
    safe: FloatArray = np.where(norm > 0, norm, np.float32(1.0))
    quotient: FloatArray = vectors / safe
    return quotient


class MseQuantiser:
    """Algorithm 1: rotate, store each coordinate's nearest Lloyd-Max level, and the norm.

    Parameters
    ----------
    law : {'beta', 'gaussian'}
        Codebook for the exact law of a coordinate in ``dim`` dimensions, or for its limit N(0, 1).
    corrects_norm : bool
        Divide the stored norm by that of the quantised direction, so that vectors keep their length; the paper does
        not. At the optimum of the law quantised directions are shorter than 1 by a factor sqrt(1 - D).
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        *,
        rotation: RotationKind = "dense",
        law: CodebookLaw = "beta",
        corrects_norm: bool = False,
        seed: int = ROTATION_SEED,
    ) -> None:
        self.dim = dim
        self.codebook = lloyd_max(bits, dim if law == "beta" else None)
        self.rotation = Rotation(rotation, dim, seed)
        self._corrects_norm = corrects_norm
        self._unit = np.float32(math.sqrt(dim))

    def quantise(self, vectors: FloatArray) -> Coded:
        """Quantise vectors, (..., dim)."""
        norm = lengths(vectors)
        codes = self.codebook.quantise(over(self.rotation.turn(vectors) * self._unit, norm))
        if self._corrects_norm:
            norm = over(norm * self._unit, lengths(self.codebook.read_back(codes)))
        return Coded(codes, round_fp16(norm))

    def read_back(self, coded: Coded) -> FloatArray:
        """Give the vectors that codes and norms stand for."""
        return self.rotation.back(self.codebook.read_back(coded.codes) * (coded.norm / self._unit))


class Qjl:
    """One bit per coordinate: the signs of S x. Inner products with what is read back are unbiased (lemma 4)."""

    def __init__(self, dim: int, seed: int = PROJECTION_SEED) -> None:
        self._projection = gaussian_projection(dim, seed)
        self._gain = np.float32(math.sqrt(math.pi / 2) / dim)

    def signs(self, vectors: FloatArray) -> CodeArray:
        """Signs of S x for vectors, (..., dim): 1 where it is not negative, else 0."""
        return (multiply(vectors, self._projection.T) >= 0).astype(np.int32)

    def read_back(self, signs: CodeArray, norm: FloatArray) -> FloatArray:
        """Give ``sqrt(pi / 2) / dim * norm * S^T signs``."""
        return multiply(2.0 * signs.astype(np.float32) - 1.0, self._projection) * (self._gain * norm)


class ProdQuantiser:
    """Algorithm 2: Algorithm 1 with a bit less, then QJL of what it leaves over, with the norm of that.

    With 1 bit nothing is left for Algorithm 1, and all is QJL.
    """

    def __init__(
        self,
        dim: int,
        bits: int,
        *,
        rotation: RotationKind = "dense",
        law: CodebookLaw = "beta",
        corrects_norm: bool = False,
        seed: int = ROTATION_SEED,
        projection_seed: int = PROJECTION_SEED,
    ) -> None:
        self.mse = MseQuantiser(
            dim, bits - 1, rotation=rotation, law=law, corrects_norm=corrects_norm and bits > 1, seed=seed
        )
        self.qjl = Qjl(dim, projection_seed)

    def quantise(self, vectors: FloatArray) -> ProdCoded:
        """Quantise vectors, (..., dim)."""
        coded = self.mse.quantise(vectors)
        residual = vectors - self.mse.read_back(coded)
        return ProdCoded(coded, self.qjl.signs(residual), round_fp16(lengths(residual)))

    def read_back(self, stored: ProdCoded) -> FloatArray:
        """Give the vectors that codes, signs and norms stand for."""
        return self.mse.read_back(stored.coded) + self.qjl.read_back(stored.signs, stored.residual_norm)
