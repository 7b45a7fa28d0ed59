"""Write docs/accuracy-tables.md: errors of the calibrated model on every validation suite, beside the targets.

    python tools/write_accuracy.py ../shared/data [--workers 4] [--out docs/accuracy-tables.md]

Every figure comes from ``kvsim validate`` on the data folder; nothing in the page is typed by hand. The page's head
names the hash of the calibration set, and a test fails when the set has moved on.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvsim.calibration.sets import load_set
from kvsim.data_files import data_dir
from kvsim.documents import write_atomic
from kvsim.errors import KvsimError
from kvsim.validation import SUITES, run_suite
from kvsim.validation.report import score_cells
from kvsim.validation.suite import Options, Result, Score

CHECKOUT = Path(__file__).resolve().parents[1]
PAGE = CHECKOUT / "docs" / "accuracy-tables.md"
SET_NAME = "default"
HASH_LINE = "<!-- calibration set: {} -->"


@dataclass(frozen=True)
class Target:
    """What was asked for before the work; ``correct`` is the least share of right directions."""

    median: float | None = None
    p90: float | None = None
    correct: float | None = None

    def verdict(self, found: Score) -> str:
        """Target and whether it is met, such as ``median ≤ 4 % met, p90 ≤ 12 % missed``."""
        if self.correct is not None and found.correct is not None:
            return f"≥ {self.correct:.0%} right {'met' if found.correct >= self.correct else 'missed'}"
        pairs = [("median", self.median, found.median_ape), ("p90", self.p90, found.p90_ape)]
        return ", ".join(
            f"{name} ≤ {limit:.0%} {'met' if value <= limit else 'missed'}"
            for name, limit, value in pairs
            if limit is not None and value is not None
        )


SERVING_TARGETS: Mapping[str, Target] = {
    "ttft_mean": Target(0.12),
    "ttft_p99": Target(0.25),
    "itl_mean": Target(0.05),
    "e2e_mean": Target(0.05),
    "e2e_p99": Target(0.10),
    "kv_blocks": Target(0.01),
}
"""Of a server's runs and of its log alike."""
TARGETS: Mapping[str, Mapping[str, Target]] = {
    "kernel-timings": {
        "decode_attention": Target(0.04, 0.12),
        "prefill_attention": Target(0.07),
        "gemm": Target(0.06),
        "all_reduce": Target(0.12),
    },
    "vllm-serving": SERVING_TARGETS,
    "vllm-requests": SERVING_TARGETS,
    "engine-tables": {"ttft": Target(0.20), "tpot": Target(0.08)},
    "kv-quant": {"ratio": Target(0.12), "direction": Target(correct=0.90)},
}
"""By suite and metric; kernels on shapes held out of the fit."""
TARGET_SCOPE: Mapping[str, tuple[str, ...]] = {"engine-tables": ("scope", "scope and backend")}
"""Kinds of group that a suite's targets were set for, where it is not the whole suite."""
UNSEEN_TARGETS: Mapping[str, Target] = {"bandwidth": Target(0.12), "arithmetic": Target(0.25)}
"""On a device never seen, by what binds a row."""
SUITE_TEXT: Mapping[str, str] = {
    "kernel-timings": (
        "Seconds of single kernels, on shapes that the fit had not seen: rows of tables that were fitted are predicted "
        "by five folds split by shape. Cold calls read more than twice the last-level cache; cached ones were timed "
        "back to back on data that stays in it, which no engine step does."
    ),
    "vllm-serving": (
        "vLLM 0.15.1 on H100 under inference-perf's load, stage by stage. Validation only, but for three constants: "
        "the time of a request outside the engine and two terms of the engine's memory were fitted on half of the "
        "runs, which are shown apart from those held out."
    ),
    "vllm-requests": "Log of 300 ShareGPT requests on an RTX 4090, replayed. Validation only.",
    "engine-tables": "Published TTFT, TPOT and throughput of engines, aggregated serving. Validation only.",
    "kv-quant": "Ratio of a KV format to the 16-bit cache of the same rows. Validation only.",
    "edge": "llama.cpp and phone runtimes, without a queue. Validation only.",
}
SHOWN_GROUPS: Mapping[str, tuple[str, ...]] = {
    "kernel-timings": ("domain", "device and domain", "format and domain", "predicted by"),
    "vllm-serving": ("constants", "run"),
    "vllm-requests": (),
    "engine-tables": ("scope", "scope and backend", "table", "harness", "backend", "device", "concurrency"),
    "kv-quant": ("quantity", "scheme"),
    "edge": ("runtime", "weights", "device"),
}


def set_hash() -> str:
    """Hash of the calibration set that the page speaks of, and of the engine-level fits beside it."""
    fits = sorted(path.name for path in data_dir("calibration/engine").glob("*.json"))
    return hashlib.sha256(load_set(SET_NAME).path.read_bytes() + "\n".join(fits).encode()).hexdigest()


def main() -> None:
    """Run every suite and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the public data, such as ../shared/data")
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    started_from = set_hash()
    results = {}
    for name in SUITES:
        print(f"validating {name}", file=sys.stderr)
        results[name] = run_suite(name, options.data, Options(calibration=SET_NAME, workers=options.workers))
    unseen = {device: _unseen(options.data, device, options.workers) for device in measured_devices(results)}
    if set_hash() != started_from:
        sys.exit("the calibration set was changed meanwhile: run again")
    write_atomic(options.out, render(results, unseen, started_from).encode())
    print(f"wrote {options.out}")


def measured_devices(results: Mapping[str, Result]) -> list[str]:
    """Devices of the kernel tables."""
    groups = results["kernel-timings"].groups
    return [name.partition("=")[2] for name in groups if name.startswith("device=")]


def _unseen(data: Path, device: str, workers: int) -> Result | str:
    """Score a device as if it had not been measured, or say why that cannot be done."""
    print(f"validating {device} as unseen", file=sys.stderr)
    try:
        return run_suite("kernel-timings", data, Options(device, SET_NAME, workers))
    except KvsimError as error:
        return str(error)


def render(results: Mapping[str, Result], unseen: Mapping[str, Result | str], hash_of_set: str) -> str:
    """Build the page."""
    lines = [
        "# Accuracy tables",
        "",
        HASH_LINE.format(hash_of_set),
        "",
        "Generated by `tools/write_accuracy.py`; do not edit. Errors are predicted over measured, less one: the median",
        "of magnitudes, their 90th percentile, and the median with sign. Targets are those set before the work; one",
        f"that is missed says so. Calibration set `{SET_NAME}`, first digits of its hash {hash_of_set[:12]}.",
        "",
        "## All suites",
        "",
        *_table([(suite, r.overall, _whole(suite)) for suite, r in results.items()], first="suite"),
    ]
    for suite, result in results.items():
        lines += ["", f"## {suite}", "", SUITE_TEXT[suite], ""]
        rows = [("all", result.overall, _whole(suite)), *_shown(suite, result)]
        lines += _table(rows, first="group")
        lines += ["", *_skipped(result)]
    lines += ["", "## Devices treated as never seen", "", *_unseen_lines(unseen)]
    return "\n".join(lines) + "\n"


Row = tuple[str, Mapping[str, Score], Mapping[str, Target]]
"""(first cell, scores by metric, targets by metric)."""


def _whole(suite: str) -> Mapping[str, Target]:
    return {} if suite in TARGET_SCOPE else TARGETS.get(suite, {})


def _shown(suite: str, result: Result) -> Iterator[Row]:
    for kind in SHOWN_GROUPS[suite]:
        targets = TARGETS.get(suite, {}) if kind in TARGET_SCOPE.get(suite, (kind,)) else {}
        for name, scores in result.groups.items():
            found, _, value = name.partition("=")
            if found == kind:
                yield f"{kind}: {value}", scores, targets


def _table(rows: Sequence[Row], *, first: str) -> list[str]:
    targets = any(wanted for _, _, wanted in rows)
    head, rule = f"| {first} | metric | n | median | p90 | bias |", "|---|---|---:|---:|---:|---:|"
    lines = [head + (" target |" if targets else ""), rule + ("---|" if targets else "")]
    for name, scores, wanted in rows:
        for metric, score in scores.items():
            target = wanted.get(metric)
            last = f" {target.verdict(score) if target else ''} |" if targets else ""
            lines.append(f"| {name} | {metric} | {' | '.join(score_cells(score))} |{last}")
    return lines


def _skipped(result: Result) -> list[str]:
    if not result.skipped:
        return ["Nothing was left out."]
    parts = [f"{one.reason} ({one.count})" for one in sorted(result.skipped, key=lambda one: (-one.count, one.reason))]
    return [f"{result.rows} rows scored. Left out: " + "; ".join(parts) + "."]


def _unseen_lines(unseen: Mapping[str, Result | str]) -> list[str]:
    lines = [
        "Everything measured on the device is ignored; kernels are predicted by transfer from the other devices.",
        "",
        "| device | bound by | metric | n | median | p90 | bias | target |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    failed = []
    for device, result in unseen.items():
        if isinstance(result, str):
            failed.append(f"{device} could not be predicted: {result}.")
            continue
        for bound in ("bandwidth", "arithmetic", "launch"):
            for metric, score in result.groups.get(f"bound by={bound}", {}).items():
                target = UNSEEN_TARGETS.get(bound)
                verdict = target.verdict(score) if target else ""
                lines.append(f"| {device} | {bound} | {metric} | {' | '.join(score_cells(score))} | {verdict} |")
    return [*lines, *(["", *failed] if failed else [])]


if __name__ == "__main__":
    main()
