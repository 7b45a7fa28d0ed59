"""``kvsim validate``: predictions against measured data, with errors by group and every row left out counted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvsim.cli.console import notice, print_json, print_notes, print_result, progress_bar, timed

ALL = "all"


def validate_command(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE",
            help="kernel-timings, vllm-serving, vllm-requests, engine-tables, kv-quant, edge, or all of them.",
        ),
    ],
    data: Annotated[
        Path, typer.Option("--data", help="Folder of the measured data, the suite's own folder in it, or one file.")
    ] = Path("../shared/data"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    as_unseen: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Ignore everything measured on this device, and score it alone."),
    ] = None,
    calibration: Annotated[
        str, typer.Option(metavar="NAME", help="Calibration set, by name or by the path of its YAML file.")
    ] = "default",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; as many as there are cores where not given.")
    ] = None,
) -> None:
    """Compare predictions with measurements: median, 90th percentile and bias of the error, by group."""
    from kvsim.validation import SUITES, load_suite, run_suite
    from kvsim.validation.report import result_document, result_table
    from kvsim.validation.suite import Options

    names = SUITES if suite == ALL else (suite,)
    for name in names:
        load_suite(name)
    documents = []
    for name in names:
        with timed(f"validated {name}"), progress_bar(name) as progress:
            found = run_suite(name, data, Options(as_unseen, calibration, workers or _available_cores(), progress))
        for one in found.skipped:
            notice(f"{name}: skipped {one.count}: {one.reason}")
        if as_json:
            documents.append(result_document(found))
            continue
        print_notes(found.notes)
        print_result(result_table(found))
    if as_json:
        print_json(documents if suite == ALL else documents[0])


def _available_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
