"""Where the time went, what that cost, and against what."""

from __future__ import annotations

from kvsim.ops import Component
from kvsim.report.figure import Figure
from kvsim.specs.base import Basis, Spec
from kvsim.specs.price import Price


class TimeShare(Spec):
    """Busy engine time spent on one component, and on what basis it was priced."""

    component: Component
    prefill_s: float
    decode_s: float
    share: float
    basis: Basis


class BasisShare(Spec):
    """Share of busy engine time that rests on one basis."""

    basis: Basis
    share: float


class Effects(Spec):
    """Four separate effects against the uncompressed cache, as ratios to it (1 = no change, higher is better).

    ``prefill_tax`` > 1 means that prefill takes longer. ``queueing_effect`` needs two simulations and is None outside
    a comparison.
    """

    prefill_tax: Figure
    """Prefill seconds of the mean prompt / native."""
    decode_gain: Figure
    """Native decode step seconds / this strategy's, at the same batch and context."""
    capacity_gain: Figure
    """Sequences that fit / native."""
    queueing_effect: Figure
    """Native mean queueing delay / this strategy's."""
    reference_batch: int
    reference_context_tokens: int


class Cost(Spec):
    """Dollars. Input and output split by the engine time that each phase took."""

    price: Price | None
    usd_per_hour: Figure
    """Whole deployment: price x devices."""
    usd_per_million_input_tokens: Figure
    usd_per_million_output_tokens: Figure
    usd_per_million_total_tokens: Figure
    tokens_per_usd: Figure
    engine_utilization: float | None
    """Share of the run in which the engine was busy: an output, not a guess."""


class Energy(Spec):
    """Joules of the devices alone (no host, no cooling)."""

    joules_per_output_token: Figure
    joules_per_total_token: Figure
    mean_power_w: Figure
