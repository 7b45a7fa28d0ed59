"""The whole answer of ``kvsim limit``: curves, points with their gaps, and the tier that is no point."""

from __future__ import annotations

from typing import Final

from kvsim.limit.points import EncodingPoint
from kvsim.limit.token_ids import TokenIdTier
from kvsim.specs.base import Spec
from kvsim.tensors import TensorName

CURVE_BITS: Final = tuple(quarter / 4 for quarter in range(41))
"""Rates at which curves are given: 0 to 10 bits per value."""


class LimitCurve(Spec):
    """Least relative error at each rate of `CURVE_BITS`; curves differ in what the tensors are taken to be."""

    bits_per_value: tuple[float, ...] = CURVE_BITS
    isotropic: tuple[float, ...]
    """4^-R."""
    sphere: tuple[float, ...]
    """Floor for directions in as many dimensions as a head has, norms free."""
    head: tuple[float, ...]
    """Reverse water-filling, each head by itself, variances held out."""
    head_plug_in: tuple[float, ...]
    """The same from plain sample eigenvalues, which understate it."""
    layer: tuple[float, ...]
    """All heads of a layer together, variances held out."""
    layer_plug_in: tuple[float, ...]
    key: tuple[float, ...]
    """Keys alone, each head by itself."""
    value: tuple[float, ...] | None
    """Values alone; None where there are none."""


class HeadLimit(Spec):
    """One K or V vector: error at whole bits, and how far from isotropic it is."""

    tensor: TensorName
    layer: int
    head: int
    before_rope: bool
    """Whether keys are less varied before RoPE, so that undoing it is part of the limit."""
    mean_share: float
    """Energy that lies in the mean over tokens, which a code may store once."""
    saved_bits: float
    """Bits per value that an isotropic vector would need beyond 2 for the error that 2 bits can reach here."""
    distortion_at_bits: tuple[float, ...]
    """At 1, 2, 3 and 4 bits per value."""


class NotMeasured(Spec):
    """A strategy that has no point, with the reason."""

    strategy: str
    reason: str


class LimitAnswer(Spec):
    """Limits of one set of caches, and where encodings lie."""

    source: str
    num_caches: int
    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    num_tokens: int
    """Of all caches together, per head."""
    curve: LimitCurve
    heads: tuple[HeadLimit, ...]
    points: tuple[EncodingPoint, ...]
    not_measured: tuple[NotMeasured, ...]
    token_ids: TokenIdTier | None = None
    notes: tuple[str, ...] = ()
