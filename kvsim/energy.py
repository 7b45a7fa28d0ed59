"""Joules of a run from the device's TDP and the share of it that each phase draws."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.cost.priors import Edge
from kvsim.deployment import Deployment


@dataclass(frozen=True)
class PhaseSeconds:
    """How long the replicas together spent prefilling, decoding and idle."""

    prefill_s: float
    decode_s: float
    idle_s: float

    @property
    def busy_s(self) -> float:
        """Prefill and decode."""
        return self.prefill_s + self.decode_s

    @property
    def total_s(self) -> float:
        """Busy and idle."""
        return self.busy_s + self.idle_s


def energy_joules(deployment: Deployment, phases: PhaseSeconds, edge: Edge) -> float | None:
    """Energy of all devices; None where the TDP is unknown."""
    if deployment.device.tdp is None:
        return None
    table = deployment.priors.power_fraction
    weighted_s = (
        phases.prefill_s * table["prefill"].cost(edge)
        + phases.decode_s * table["decode"].cost(edge)
        + phases.idle_s * table["idle"].cost(edge)
    )
    return deployment.device.tdp.value * weighted_s * deployment.parallelism.num_devices
