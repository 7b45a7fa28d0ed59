"""What each tier did during a run, on one rank of one replica; added up over replicas for the report."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class TierTally:
    """Copies of one tier. Units and bytes of one rank."""

    stored_units: int = 0
    """Units whose copy into the tier began, from wherever."""
    stored_bytes: int = 0
    demoted_units: int = 0
    """Of those, units that the tier above evicted."""
    promoted_units: int = 0
    """Of those, units that came on their way from a tier below."""
    hit_units: int = 0
    """Units loaded from here to the device."""
    loaded_bytes: int = 0
    link_ticks: int = 0
    """Time that the tier's copies would take alone, latency and coding included."""
    loads: int = 0
    """Loads, each for one prompt."""
    wait_ticks: int = 0
    """Time from the start of loads to their end."""

    def add(self, other: TierTally) -> None:
        """Add another replica's."""
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


@dataclass
class ReloadTally:
    """Look-ups of prompts, and the choices between loading and computing."""

    looked_units: int = 0
    device_units: int = 0
    recomputed_units: int = 0
    """Units computed again although they had been computed before."""
    recompute_ticks: int = 0
    """What computing them was estimated to take."""
    chosen: dict[str, int] = field(default_factory=lambda: {"load": 0, "cut": 0, "compute": 0})
    against_load_ticks: float = 0.0
    against_compute_ticks: float = 0.0

    def add(self, other: ReloadTally) -> None:
        """Add another replica's."""
        for name in ("looked_units", "device_units", "recomputed_units", "recompute_ticks"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name, count in other.chosen.items():
            self.chosen[name] += count
        self.against_load_ticks += other.against_load_ticks
        self.against_compute_ticks += other.against_compute_ticks
