"""A number with its band and what it rests on."""

from __future__ import annotations

from kvsim.specs.base import Basis, Spec


class Figure(Spec):
    """A number with what it rests on. ``value`` None is unknown; low and high are the band where a model made it."""

    value: float | None
    low: float | None = None
    high: float | None = None
    basis: Basis | None = None
