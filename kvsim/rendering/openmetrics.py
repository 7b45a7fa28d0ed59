"""A watched run as OpenMetrics text, with vLLM's names under ``kvsim_`` and its buckets.

Gauges and counters are series over the simulated clock, whose 0 is the start of the run; histograms stand at its end.
Format: OpenMetrics 1.0. Names and buckets: vLLM ``v1/metrics/loggers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvsim.errors import InvariantViolation
from kvsim.sim.observer import ReplicaWatch, RunObserver
from kvsim.sim.recorder import ReplicaRecord, RequestLog
from kvsim.units import TICKS_PER_SECOND

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
POINTS: Final = 240
"""Points of each series, beside the one at 0."""
TICKS_PER_NS: Final = 1000
"""OpenMetrics' readers keep nanoseconds, so no two points may lie closer."""
FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


@dataclass(frozen=True)
class _Histogram:
    """Cumulative counts per bound, the last without one, and the sum of all values in seconds."""

    counts: tuple[int, ...]
    total_s: float


@dataclass(frozen=True)
class _Replica:
    """One replica's requests and samples."""

    labels: str
    watch: ReplicaWatch
    record: ReplicaRecord
    egress_ticks: int
    sent: IntArray
    arrived: IntArray
    scheduled: IntArray
    first: IntArray
    finished: IntArray
    prompt: IntArray
    output: IntArray
    caches_prefixes: bool


def openmetrics_document(observer: RunObserver, model_name: str) -> bytes:
    """All metrics of a finished run, ended by ``# EOF``."""
    if observer.result is None or observer.requests is None:
        msg = "metrics need a finished run"
        raise InvariantViolation(msg)
    replicas = [_replica(observer, watch, model_name) for watch in observer.replicas]
    end = max((watch.samples[-1].ticks for watch in observer.replicas), default=0)
    end = -(-end // TICKS_PER_NS) * TICKS_PER_NS
    times = np.unique(np.linspace(0, end // TICKS_PER_NS, POINTS + 1).astype(np.int64)) * TICKS_PER_NS
    held = [_at(replica, times) for replica in replicas]
    lines = [*_gauges(replicas, held, times), *_counters(replicas, held, times), *_histograms(replicas, end), "# EOF"]
    return ("\n".join(lines) + "\n").encode()


def _replica(observer: RunObserver, watch: ReplicaWatch, model_name: str) -> _Replica:
    """Requests that a replica finished."""
    result, requests = observer.result, observer.requests
    if result is None or requests is None:
        msg = "metrics need a finished run"
        raise InvariantViolation(msg)
    log: RequestLog = result.log
    mine = [i for i in range(len(requests)) if observer.served_by.get(i, -1) == watch.number and log.finished[i] >= 0]
    chosen = np.array(mine, dtype=np.int64)

    def of(values: Any) -> IntArray:
        return np.asarray(values, dtype=np.int64)[chosen]

    name = model_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return _Replica(
        f'{{model_name="{name}",engine="{watch.number}"',
        watch,
        result.records[watch.number],
        log.egress_ticks,
        of(log.sent),
        of(log.arrived),
        of(log.scheduled),
        of(log.first_token),
        of(log.finished),
        of(requests.prompt_tokens),
        of(requests.output_tokens),
        requests.prefix_hashes is not None,
    )


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP kvsim_{name} {text}", f"# TYPE kvsim_{name} {kind}"]


def _series(name: str, labels: str, times: IntArray, values: Sequence[float] | npt.NDArray[Any]) -> Iterator[str]:
    for at, value in zip(times.tolist(), np.asarray(values).tolist(), strict=True):
        yield f"kvsim_{name}{labels}}} {value!r} {_seconds(at)}"


def _seconds(ticks: int) -> str:
    """Timestamp with nine decimals and no exponent, as every reader takes it."""
    seconds, rest = divmod(ticks, TICKS_PER_SECOND)
    return f"{seconds}.{rest // TICKS_PER_NS:09d}"


def _gauges(replicas: list[_Replica], samples: list[IntArray], times: IntArray) -> Iterator[str]:
    texts = {
        "num_requests_running": "Requests in the engine's batch.",
        "num_requests_waiting": "Requests that wait to be scheduled.",
        "kv_cache_usage_perc": "KV cache in use, 1 is all of it.",
    }
    for name, text in texts.items():
        yield from _head(name, "gauge", text)
        for replica, held in zip(replicas, samples, strict=True):
            pool = max(replica.watch.pool_bytes, 1)
            values = {
                "num_requests_running": held[:, 0],
                "num_requests_waiting": held[:, 1],
                "kv_cache_usage_perc": held[:, 2] / pool,
            }[name]
            yield from _series(name, replica.labels, times, values)


def _at(replica: _Replica, times: IntArray) -> IntArray:
    """Latest sample at each time: running, waiting, used bytes, preemptions, cached tokens; zeros before the first."""
    samples = replica.watch.samples
    table = np.zeros((len(samples) + 1, 5), dtype=np.int64)
    for row, one in enumerate(samples, start=1):
        table[row] = (one.running, one.waiting, one.used_bytes, one.preemptions, one.cached_tokens)
    at = np.maximum.accumulate(np.array([one.ticks for one in samples], dtype=np.int64))
    return table[np.searchsorted(at, times, side="right")]


def _counters(replicas: list[_Replica], samples: list[IntArray], times: IntArray) -> Iterator[str]:
    texts = {
        "num_preemptions": "Preempted requests.",
        "prompt_tokens": "Prompt tokens of requests whose first token is out.",
        "generation_tokens": "Tokens generated, evenly between a request's first and last.",
        "prefix_cache_queries": "Tokens that the prefix cache was asked for.",
        "prefix_cache_hits": "Tokens that it had.",
        "request_success": "Requests that finished.",
    }
    for name, text in texts.items():
        yield from _head(name, "counter", text)
        for replica, held in zip(replicas, samples, strict=True):
            reason = ',finished_reason="length"' if name == "request_success" else ""
            values = _counter(replica, name, held, times)
            yield from _series(f"{name}_total", replica.labels + reason, times, values)


def _counter(replica: _Replica, name: str, held: IntArray, times: IntArray) -> IntArray:
    if name == "generation_tokens":
        return _generated(replica, times)
    if name.startswith("prefix_cache") and not replica.caches_prefixes:
        return np.zeros_like(times)
    if name in ("num_preemptions", "prefix_cache_hits"):
        return held[:, 3 if name == "num_preemptions" else 4]
    when, amounts = {
        "prompt_tokens": (replica.first, replica.prompt),
        "prefix_cache_queries": (replica.scheduled, replica.prompt),
        "request_success": (replica.finished, np.ones_like(replica.finished)),
    }[name]
    return _summed(when, amounts, times)


def _summed(when: IntArray, amounts: IntArray, times: IntArray) -> IntArray:
    """Sum of the amounts that fell due up to each time."""
    order = np.argsort(when, kind="stable")
    sums = np.concatenate([[0], np.cumsum(amounts[order])])
    return sums[np.searchsorted(when[order], times, side="right")]


def _generated(replica: _Replica, times: IntArray) -> IntArray:
    """One token at the first and the rest evenly until the last; exact where none is under way."""
    whole = _summed(replica.finished, replica.output, times)
    under_way = np.zeros(len(times))
    for place, now in enumerate(times.tolist()):
        open_ = (replica.first <= now) & (now < replica.finished)
        since, length = now - replica.first[open_], replica.finished[open_] - replica.first[open_]
        under_way[place] = np.floor(1 + (replica.output[open_] - 1) * (since / length)).sum()
    return whole + under_way.astype(np.int64)


def _histograms(replicas: list[_Replica], end: int) -> Iterator[str]:
    texts = {
        "time_to_first_token_seconds": (FIRST_TOKEN_BUCKETS, "Time from sending to the first token."),
        "inter_token_latency_seconds": (TOKEN_BUCKETS, "Time between two tokens of a request."),
        "request_time_per_output_token_seconds": (TOKEN_BUCKETS, "Mean time per token after the first, by request."),
        "e2e_request_latency_seconds": (REQUEST_BUCKETS, "Time from sending to the last token."),
        "request_queue_time_seconds": (REQUEST_BUCKETS, "Time from the engine's queue until scheduled."),
        "request_prefill_time_seconds": (REQUEST_BUCKETS, "Time from scheduled to the first token."),
        "request_decode_time_seconds": (REQUEST_BUCKETS, "Time from the first to the last token."),
        "request_inference_time_seconds": (REQUEST_BUCKETS, "Time from scheduled to the last token."),
    }
    for name, (bounds, text) in texts.items():
        yield from _head(name, "histogram", text)
        for replica in replicas:
            found = _gaps(replica.record, bounds) if name.startswith("inter_") else _requests(replica, name, bounds)
            yield from _histogram_lines(name, replica.labels, bounds, found, end)


def _requests(replica: _Replica, name: str, bounds: tuple[float, ...]) -> _Histogram:
    decode = replica.finished - replica.first
    several = replica.output > 1
    seconds = {
        "time_to_first_token_seconds": replica.first + replica.egress_ticks - replica.sent,
        "request_time_per_output_token_seconds": decode[several] / np.maximum(replica.output[several] - 1, 1),
        "e2e_request_latency_seconds": replica.finished + replica.egress_ticks - replica.sent,
        "request_queue_time_seconds": replica.scheduled - replica.arrived,
        "request_prefill_time_seconds": replica.first - replica.scheduled,
        "request_decode_time_seconds": decode,
        "request_inference_time_seconds": replica.finished - replica.scheduled,
    }[name] / TICKS_PER_SECOND
    counts = np.searchsorted(np.sort(seconds), bounds, side="right").tolist()
    return _Histogram((*counts, len(seconds)), float(seconds.sum()))


def _gaps(record: ReplicaRecord, bounds: tuple[float, ...]) -> _Histogram:
    """Gaps between tokens: those of runs of steps, counted in closed form, and the single ones."""
    steps, sequences, first, slope = record.runs.table().T
    counts = []
    for bound in bounds:
        ticks = round(bound * TICKS_PER_SECOND)
        rising = np.minimum((ticks - first) // np.maximum(slope, 1) + 1, steps)
        within = np.where(first > ticks, 0, np.where(slope > 0, rising, steps))
        counts.append(int((within * sequences).sum()) + sum(gap <= ticks for gap in record.gaps))
    total = int((sequences * (steps * first + slope * (steps * (steps - 1) // 2))).sum()) + sum(record.gaps)
    return _Histogram((*counts, int((steps * sequences).sum()) + len(record.gaps)), total / TICKS_PER_SECOND)


def _histogram_lines(name: str, labels: str, bounds: tuple[float, ...], found: _Histogram, end: int) -> Iterator[str]:
    at = _seconds(end)
    for bound, count in zip((*map(repr, bounds), "+Inf"), found.counts, strict=True):
        yield f'kvsim_{name}_bucket{labels},le="{bound}"}} {count} {at}'
    yield f"kvsim_{name}_count{labels}}} {found.counts[-1]} {at}"
    yield f"kvsim_{name}_sum{labels}}} {found.total_s!r} {at}"
