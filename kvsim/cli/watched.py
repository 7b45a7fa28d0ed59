"""``--trace-out`` and ``--metrics-out``: what a run did over time, as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvsim.cli.console import notice
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.sim.observer import RunObserver

TRACE_SUFFIXES = (".json",)
METRICS_SUFFIXES = (".txt", ".prom")


def check_watch_outputs(trace_out: Path | None, metrics_out: Path | None, out: Path | None) -> None:
    """Refuse before the run what could not be written after it, or would write one file twice."""
    from kvsim.documents import check_output_path

    for path, suffixes in ((trace_out, TRACE_SUFFIXES), (metrics_out, METRICS_SUFFIXES)):
        if path is not None:
            check_output_path(path, suffixes)
    if trace_out is not None and out is not None and trace_out.resolve() == out.resolve():
        msg = f"--trace-out and --out name the same file, {out}"
        raise InvalidSpec(msg)


def observer_for(trace_out: Path | None, metrics_out: Path | None) -> RunObserver | None:
    """Give an observer where something is to be written."""
    if trace_out is None and metrics_out is None:
        return None
    from kvsim.sim.observer import RunObserver

    return RunObserver()


def write_watched(observer: RunObserver, model: str, trace_out: Path | None, metrics_out: Path | None) -> None:
    """Write the files that were asked for."""
    from kvsim.documents import write_output

    if trace_out is not None:
        from kvsim.rendering.trace_events import trace_document

        document, notices = trace_document(observer, model)
        for text in notices:
            notice(f"note: {text}")
        write_output(trace_out, document)
    if metrics_out is not None:
        from kvsim.rendering.openmetrics import openmetrics_document

        write_output(metrics_out, openmetrics_document(observer, model))
