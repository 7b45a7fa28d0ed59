"""Requests from a trace file, at its own times or under a generated arrival process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvsim.errors import TraceError
from kvsim.requests import IntArray, RequestTable
from kvsim.specs.workload import ReplayArrivals, TraceWorkload
from kvsim.traces import TraceRows, read_trace
from kvsim.workloads.arrivals import Schedule, generate, scheduled
from kvsim.workloads.prefixes import chained_hashes
from kvsim.workloads.streams import stream


def build_traced(workload: TraceWorkload, seed: int, base_dir: Path | None) -> RequestTable:
    """Read the trace and schedule its requests; raise TraceError where it cannot be read or replayed."""
    path = (base_dir or Path()) / workload.path
    rows = read_trace(workload.format, path, workload.columns)
    kept = slice(workload.max_requests)
    prompts = rows.prompt_tokens[kept]
    schedule = _schedule(workload, rows, len(prompts), seed, path)
    hashes = None
    if rows.prefix_hashes is not None:
        hashes = chained_hashes(rows.prefix_hashes[kept], prompts, rows.hash_block_tokens)
    names, classes = _classes(rows, kept)
    return RequestTable(
        arrival_ticks=schedule.arrival_ticks,
        prompt_tokens=prompts,
        output_tokens=rows.output_tokens[kept],
        delay_ticks=schedule.delay_ticks,
        parent=schedule.parent,
        prefix_hashes=hashes,
        hash_block_tokens=rows.hash_block_tokens,
        request_class=classes,
        class_names=names,
        priority=None if rows.priority is None else rows.priority[kept],
        source=_source(workload, rows, len(prompts), seed),
        notes=rows.notes,
    )


def _classes(rows: TraceRows, kept: slice) -> tuple[tuple[str, ...], IntArray | None]:
    """(names in alphabetical order, index of each request's class)."""
    if rows.classes is None:
        return (), None
    names = tuple(sorted(set(rows.classes)))
    position = {name: index for index, name in enumerate(names)}
    return names, np.array([position[name] for name in rows.classes[kept]], dtype=np.int64)


def _schedule(workload: TraceWorkload, rows: TraceRows, count: int, seed: int, path: Path) -> Schedule:
    if not isinstance(workload.arrivals, ReplayArrivals):
        return generate(workload.arrivals, count, stream(seed, "arrivals"), items_per_request=1.0)
    if rows.arrival_s is None:
        msg = (
            f"{path}: arrivals: replay needs times, and this {workload.format} file has none; set arrivals to poisson, "
            "gamma, constant, concurrency or burst"
        )
        if workload.format == "columns":
            msg += ", or name columns.timestamp_column"
        raise TraceError(msg)
    return scheduled(rows.arrival_s[:count] / workload.arrivals.speedup)


def _source(workload: TraceWorkload, rows: TraceRows, count: int, seed: int) -> str:
    taken = f"{count} requests" if count == len(rows) else f"first {count} of {len(rows)} requests"
    if isinstance(workload.arrivals, ReplayArrivals):
        how = "replayed" if workload.arrivals.speedup == 1.0 else f"replayed at {workload.arrivals.speedup:g}x speed"
    else:
        how = f"{workload.arrivals.kind} arrivals, seed {seed}"
    return f"{rows.source}, {taken}, {how}"
