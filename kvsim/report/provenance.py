"""What made a report, and what is known of quality."""

from __future__ import annotations

from typing import Literal

from kvsim.specs.base import Basis, Spec


class QualityNote(Spec):
    """One published score, or the word unknown."""

    task: str
    metric: str
    value: float
    baseline: float
    model: str
    source: str


class Quality(Spec):
    """What is known of the quality risk; unknown is said, never shown as zero."""

    status: Literal["unknown", "baseline", "published"] = "unknown"
    notes: tuple[QualityNote, ...] = ()


class KernelUsed(Spec):
    """A fitted kernel that priced an operation."""

    operation: str
    kernel: str
    version: str
    artefact: str
    """Hash that names it in the calibration set."""
    basis: Basis


class Provenance(Spec):
    """What made this report."""

    kvsim_version: str
    scenario_sha256: str
    calibration: str
    """Which set priced the operations; the priors' name where none did."""
    device: str
    model: str
    model_source: str
    workload_source: str
    kernels: tuple[KernelUsed, ...] = ()
    """Fitted kernels that priced operations; priors priced the rest."""
    notes: tuple[str, ...] = ()
    """What a reader must know: aliases resolved, features switched off and why, assumptions."""
