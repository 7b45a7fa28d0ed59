"""Statistics of a timing, and the rules by which a row is refused."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST_SPREAD = 0.05
"""Distance between the highest and the lowest median of a round, as a share of the median."""
EVENT_TICK_S = 0.5e-6
"""Resolution of a CUDA event (CUDA runtime API, cudaEventElapsedTime); two of them never count as spread."""
STREAM_MARGIN = 1.02
STREAM_OPERATION = "microbenchmark/stream_read"
SMALLEST_STREAM_BYTES = 1 << 30


@dataclass(frozen=True)
class Peak:
    """What the datasheet says: bytes per second of device memory, dense operations per second by width."""

    memory: float
    flops_16_bit: float
    flops_8_bit: float


PEAKS = {
    "NVIDIA A100-SXM4-40GB": Peak(1.555e12, 312e12, 624e12),
    "NVIDIA A100-SXM4-80GB": Peak(2.039e12, 312e12, 624e12),
    "NVIDIA H100 80GB HBM3": Peak(3.35e12, 989e12, 1979e12),
    "NVIDIA H100 PCIe": Peak(2.0e12, 756e12, 1513e12),
    "NVIDIA H100 NVL": Peak(3.9e12, 835e12, 1670e12),
    "NVIDIA H200": Peak(4.8e12, 989e12, 1979e12),
    "NVIDIA B200": Peak(7.7e12, 2250e12, 4500e12),
    "NVIDIA L40S": Peak(864e9, 362e12, 733e12),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": Peak(1597e9, 467.8e12, 935.6e12),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": Peak(1792e9, 503.8e12, 1.01e15),
    "AMD Instinct MI300X": Peak(5.3e12, 1307e12, 2615e12),
}
"""By the name that the driver gives. A copy of hardware_specs, because this script runs without YAML; a test holds the
two equal."""


@dataclass(frozen=True)
class Summary:
    """A timing over rounds.

    Attributes
    ----------
    median_s, p10_s, p90_s : float
        Over all runs.
    spread : float
        Distance between the medians of the fastest and the slowest round, as a share of `median_s`.
    """

    median_s: float
    p10_s: float
    p90_s: float
    rounds: int
    runs: int
    spread: float


def quantile(values: Sequence[float], share: float) -> float:
    """Give the smallest value that `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(rounds: Sequence[Sequence[float]]) -> Summary:
    """Summarise the seconds of each run of each round."""
    runs = [seconds for one_round in rounds for seconds in one_round]
    medians = [statistics.median(one_round) for one_round in rounds]
    median_s = statistics.median(runs)
    return Summary(
        median_s=median_s,
        p10_s=quantile(runs, 0.1),
        p90_s=quantile(runs, 0.9),
        rounds=len(rounds),
        runs=len(runs),
        spread=(max(medians) - min(medians)) / median_s if median_s > 0 else math.inf,
    )


def is_noisy(summary: Summary) -> bool:
    """Whether the rounds disagree by more than the rule and by more than the timer's resolution explains."""
    return summary.spread > LARGEST_SPREAD and summary.spread * summary.median_s > 2 * EVENT_TICK_S


@dataclass(frozen=True)
class Limits:
    """What no row may exceed; None where it is not known.

    Attributes
    ----------
    l2_bytes : int
        Written bytes up to this may still lie in the cache when the kernel ends.
    stream_bytes_per_s : float or None
        Measured by the read-only stream of the same run.
    """

    peak: Peak | None
    l2_bytes: int
    stream_bytes_per_s: float | None


def stream_bandwidth(rows: Iterable[Mapping[str, Any]], gpu: str) -> float | None:
    """Give the highest bandwidth of the read-only stream on a GPU among rows, or None."""
    rates = [
        float(row["read_bytes"]) / float(row["median_s"])
        for row in rows
        if row["operation"] == STREAM_OPERATION
        and row["gpu"] == gpu
        and row["part"] == "total"
        and row["method"] == "events"
        and float(row["read_bytes"]) >= SMALLEST_STREAM_BYTES
    ]
    return max(rates, default=None)


def reasons_to_reject(row: Mapping[str, Any], summary: Summary, limits: Limits) -> list[str]:
    """Give why a row cannot be trusted, nothing if it can; a row taken without a GPU is no measurement and may stay."""
    if row["device"] == "cpu":
        return []
    seconds = summary.median_s
    if not seconds > 0:
        return [f"median of {seconds} s"]
    reasons = []
    if is_noisy(summary):
        reasons.append(f"rounds differ by {summary.spread:.1%}, more than {LARGEST_SPREAD:.0%}")
    if row["part"] != "total":
        return reasons
    memory_bytes = row["read_bytes"] + max(0, row["written_bytes"] - limits.l2_bytes)
    bandwidth, rate = memory_bytes / seconds, row["flops"] / seconds
    if limits.peak and bandwidth > limits.peak.memory:
        reasons.append(f"{bandwidth / 1e12:.3f} TB/s is above the datasheet's {limits.peak.memory / 1e12:.3f}")
    stream = limits.stream_bytes_per_s
    if stream and row["operation"] != STREAM_OPERATION and bandwidth > STREAM_MARGIN * stream:
        reasons.append(f"{bandwidth / 1e12:.3f} TB/s is above the read-only stream's {stream / 1e12:.3f}")
    if limits.peak and rate > limits.peak.flops_8_bit:
        reasons.append(f"{rate / 1e12:.0f} Tflop/s is above the datasheet's {limits.peak.flops_8_bit / 1e12:.0f}")
    if limits.peak and _is_16_bit(row) and limits.peak.flops_16_bit < rate <= limits.peak.flops_8_bit:
        reasons.append(f"{rate / 1e12:.0f} Tflop/s is above the datasheet's {limits.peak.flops_16_bit / 1e12:.0f}")
    return reasons


def _is_16_bit(row: Mapping[str, Any]) -> bool:
    """Whether the matrix products are surely of 16-bit operands."""
    return str(row["operation"]).endswith(("/bf16", "/bfloat16", "/float16"))


ENOUGH_RUNS = 30
"""Runs below which the percentiles say little."""
# Bits of nvmlClocksThrottleReasons: the power cap; slowdown by hardware, heat, or the power supply.
_POWER_CAP, _SLOWDOWN = 0x4, 0x8 | 0x20 | 0x40 | 0x80


def flags(row: Mapping[str, Any], summary: Summary) -> list[str]:
    """Give what a reader of a row must know and that is no reason to refuse it."""
    if row["device"] == "cpu":
        return ["no_measurement"]
    throttle = int(row["throttle_reasons"] or "0", 16)
    lowest, usual = row["sm_clock_min_mhz"], row["sm_clock_mhz"]
    known = {
        "few_runs": row["method"] == "events" and summary.runs < ENOUGH_RUNS,
        "spread_within_timer_resolution": summary.spread > LARGEST_SPREAD,
        "clock_changed": bool(usual) and lowest < 0.9 * usual,
        "power_capped": bool(throttle & _POWER_CAP),
        "slowed_down": bool(throttle & _SLOWDOWN),
    }
    return [name for name, holds in known.items() if holds]
