"""What a plan must hold: memory, the load, service levels, budgets and quality floors, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvsim.compression import Compression
from kvsim.planner.quality import retained
from kvsim.planner.request import PlanRequest
from kvsim.planner.screen import Screened
from kvsim.report import Report
from kvsim.units import format_bytes, format_seconds


class Refusal(NamedTuple):
    """Why a candidate is not feasible."""

    limit: str
    """Which limit, in a word that refusals of a kind share."""
    reason: str


def strategy_refusals(compression: Compression, request: PlanRequest) -> Iterator[Refusal]:
    """Floors that a strategy misses, or is not known to hold."""
    for name, least in request.floors.items():
        found = retained(compression, name)
        if found.share is None:
            if request.unknown_quality == "refuse":
                yield Refusal("unknown quality", f"no published score of {compression.name} on {name}")
        elif found.share < least:
            yield Refusal("quality floor", f"{compression.name} keeps {found.share:.3f} on {name}, below {least:g}")


def refusals(one: Screened, request: PlanRequest, longest_tokens: int, request_rate: float | None) -> Iterator[Refusal]:
    """Limits that a candidate misses by the closed form."""
    if one.longest_tokens < longest_tokens:
        yield Refusal(
            "longest request",
            f"the longest request has {longest_tokens} tokens, and one sequence may have {one.longest_tokens}",
        )
    if not one.carries_load:
        served = f"{one.request_throughput:.3g} of {request_rate:.3g} requests per second are served"
        yield Refusal("load", f"saturated: {served}, and the queue grows without end")
    yield from _service(request, {"ttft_s": one.ttft_s, "tpot_s": one.tpot_s, "e2el_s": one.e2el_s}, "mean")
    yield from _budget(one, request)


def simulated_refusals(report: Report, request: PlanRequest) -> Iterator[Refusal]:
    """Service levels that a simulation's 99th percentiles miss, and requests that it rejects."""
    if report.counts.rejected:
        yield Refusal("longest request", f"{report.counts.rejected} requests are rejected")
    latency = report.latency
    seen = {"ttft_s": latency.ttft, "tpot_s": latency.tpot, "e2el_s": latency.e2el}
    yield from _service(request, {name: stats.p99_s.value for name, stats in seen.items()}, "p99")


def _service(request: PlanRequest, seen: dict[str, float | None], statistic: str) -> Iterator[Refusal]:
    for name, value in seen.items():
        limit = getattr(request.slo, name)
        if limit is not None and value is not None and value > limit:
            spoken = name.removesuffix("_s").upper()
            yield Refusal(
                f"{spoken} target", f"{statistic} {spoken} {format_seconds(value)} exceeds {format_seconds(limit)}"
            )


def _budget(one: Screened, request: PlanRequest) -> Iterator[Refusal]:
    budget, device = request.budget, one.candidate.device
    if budget.usd_per_hour is not None:
        if one.usd_per_hour is None:
            yield Refusal("unknown price", f"no price of {device} is known; give one under prices")
        elif one.usd_per_hour > budget.usd_per_hour:
            yield Refusal("dollars per hour", f"${one.usd_per_hour:.2f}/h exceeds ${budget.usd_per_hour:.2f}/h")
    if budget.watts is not None:
        if one.watts_tdp is None:
            yield Refusal("unknown TDP", f"no source states the TDP of {device}")
        elif one.watts_tdp > budget.watts:
            yield Refusal("watts", f"TDP {one.watts_tdp:.0f} W exceeds {budget.watts:.0f} W")
    if budget.device_memory is not None and one.device_memory_bytes > budget.device_memory:
        sizes = (format_bytes(one.device_memory_bytes), format_bytes(budget.device_memory))
        yield Refusal("device memory", f"{sizes[0]} of a device exceed {sizes[1]}")
    if budget.sequence_kv is not None and one.sequence_kv_bytes > budget.sequence_kv:
        sizes = (format_bytes(one.sequence_kv_bytes), format_bytes(budget.sequence_kv))
        yield Refusal("KV per sequence", f"{sizes[0]} of a mean sequence exceed {sizes[1]}")
