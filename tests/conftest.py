"""Hand-made reports: what the layers above the simulator need to be tested without it."""

# ruff: noqa: E402  (the switch below must be set before numpy is imported)

from __future__ import annotations

import os

# Matrices are small, and tests run in parallel processes: a thread pool for each costs many times what it gives.
for switch in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(switch, "1")

from collections.abc import Callable
from datetime import date

import pytest
from hypothesis import settings

from kvsim.ops import Component
from kvsim.report import (
    BasisShare,
    Cost,
    Counts,
    Effects,
    Energy,
    Figure,
    KvCapacity,
    Latency,
    LatencyStats,
    MemoryTerm,
    Provenance,
    Quality,
    Report,
    Throughput,
    TimeShare,
)  # fmt: skip
from kvsim.scenario import Scenario
from kvsim.specs.base import Basis
from kvsim.specs.price import Price

MakeReport = Callable[..., Report]

# How long an example takes says nothing on a busy machine.
settings.register_profile("kvsim", deadline=None)
settings.load_profile("kvsim")


def figure(value: float | None, band: float = 0.2) -> Figure:
    if value is None:
        return Figure(value=None)
    return Figure(value=value, low=value * (1 - band), high=value * (1 + band), basis=Basis.DATASHEET)


def latency_stats(mean_s: float, count: int) -> LatencyStats:
    return LatencyStats(
        count=count,
        mean_s=figure(mean_s),
        median_s=figure(mean_s * 0.9),
        std_s=figure(mean_s * 0.3),
        p90_s=figure(mean_s * 1.5),
        p95_s=figure(mean_s * 1.8),
        p99_s=figure(mean_s * 3 if count >= 100 else None),
    )


def build_report(
    scenario: Scenario | None = None,
    strategy: str | None = None,
    *,
    fold: float = 1.0,
    count: int = 200,
    priced: bool = True,
    attainment: float | None = None,
    notes: tuple[str, ...] = (),
    method: str = "simulation",
) -> Report:
    """A consistent, made-up report: KV ``fold`` raises capacity and lowers TPOT a little."""
    scenario = scenario or Scenario(model="llama-3.1-8b", device="h100-sxm", workload="chat")
    tpot_s = 0.02 / fold**0.3
    price = Price(
        device="h100-sxm", provider="example cloud", commitment="on_demand", usd_per_device_hour=2.5,
        as_of=date(2026, 1, 1), source="made up for tests",
    )  # fmt: skip
    return Report(
        method=method,
        strategy=strategy or scenario.compression.name,
        scenario=scenario,
        kv=KvCapacity(
            kv_bytes_per_token=131072 / fold, native_kv_bytes_per_token=131072.0, fold=fold,
            compression_ratio=1 - 1 / fold, block_size=16, num_blocks=25000, capacity_tokens=round(400_000 * fold),
            sequence_tokens=1366, sequence_kv_bytes=1366 * 131072 / fold, max_concurrency=292.8 * fold,
            peak_kv_utilization=0.8, basis=Basis.LITERATURE,
        ),
        memory=(
            MemoryTerm(name="system", size_bytes=0.8e9, basis=Basis.LITERATURE, formula="capacity x 0.01"),
            MemoryTerm(name="weights", size_bytes=16.1e9, basis=Basis.DATASHEET, formula="parameters x bits / 8"),
            MemoryTerm(name="engine", size_bytes=2.5e9, basis=Basis.LITERATURE, formula="activations"),
            MemoryTerm(name="kv_pool", size_bytes=60e9, basis=Basis.LITERATURE, formula="0.92 x usable - rest"),
            MemoryTerm(name="free", size_bytes=6.5e9, basis=Basis.LITERATURE, formula="usable - all"),
        ),
        duration_s=figure(3600.0),
        queue_delay_mean_s=figure(0.01),
        request_overhead_s=figure(0.0085),
        latency=Latency(
            ttft=latency_stats(0.1 * (1 + 0.05 * fold), count), tpot=latency_stats(tpot_s, count),
            itl=latency_stats(tpot_s, count * 100), e2el=latency_stats(0.1 + 210 * tpot_s, count),
        ),
        throughput=Throughput(
            request_throughput=figure(5.4), output_throughput=figure(1100.0 * fold**0.2),
            total_token_throughput=figure(7300.0), request_goodput=figure(attainment),
            slo_attainment=figure(attainment, 0.0),
        ),
        counts=Counts(
            num_prompts=count, completed=count, rejected=0, total_input_tokens=count * 1155,
            total_output_tokens=count * 211, cached_prompt_tokens=0, recomputed_tokens=0, preemptions=0,
            engine_steps=12345, max_concurrent_requests=64, max_waiting_requests=3,
        ),
        time_split=tuple(
            TimeShare(component=component, prefill_s=10 * share, decode_s=90 * share, share=share,
                      basis=Basis.DATASHEET)
            for component, share in zip(Component, (0.55, 0.25, 0.08, 0.02, 0.1), strict=True)
        ),
        bottleneck="memory bandwidth (weights)",
        effects=Effects(
            prefill_tax=figure(1 + 0.02 * fold), decode_gain=figure(fold**0.3), capacity_gain=figure(fold),
            queueing_effect=Figure(value=None), reference_batch=32, reference_context_tokens=1260,
        ),
        cost=Cost(
            price=price if priced else None, usd_per_hour=figure(2.5 if priced else None, 0.0),
            usd_per_million_input_tokens=figure(0.1 if priced else None),
            usd_per_million_output_tokens=figure(0.63 if priced else None),
            usd_per_million_total_tokens=figure(0.2 if priced else None),
            tokens_per_usd=figure(5e6 if priced else None), engine_utilization=0.6,
        ),
        energy=Energy(
            joules_per_output_token=figure(0.4), joules_per_total_token=figure(0.06), mean_power_w=figure(450.0)
        ),
        quality=Quality(),
        coverage=(BasisShare(basis=Basis.DATASHEET, share=1.0),),
        provenance=Provenance(
            kvsim_version="0.0.0", scenario_sha256=scenario.fingerprint(), calibration="none (datasheet)",
            device="h100-sxm", model="llama-3.1-8b", model_source="preset", workload_source="preset chat",
            notes=notes,
        ),
    )  # fmt: skip


@pytest.fixture
def make_report() -> MakeReport:
    return build_report
