"""Suite kernel-timings: tables of aiconfigurator's folder layout against the calibrated kernels.

A row that the artefact was fitted on says nothing, so rows of the very tables that were fitted (same sha256) are
predicted by folds that leave their shape out. Rows of other tables are predicted by the artefact as it is, and rows of
a device or kernel without one by transfer from the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl

from kvsim.calibration.artefact import Artefact, Predictor
from kvsim.calibration.build import predict_held_out, split_parts
from kvsim.calibration.facts import DeviceFacts, device_facts
from kvsim.calibration.fit import cold_share, shape_of
from kvsim.calibration.laws import LAWS
from kvsim.calibration.laws.base import FloatArray, Law
from kvsim.calibration.least_work import least_work
from kvsim.calibration.quarantine import quarantine
from kvsim.calibration.sets import CalibrationSet, load_set
from kvsim.calibration.sources import aiconfigurator
from kvsim.calibration.timings import KEY_COLUMNS, Timings
from kvsim.calibration.transfer import transferred
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, InvalidSpec
from kvsim.validation.pool import in_processes
from kvsim.validation.suite import Options, Result, Samples, Tally

METRIC_OF: Final[Mapping[str, str]] = {
    "decode_attention": "decode_attention",
    "prefill_attention": "prefill_attention",
    "gemm": "gemm",
    "mla_decode": "mla",
    "mla_prefill": "mla",
    "all_reduce": "all_reduce",
}
"""Metric by operation."""
NO_ARTEFACT = "kernel or format without an artefact, and none to transfer from"
NEEDS_SCIPY = (
    "these tables were fitted, so their errors need a fit per fold, and fits need scipy: "
    "pip install 'kvsim[calibration]', or give tables that were not fitted"
)
OTHER_LAYOUT = "file of another layout than aiconfigurator's (counted in files)"
UNFITTED = "too few other shapes for a fold to fit"
NO_LAW = "operation without a law"
BINDINGS = ("bandwidth", "arithmetic", "launch")
CACHE = "cache"
"""What binds a call whose working set stays in the last-level cache: no figure of the datasheet."""
LAUNCH_BOUND_S = 5e-6
"""A row whose roofline is shorter is bound by its launch, whatever else it does."""
FOLDS, DIRECT, OTHER_VERSION, TRANSFERRED = (
    "folds that leave the shape out", "artefact on new rows", "artefact of another version of the kernel",
    "transfer from other devices",
)  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """Rows of one key, and what predicts them; ``artefact`` None is transfer from the set's other devices."""

    rows: pl.DataFrame
    how: str
    artefact: Artefact | None
    calibration: str


@dataclass(frozen=True)
class KernelTimings:
    """Seconds of attention, GEMM, MLA and all-reduce kernels."""

    name: str = "kernel-timings"
    metrics: tuple[str, ...] = ("decode_attention", "prefill_attention", "gemm", "mla", "all_reduce")

    def run(self, data: Path, options: Options) -> Result:
        """Score every table; see `kvsim.validation.suite.Suite`."""
        folder = _folder(data)
        calibration = load_set(options.calibration)
        devices = None if options.as_unseen is None else [options.as_unseen]
        tables = aiconfigurator.read(folder, devices=devices, operations=tuple(METRIC_OF))
        tally = Tally()
        tally.skip(OTHER_LAYOUT, _count_others(folder))
        jobs: list[_Job] = []
        for timings in tables:
            jobs += _jobs(timings, calibration, tally, options)
        if not jobs:
            msg = f"--data: {folder}: no row to score" + (f" of {options.as_unseen}" if options.as_unseen else "")
            raise InvalidSpec(msg + _reasons(tally))
        if any(job.how == FOLDS for job in jobs) and find_spec("scipy") is None:
            raise CalibrationError(NEEDS_SCIPY)
        # Long jobs first, so that no process is left with one at the end.
        jobs.sort(key=lambda job: -len(job.rows) * (10 if job.how == FOLDS else 1))
        for job, samples in zip(jobs, in_processes(_score_rows, jobs, options.workers, options.progress), strict=True):
            scored = sum(len(one.measured) for one in samples)
            tally.rows += scored
            tally.skip(NO_ARTEFACT if job.artefact is None and not samples else UNFITTED, len(job.rows) - scored)
            tally.extend(samples)
        return tally.result(self)


SUITE: Final = KernelTimings()


def _folder(data: Path) -> Path:
    if not data.exists():
        msg = f"--data: {data}: no such file or folder"
        raise InvalidSpec(msg)
    inner = data / "kernel_timings"
    return inner if inner.is_dir() else data


def _count_others(folder: Path) -> int:
    if folder.is_file():
        return 0
    return sum(1 for pattern in ("**/*.csv", "**/*.csv.gz") for _ in folder.glob(pattern))


def _reasons(tally: Tally) -> str:
    skipped = tally.result(SUITE).skipped
    return ": " + ", ".join(f"{one.reason} ({one.count})" for one in skipped) if skipped else ""


def _jobs(timings: Timings, calibration: CalibrationSet, tally: Tally, options: Options) -> Iterator[_Job]:
    """Quarantine a table and find what predicts each key."""
    if timings.frame.is_empty():
        for one in timings.excluded:
            tally.skip(one.reason, one.count)
        return
    device = str(timings.frame["device"][0])
    sound = quarantine(timings, _facts(device))
    for one in sound.excluded:
        tally.skip(one.reason, one.count)
    hashes = {origin.sha256 for origin in timings.origins}
    for _, rows in sound.frame.group_by(KEY_COLUMNS, maintain_order=True):
        if timings.operation not in LAWS:
            tally.skip(NO_LAW, len(rows))
            continue
        artefact = None if options.as_unseen == device else find_artefact(calibration, _key(rows))
        yield _Job(rows, _how(artefact, _key(rows), hashes), artefact, options.calibration)


def _key(rows: pl.DataFrame) -> dict[str, str]:
    return {name: str(rows[name][0]) for name in KEY_COLUMNS}


def _how(artefact: Artefact | None, key: Mapping[str, str], hashes: set[str]) -> str:
    if artefact is None:
        return TRANSFERRED
    if (artefact.kernel, artefact.version) != (key["kernel"], key["version"]):
        return OTHER_VERSION
    return FOLDS if any(origin.sha256 in hashes for origin in artefact.origins) else DIRECT


def find_artefact(calibration: CalibrationSet, key: Mapping[str, str]) -> Artefact | None:
    """Artefact of a key: its own version, else another version of its kernel."""
    for kernel in (f"{key['kernel']}@{key['version']}", key["kernel"]):
        found = calibration.find(
            key["device"], key["operation"], kernel=kernel, dtype=key["dtype"], kv_dtype=key["kv_dtype"]
        )
        if found is not None:
            return found
    return None


@lru_cache(maxsize=1)
def _entries(calibration: str) -> tuple[Artefact, ...]:
    return load_set(calibration).entries


@lru_cache(maxsize=64)
def _facts(device: str) -> DeviceFacts:
    return device_facts(load_device(device).spec)


def _predictor(job: _Job, key: Mapping[str, str]) -> Predictor | None:
    """What predicts a job's rows; None where no other device has the format."""
    if job.artefact is not None:
        return job.artefact.predictor(_facts(key["device"]))
    spec = load_device(key["device"]).spec
    names = (key["operation"], key["dtype"], key["kv_dtype"])
    return transferred(_entries(job.calibration), spec, *names, kernel=key["kernel"])


def _score_rows(job: _Job) -> list[Samples]:
    """Predict the rows of one key, split by domain and by what binds; empty where nothing predicts them."""
    key = _key(job.rows)
    law, facts = LAWS[key["operation"]], _facts(key["device"])
    if job.how == FOLDS and job.artefact is not None:
        rows, predicted = _out_of_fold(job.rows, law, job.artefact, facts)
    else:
        predictor = _predictor(job, key)
        if predictor is None:
            return []
        rows, predicted = job.rows, predictor.seconds(shape_of(job.rows, law.operation))
    measured = rows["seconds"].to_numpy()
    shape = shape_of(rows, law.operation)
    cold = cold_share(law, shape, key, facts) >= 1.0
    binds = np.where(cold, _binding(law, shape, key, facts), CACHE)
    known = np.isfinite(predicted)
    samples = []
    for bound in (*BINDINGS, CACHE):
        part = known & (binds == bound)
        if part.any():
            groups = _groups(key, "cached" if bound == CACHE else "cold", bound, job.how)
            samples.append(Samples(METRIC_OF[law.operation], measured[part], predicted[part], groups))
    return samples


def _groups(key: Mapping[str, str], domain: str, bound: str, how: str) -> dict[str, str]:
    operation, device, kernel = key["operation"], key["device"], key["kernel"]
    format_ = key["dtype"] if not key["kv_dtype"] else f"{key['dtype']} over {key['kv_dtype']} cache"
    return {
        "operation": operation, "device": device, "kernel": f"{kernel}@{key['version']}", "format": format_,
        "domain": domain, "bound by": bound, "predicted by": how,
        "device and domain": f"{device}, {domain}", "format and domain": f"{format_}, {domain}",
        "device and bound": f"{device}, {bound}",
    }  # fmt: skip


def _binding(law: Law, shape: Mapping[str, FloatArray], key: Mapping[str, str], facts: DeviceFacts) -> FloatArray:
    """What a roofline says binds each row: bandwidth, arithmetic, or neither (the launch)."""
    work = least_work(law.operation, shape, key, facts)
    computed_s = work.flops / work.flops_per_s
    if work.moved_bytes is None or not work.bytes_per_s:
        return np.where(computed_s < LAUNCH_BOUND_S, "launch", "arithmetic")
    moved_s = work.moved_bytes / work.bytes_per_s
    slower = np.where(moved_s >= computed_s, "bandwidth", "arithmetic")
    return np.where(np.maximum(moved_s, computed_s) < LAUNCH_BOUND_S, "launch", slower)


def _out_of_fold(
    rows: pl.DataFrame, law: Law, artefact: Artefact, facts: DeviceFacts
) -> tuple[pl.DataFrame, FloatArray]:
    """Rows in the order of the artefact's categories, each predicted by a fit that has not seen its shape."""
    parts = [part for _, part in split_parts(law, rows, tuple(artefact.parts[0].selector))]
    return pl.concat(parts), np.concatenate([predict_held_out(law, part, facts).predicted_s for part in parts])
