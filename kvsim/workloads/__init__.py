"""Workloads made concrete: distributions or a trace become one table of requests."""

from __future__ import annotations

from pathlib import Path

from kvsim.errors import InvalidSpec
from kvsim.requests import RequestTable
from kvsim.specs.workload import TraceWorkload, WorkloadSpec
from kvsim.workloads.synthetic import build_synthetic
from kvsim.workloads.traced import build_traced


def build_requests(workload: WorkloadSpec, *, seed: int, base_dir: Path | None = None) -> RequestTable:
    """Draw or read the requests of a workload; equal arguments give equal tables.

    Parameters
    ----------
    workload
        Distributions or a trace.
    seed
        Zero or more. Each source of randomness has its own stream (``kvsim.workloads.streams``).
    base_dir
        Folder that a trace's relative path is taken from; the current folder when None.

    Raises
    ------
    TraceError
        The trace cannot be read, or has no times to replay.
    InvalidSpec
        Sizes or times beyond what the clock and the table hold.
    """
    if seed < 0:
        msg = f"seed: {seed} is not allowed; must be zero or more"
        raise InvalidSpec(msg)
    if isinstance(workload, TraceWorkload):
        return build_traced(workload, seed, base_dir)
    return build_synthetic(workload, seed)


__all__ = ["build_requests"]
