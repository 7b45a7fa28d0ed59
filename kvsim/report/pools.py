"""Two pools and what crossed between them."""

from __future__ import annotations

from typing import Literal

from kvsim.report.figure import Figure
from kvsim.report.memory import MemoryTerm
from kvsim.specs.base import Spec


class PoolReport(Spec):
    """One pool of a disaggregated deployment. What only a simulation counts is None in an estimate."""

    role: Literal["prefill", "decode"]
    device: str
    num_replicas: int
    tensor_parallel_size: int
    memory: tuple[MemoryTerm, ...]
    """Per device."""
    num_blocks: int
    """Of one replica."""
    peak_kv_utilization: float | None
    """Largest share of a replica's pool in use; KV that has not left yet counts on the prefill side."""
    utilization: Figure
    """Share of the run in which the replicas' engines were busy, their mean."""
    engine_steps: int | None
    preemptions: int | None
    recomputed_tokens: int | None
    cached_prompt_tokens: int | None
    max_running: int | None
    """Most sequences with a seat in one replica."""
    max_waiting: int | None
    """Longest queue of one replica; on the decode side, sequences whose KV waits for room."""
    usd_per_hour: Figure


class TransferReport(Spec):
    """KV between the pools. Means are per sequence that crossed."""

    link: str
    link_bytes_per_s: Figure
    """Of one port, one direction, efficiency applied."""
    setup_s: Figure
    transfer: str
    encoding: str | None
    """Encoding in transit alone; None where KV moves as it is stored."""
    is_lossy: bool
    """Whether the link's encoding loses precision on top of the strategy's."""
    transfers: int
    wire_bytes: int
    bytes_per_transfer: float | None
    transfer_mean_s: Figure
    """From the start of a transfer to its end."""
    room_wait_mean_s: Figure
    """From a prompt's end until the decode side had room and looked for it."""
    exposed_mean_s: Figure
    """From a prompt's end to the arrival of its KV: what the transfer adds to the gap before the second token."""
    link_utilization: Figure
    """Bytes moved / what the busier side's ports could have moved in the run."""
    max_in_flight: int | None
    source: str


class DisaggregationReport(Spec):
    """Two pools and what crossed between them."""

    pools: tuple[PoolReport, ...]
    transfer: TransferReport
