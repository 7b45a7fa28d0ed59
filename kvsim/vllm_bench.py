"""A report in the shape of ``vllm bench serve --save-result``."""

from __future__ import annotations

from typing import Any

from kvsim.metrics import LATENCY_NAMES, METRIC_BY_TAG, read
from kvsim.report import Report
from kvsim.specs.workload import ConcurrencyArrivals, GammaArrivals, PoissonArrivals, SyntheticWorkload, TraceWorkload


def to_vllm_bench(report: Report) -> dict[str, Any]:
    """Give the report in vLLM's keys: milliseconds, None for unknown."""
    scenario = report.scenario
    counts = report.counts
    result: dict[str, Any] = {
        "backend": "kvsim",
        "label": report.strategy,
        "model_id": scenario.model,
        "tokenizer_id": None,
        "num_prompts": counts.num_prompts,
        **_load_keys(report),
    }
    tags = (
        "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
        "request_goodput", "output_throughput", "total_token_throughput", "max_concurrent_requests",
    )  # fmt: skip
    result |= {tag: read(report, METRIC_BY_TAG[tag]).value for tag in tags}
    result["max_output_tokens_per_s"] = None
    for name in LATENCY_NAMES:
        for statistic in ("mean", "median", "std", "p90", "p95", "p99"):
            result[f"{statistic}_{name}_ms"] = read(report, METRIC_BY_TAG[f"{statistic}_{name}_ms"]).value
        result[f"p50_{name}_ms"] = result[f"median_{name}_ms"]
    return result


def _load_keys(report: Report) -> dict[str, Any]:
    """Arrival options as vLLM names them; ``inf`` is everything at once, None is not known from the scenario."""
    workload = report.scenario.workload
    arrivals = workload.arrivals if isinstance(workload, (SyntheticWorkload, TraceWorkload)) else None
    rate = getattr(arrivals, "request_rate", None)
    burstiness: float | None = None
    if isinstance(arrivals, GammaArrivals):
        burstiness = arrivals.burstiness
    elif isinstance(arrivals, PoissonArrivals):
        burstiness = 1.0
    concurrency = arrivals.max_concurrency if isinstance(arrivals, ConcurrencyArrivals) else None
    everything_at_once = arrivals is not None and arrivals.kind in ("burst", "concurrency")
    return {
        "request_rate": "inf" if everything_at_once else rate,
        "burstiness": burstiness,
        "max_concurrency": concurrency,
    }
