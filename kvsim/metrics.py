"""One table of metrics: what a report's numbers are called, in which unit, and which direction is better.

Terminal tables, Parquet columns, pictures and the dashboard all read this table, so a quantity has one name everywhere.
Tags are ``vllm bench serve``'s keys where vLLM has one.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from kvsim.derived_figures import (
    adaptive_figure,
    basis_share,
    output_throughput_per_device,
    pool_utilization,
    tier_figure,
    tier_hit_rate,
    tier_wait_s,
    time_share,
    tokens_per_second_per_user,
    transfer_figure,
)
from kvsim.ops import Component
from kvsim.report import Figure, Report
from kvsim.specs.base import Basis
from kvsim.units import GIBI, KIBI, MEGA, MILLISECONDS_PER_SECOND

ValueKind = Literal["figure", "float", "int", "str"]
LATENCY_NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "gap between tokens",
    "e2el": "end-to-end latency",
}
STATISTIC_NAMES = {"mean": "Mean", "median": "Median", "std": "Std", "p90": "P90", "p95": "P95", "p99": "P99"}


class Reading(NamedTuple):
    """A metric's value in one report, in the metric's unit, with its band and basis where it has them."""

    value: float | int | str | None
    low: float | None = None
    high: float | None = None
    basis: str | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. ``source`` is a dotted path into Report, or a function of it."""

    tag: str
    header: str
    unit: str
    """Of the value in Parquet and JSON."""
    better: Literal["lower", "higher"] | None
    source: str | Callable[[Report], Figure]
    doc: str
    scale: float = 1.0
    """Report's SI value x scale = value in ``unit``."""
    display_unit: str | None = None
    display_scale: float = 1.0
    """Value in ``unit`` x display_scale = value in ``display_unit``."""

    @property
    def kind(self) -> ValueKind:
        """What the report holds: a Figure with band and basis, or a plain value."""
        return _kind_at(self.source) if isinstance(self.source, str) else "figure"

    @property
    def shown_unit(self) -> str:
        """Unit for tables and axes."""
        return self.display_unit or self.unit


@cache
def _kind_at(path: str) -> ValueKind:
    annotation: Any = Report
    for part in path.split("."):
        fields = annotation.model_fields
        annotation = fields[part].annotation if part in fields else _property_type(annotation, part)
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(a for a in get_args(annotation) if a is not type(None))
    if annotation is Figure:
        return "figure"
    if get_origin(annotation) is Literal or annotation is str:
        return "str"
    return "int" if annotation is int else "float"


def _property_type(owner: Any, name: str) -> Any:
    return get_type_hints(getattr(owner, name).fget)["return"]


def read(report: Report, metric: Metric) -> Reading:
    """Take a metric out of a report, scaled to the metric's unit; unknown stays None."""
    if isinstance(metric.source, str):
        value: Any = report
        for part in metric.source.split("."):
            value = getattr(value, part, None)
    else:
        value = metric.source(report)
    if isinstance(value, Figure):
        scale = metric.scale
        basis = str(value.basis) if value.basis is not None else None
        return Reading(_scaled(value.value, scale), _scaled(value.low, scale), _scaled(value.high, scale), basis)
    if isinstance(value, str) or value is None:
        return Reading(None if value is None else str(value))
    return Reading(value if metric.scale == 1.0 else value * metric.scale)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _latency_metrics() -> Iterator[Metric]:
    for name, meaning in LATENCY_NAMES.items():
        for statistic, title in STATISTIC_NAMES.items():
            yield Metric(
                f"{statistic}_{name}_ms", f"{title} {name.upper()}", "ms", "lower", f"latency.{name}.{statistic}_s",
                f"{title.lower()} {meaning}", scale=MILLISECONDS_PER_SECOND,
            )  # fmt: skip


_KV = (
    Metric("kv_bytes_per_token", "KV bytes/token", "B", "lower", "kv.kv_bytes_per_token",
           "KV cache of one token in all layers, metadata included", display_unit="KiB", display_scale=1 / KIBI),
    Metric("native_kv_bytes_per_token", "Native KV bytes/token", "B", None, "kv.native_kv_bytes_per_token",
           "the same without compression", display_unit="KiB", display_scale=1 / KIBI),
    Metric("kv_fold", "KV fold", "x", "higher", "kv.fold",
           "native / encoded bytes of a resident sequence of mean length"),
    Metric("compression_ratio", "Compression ratio", "", "higher", "kv.compression_ratio",
           "fraction of KV bytes removed (kvpress's meaning)"),
    Metric("block_size", "Block size", "tokens", None, "kv.block_size", "tokens per block of the pool"),
    Metric("num_blocks", "Blocks", "blocks", "higher", "kv.num_blocks", "blocks in the pool of one replica"),
    Metric("capacity_tokens", "Capacity", "tokens", "higher", "kv.capacity_tokens",
           "resident tokens that one replica's pool holds"),
    Metric("sequence_tokens", "Mean sequence", "tokens", None, "kv.sequence_tokens",
           "mean prompt plus output of the workload"),
    Metric("sequence_kv_bytes", "Sequence KV", "B", "lower", "kv.sequence_kv_bytes",
           "resident KV of one such sequence at its end", display_unit="GiB", display_scale=1 / GIBI),
    Metric("kv_max_concurrency", "Sequences that fit", "sequences", "higher", "kv.max_concurrency",
           "such sequences that fit at once"),
    Metric("peak_kv_utilization", "Peak KV use", "", None, "kv.peak_kv_utilization",
           "largest share of the pool in use"),
)  # fmt: skip
_THROUGHPUT = (
    Metric("duration", "Duration", "s", "lower", "duration_s", "simulated time from first arrival to last token"),
    Metric("request_throughput", "Requests", "req/s", "higher", "throughput.request_throughput",
           "completed requests per second"),
    Metric("request_goodput", "Goodput", "req/s", "higher", "throughput.request_goodput",
           "requests per second that meet every SLO"),
    Metric("slo_attainment", "SLO attainment", "", "higher", "throughput.slo_attainment",
           "share of completed requests that meet every SLO"),
    Metric("output_throughput", "Output", "tok/s", "higher", "throughput.output_throughput",
           "output tokens per second"),
    Metric("total_token_throughput", "Total", "tok/s", "higher", "throughput.total_token_throughput",
           "prompt and output tokens per second"),
    Metric("output_throughput_per_device", "Output per device", "tok/s/device", "higher",
           output_throughput_per_device, "output tokens per second and device"),
    Metric("tokens_per_s_per_user", "Speed per user", "tok/s/user", "higher", tokens_per_second_per_user,
           "1 / median TPOT, 1 / mean in an estimate"),
    Metric("mean_queue_delay_ms", "Mean queueing delay", "ms", "lower", "queue_delay_mean_s",
           "mean wait before a request's first step", scale=MILLISECONDS_PER_SECOND),
    Metric("request_overhead_ms", "Outside the engine", "ms", "lower", "request_overhead_s",
           "time of a request outside the engine, in TTFT and E2EL", scale=MILLISECONDS_PER_SECOND),
)  # fmt: skip
_COUNTS = (
    Metric("num_prompts", "Requests sent", "requests", None, "counts.num_prompts", "requests that arrived"),
    Metric("completed", "Completed", "requests", "higher", "counts.completed", "requests that finished"),
    Metric("failed", "Rejected", "requests", "lower", "counts.rejected", "requests that were refused"),
    Metric("total_input_tokens", "Input tokens", "tokens", None, "counts.total_input_tokens", "prompt tokens"),
    Metric("total_output_tokens", "Output tokens", "tokens", None, "counts.total_output_tokens", "output tokens"),
    Metric("cached_prompt_tokens", "Cached prompt tokens", "tokens", "higher", "counts.cached_prompt_tokens",
           "prompt tokens served from the prefix cache"),
    Metric("recomputed_tokens", "Recomputed tokens", "tokens", "lower", "counts.recomputed_tokens",
           "tokens processed again after preemption"),
    Metric("preemptions", "Preemptions", "events", "lower", "counts.preemptions", "sequences put back to wait"),
    Metric("engine_steps", "Engine steps", "steps", None, "counts.engine_steps", "forward passes"),
    Metric("max_concurrent_requests", "Max running", "requests", None, "counts.max_concurrent_requests",
           "most requests in flight at once on one replica"),
    Metric("max_waiting_requests", "Max waiting", "requests", "lower", "counts.max_waiting_requests",
           "longest queue of one replica"),
)  # fmt: skip
_ADAPTIVE = (
    Metric("adaptive_actions", "Policy acts", "events", None, lambda r: adaptive_figure(r, "total_actions"),
           "times that an adaptive compression changed its level or encoded running sequences again"),
    Metric("requantized_sequences", "Re-encoded sequences", "sequences", "lower",
           lambda r: adaptive_figure(r, "requantized_sequences"), "running sequences that were encoded again"),
    Metric("requantize_time", "Re-encoding time", "s", "lower", lambda r: adaptive_figure(r, "requantize_s"),
           "time that steps took longer for encoding running sequences again"),
    Metric("reduced_precision_share", "Reduced precision", "", "lower", lambda r: adaptive_figure(r, "reduced_share"),
           "share of decoded tokens at a level after the first"),
)  # fmt: skip
_SPECULATION = (
    Metric("acceptance_length", "Acceptance length", "tokens", "higher", "speculation.acceptance_length",
           "mean tokens of one verification, the model's own included"),
    Metric("drafting_share", "Time drafting", "", "lower", "speculation.drafting_share",
           "part of decode steps that drafting took"),
)  # fmt: skip
_TIERS = (
    Metric("device_hit_rate", "Hits on the device", "", "higher", tier_figure(lambda use: use.device_hit_rate),
           "share of reusable prompt tokens found in the device's prefix cache, with tiers"),
    Metric("tier_hit_rate", "Hits in tiers", "", "higher", tier_hit_rate("host", "nvme", "remote"),
           "share of reusable prompt tokens loaded from tiers"),
    Metric("host_tier_hit_rate", "Hits in host memory", "", "higher", tier_hit_rate("host"),
           "of those, from host memory"),
    Metric("nvme_tier_hit_rate", "Hits on NVMe", "", "higher", tier_hit_rate("nvme"), "of those, from NVMe"),
    Metric("remote_tier_hit_rate", "Hits in remote stores", "", "higher", tier_hit_rate("remote"),
           "of those, from remote stores"),
    Metric("tier_stored_bytes", "Stored in tiers", "B", None,
           tier_figure(lambda use: sum(tier.stored_bytes for tier in use.tiers)), "bytes written to tiers",
           display_unit="GiB", display_scale=1 / GIBI),
    Metric("tier_loaded_bytes", "Loaded from tiers", "B", None,
           tier_figure(lambda use: sum(tier.loaded_bytes for tier in use.tiers)), "bytes read back from tiers",
           display_unit="GiB", display_scale=1 / GIBI),
    Metric("mean_tier_wait_ms", "Mean wait for a load", "ms", "lower", tier_figure(tier_wait_s),
           "mean duration of a load from a tier", scale=MILLISECONDS_PER_SECOND),
    Metric("lossy_tier_tokens", "Tokens from lossy tiers", "tokens", "lower",
           tier_figure(lambda use: use.lossy_tokens), "prompt tokens loaded from lossy tiers"),
    Metric("recompute_tier_tokens", "Tokens computed again", "tokens", "lower",
           tier_figure(lambda use: use.recompute_tokens), "prompt tokens of the recompute tier"),
    Metric("saved_against_load_s", "Saved against loading", "s", "higher",
           tier_figure(lambda use: use.saved_against_load_s), "estimated, against loading all that is found"),
    Metric("saved_against_compute_s", "Saved against computing", "s", "higher",
           tier_figure(lambda use: use.saved_against_compute_s), "estimated, against loading nothing"),
)  # fmt: skip
_EFFECTS = (
    Metric("prefill_tax", "Prefill tax", "x", "lower", "effects.prefill_tax", "prefill time / native"),
    Metric("decode_gain", "Decode gain", "x", "higher", "effects.decode_gain",
           "native decode step / this strategy's, same batch and context"),
    Metric("capacity_gain", "Capacity gain", "x", "higher", "effects.capacity_gain", "sequences that fit / native"),
    Metric("queueing_effect", "Queueing effect", "x", "higher", "effects.queueing_effect",
           "native mean queueing delay / this strategy's"),
)  # fmt: skip
_COST = (
    Metric("usd_per_hour", "Cost per hour", "USD/h", "lower", "cost.usd_per_hour", "whole deployment"),
    Metric("usd_per_million_input_tokens", "Cost per 1M input", "USD", "lower",
           "cost.usd_per_million_input_tokens", "dollars per million prompt tokens"),
    Metric("usd_per_million_output_tokens", "Cost per 1M output", "USD", "lower",
           "cost.usd_per_million_output_tokens", "dollars per million output tokens"),
    Metric("usd_per_million_total_tokens", "Cost per 1M total", "USD", "lower",
           "cost.usd_per_million_total_tokens", "dollars per million tokens of both kinds"),
    Metric("tokens_per_usd", "Tokens per dollar", "tokens/USD", "higher", "cost.tokens_per_usd",
           "tokens of both kinds per dollar", display_unit="M tokens/USD", display_scale=1 / MEGA),
    Metric("engine_utilization", "Engine busy", "", None, "cost.engine_utilization", "share of the run, an output"),
)  # fmt: skip
_ENERGY = (
    Metric("joules_per_output_token", "Energy per output token", "J", "lower", "energy.joules_per_output_token",
           "device energy, no host and no cooling"),
    Metric("joules_per_total_token", "Energy per token", "J", "lower", "energy.joules_per_total_token",
           "the same over prompt and output tokens"),
    Metric("mean_power_w", "Mean power", "W", "lower", "energy.mean_power_w", "of all devices"),
)  # fmt: skip
_POOLS = (
    Metric("prefill_pool_utilization", "Prefill pool busy", "", None, pool_utilization("prefill"),
           "share of the run in which prefill replicas were busy"),
    Metric("decode_pool_utilization", "Decode pool busy", "", None, pool_utilization("decode"),
           "share of the run in which decode replicas were busy"),
    Metric("transfer_bytes", "KV moved", "B", None, transfer_figure("wire_bytes"), "bytes between the pools",
           display_unit="GiB", display_scale=1 / GIBI),
    Metric("mean_transfer_ms", "Mean transfer", "ms", "lower", transfer_figure("transfer_mean_s"),
           "from a transfer's start to its end", scale=MILLISECONDS_PER_SECOND),
    Metric("mean_room_wait_ms", "Mean wait for room", "ms", "lower", transfer_figure("room_wait_mean_s"),
           "from a prompt's end until the decode side had room", scale=MILLISECONDS_PER_SECOND),
    Metric("mean_exposed_transfer_ms", "Mean exposed transfer", "ms", "lower", transfer_figure("exposed_mean_s"),
           "from a prompt's end to the arrival of its KV", scale=MILLISECONDS_PER_SECOND),
    Metric("link_utilization", "Link use", "", None, transfer_figure("link_utilization"),
           "bytes moved / what the ports of the busier side can move"),
)  # fmt: skip
_SHARES = (
    *(
        Metric(f"time_share_{c.value}", f"Time in {c.value}", "", None, time_share(c), f"busy time spent on {c.value}")
        for c in Component
    ),
    *(
        Metric(f"basis_share_{b.value}", f"Time {b.value}", "", None, basis_share(b), f"busy time priced as {b.value}")
        for b in Basis
    ),
    Metric("bottleneck", "Bottleneck", "", None, "bottleneck", "resource that bounds the run"),
    Metric("quality_status", "Quality", "", None, "quality.status", "what is known of the quality risk"),
    Metric(
        "quality_task_classes",
        "Quality known on",
        "",
        None,
        "quality.task_classes",
        "classes of tasks with a published score",
    ),
    Metric(
        "quality_scores",
        "Published scores",
        "",
        None,
        "quality.scores",
        "every published score with class, setting, evidence and source",
    ),
)

METRICS: tuple[Metric, ...] = (
    *_KV, *_latency_metrics(), *_THROUGHPUT, *_COUNTS, *_ADAPTIVE, *_SPECULATION, *_TIERS, *_EFFECTS, *_COST,
    *_ENERGY, *_POOLS,
    *_SHARES,
)  # fmt: skip
METRIC_BY_TAG: dict[str, Metric] = {metric.tag: metric for metric in METRICS}
