"""``kvsim sweep``: a grid of scenarios into one Parquet file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.console import notice, print_json, progress_bar, timed
from kvsim.errors import InfeasibleScenario, InvalidSpec

if TYPE_CHECKING:
    import polars as pl

EXIT_BUG = 1


def sweep_command(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="Base scenario and grid.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Result file: .parquet or .csv.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; as many as there are cores where not given.")
    ] = None,
    use_estimate: Annotated[
        bool, typer.Option("--estimate", help="Closed form without a queue instead of a simulation.")
    ] = False,
) -> None:
    """Evaluate every point of a grid; one row each, failures included.

    The counts by status go to stdout as JSON. Exit status 2 or 3 where not one point could run.
    """
    from kvsim.batch import load_sweep, sweep, write_results
    from kvsim.batch.result_file import RESULT_SUFFIXES
    from kvsim.documents import check_output_path

    check_output_path(out, RESULT_SUFFIXES)
    plan = load_sweep(file)
    with timed(f"evaluated {plan.num_points} points"), progress_bar("sweeping") as progress:
        frame = sweep(
            plan,
            method="estimate" if use_estimate else "simulation",
            workers=workers or available_cores(),
            on_progress=None if progress is None else lambda done, total: progress(done / total),
        )
    write_results(frame, out)
    _report_outcome(frame, out)


def available_cores() -> int:
    """Cores that this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _report_outcome(frame: pl.DataFrame, out: Path) -> None:
    from kvsim import errors

    statuses = frame["status"].to_list()
    print_json({status: statuses.count(status) for status in ("ok", "infeasible", "error")} | {"out": str(out)})
    problems = dict.fromkeys(
        f"{row['error_type']}: {row['reason']}"
        for row in frame.select("error_type", "reason").filter(frame["status"] != "ok").iter_rows(named=True)
    )
    for problem in list(problems)[:5]:
        notice(problem)
    if len(problems) > 5:
        notice(f"and {len(problems) - 5} other reasons; see the column 'reason'")
    bugs = [name for name in frame["error_type"].drop_nulls().unique() if not hasattr(errors, name)]
    if bugs:
        notice(f"{', '.join(sorted(bugs))}: these rows hit a bug in kvsim, please report it")
        raise typer.Exit(EXIT_BUG)
    if "ok" not in statuses:
        kind = InfeasibleScenario if "infeasible" in statuses else InvalidSpec
        msg = f"not one of {len(statuses)} points could run; the reasons are in {out}"
        raise kind(msg)
