"""``kvsim calibrate``: measure this machine's GPU, or fit existing tables, into a set that a scenario can name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.console import notice, print_json, print_notes, print_result, progress_bar, timed
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from rich.table import Table

    from kvsim.calibration.artefact import Artefact
    from kvsim.calibration.calibrate import FitPlan, OnProgress, Written
    from kvsim.calibration.timings import Timings
    from kvsim.specs.device import DeviceSpec

DEFAULT_OUT = Path("calibration")


def calibrate_command(
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Device: what to measure here, or whose rows of --from to fit.")
    ] = None,
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="PATH",
            help="Fit these tables instead of measuring: rows.csv, aiconfigurator's (its name: the installed package), "
            "LLMServingSim's, InferSim's or Vidur's. Repeatable.",
        ),
    ] = None,
    table_format: Annotated[str | None, typer.Option("--format", help="Read --from as this one of them only.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder that gets measured/, fitted/ and sets/.")
    ] = DEFAULT_OUT,
    set_name: Annotated[
        str | None, typer.Option("--set", metavar="NAME", help="Name of the set; the device's where not given.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over a set of that name.")] = False,
    ops: Annotated[
        list[str] | None,
        typer.Option("--ops", help="Only these operations (measuring: beginnings of kernels' names). Repeatable."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1.0, metavar="SECONDS", help="Stop measuring within this wall time.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Fit kernels to timings, say how wrong the fits are, and write a set that pins them.

    No set in use is changed: a scenario names the new one with `calibration: PATH`.
    """
    from kvsim.calibration.calibrate import check_out, plan_fits, require_rows, set_file

    if not from_ and gpu is None:
        msg = "--gpu: name the GPU of this machine, or give tables with --from PATH"
        raise InvalidSpec(msg)
    check_out(out)
    set_file(out, set_name or "name")
    operations = tuple(ops or ())
    spec, problem = None, None
    if from_:
        tables = _read(from_, table_format, gpu, operations)
    elif dry_run:
        _show_measuring_plan(gpu or "", operations)
        return
    else:
        spec, problem = _measure(gpu or "", out, operations, budget)
        tables = _read([out / "measured" / spec.name], "kvsim", spec.name, ())
    plan = plan_fits(tables)
    if dry_run:
        _show_plan(plan, as_json=as_json)
        return
    require_rows(plan, ", ".join(str(path) for path in from_ or [out]))
    print_notes([problem] if problem else [])
    artefacts, written = _fit_and_write(plan, out, set_name, may_replace=replace)
    _show_result(plan, artefacts, written, as_json=as_json)


def _read(paths: Sequence[Path], table_format: str | None, gpu: str | None, operations: Sequence[str]) -> list[Timings]:
    from kvsim.calibration.tables import read_tables
    from kvsim.device_catalog import load_device

    devices = None
    if gpu is not None:
        device = load_device(gpu)
        print_notes([device.notice] if device.notice else [])
        devices = (device.spec.name,)
    with timed(f"read {', '.join(str(path) for path in paths)}"):
        return [one for path in paths for one in read_tables(path, table_format, devices, operations or None)]


def _measure(gpu: str, out: Path, operations: tuple[str, ...], budget_s: float | None) -> tuple[DeviceSpec, str | None]:
    from kvsim.calibration.measuring import MEASURED, Request, device_present, measure

    spec = device_present(gpu)
    folder = out / MEASURED / spec.name
    notice(f"measuring {spec.title}; rows go to {folder}, and an interrupted run goes on where it was")
    try:
        with timed("measured"):
            problem = measure(Request(folder, operations, budget_s), notice)
    except KeyboardInterrupt:
        notice(f"rows measured so far stay in {folder}")
        raise
    return spec, problem


def _show_measuring_plan(gpu: str, operations: tuple[str, ...]) -> None:
    from kvsim.calibration.measuring import print_plan
    from kvsim.device_catalog import load_device

    print_plan(load_device(gpu).spec, operations, typer.echo)


def _fit_and_write(
    plan: FitPlan, out: Path, set_name: str | None, *, may_replace: bool
) -> tuple[list[Artefact], Written]:
    from kvsim.calibration.calibrate import fit_plan, write_set

    devices = dict.fromkeys(key[0] for key, _ in plan.keys)
    name = set_name or (next(iter(devices)) if len(devices) == 1 else "calibrated")
    with timed(f"fitted {len(plan.parts)} kernels"), _fit_progress() as on_progress:
        artefacts = fit_plan(plan, on_progress)
    return artefacts, write_set(artefacts, out, name, may_replace=may_replace)


@contextmanager
def _fit_progress() -> Iterator[OnProgress | None]:
    with progress_bar("fitting") as advance:
        yield None if advance is None else lambda share, _: advance(share)


def _show_plan(plan: FitPlan, *, as_json: bool) -> None:
    from kvsim.calibration.timings import KEY_COLUMNS

    if as_json:
        fits = [dict(zip(KEY_COLUMNS, key, strict=True)) | {"rows": rows} for key, rows in plan.keys]
        print_json({"fits": fits, "left_out": plan.excluded_by_reason})
        return
    table = _table(*KEY_COLUMNS, "rows")
    for key, rows in plan.keys:
        table.add_row(*key, f"{rows:,}")
    print_result(table)
    _show_left_out(plan)
    notice("nothing was written")


def _show_result(plan: FitPlan, artefacts: Sequence[Artefact], written: Written, *, as_json: bool) -> None:
    from kvsim.cli.calibrations import artefact_entry

    defaults = {pin.id for pin in written.pins if pin.default}
    entries = [artefact_entry(one, is_default=one.id in defaults) for one in artefacts]
    if as_json:
        print_json(
            {"set": str(written.set_path), "pinned": len(written.pins), "artefacts": entries,
             "left_out": plan.excluded_by_reason}
        )  # fmt: skip
        return
    from kvsim.cli.calibrations import artefact_table

    print_result(artefact_table(entries))
    _show_left_out(plan)
    others = len(written.pins) - len(artefacts)
    beside = f" and {others} shipped ones of the same device" if others else ""
    typer.echo(f"Set {written.set_path} pins these{beside}. No scenario uses it until it says so:")
    typer.echo(f"  calibration: {written.set_path.absolute()}")


def _show_left_out(plan: FitPlan) -> None:
    for reason, count in plan.excluded_by_reason.items():
        notice(f"left out: {reason}: {count} rows")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold", justify="right" if column == "rows" else "left")
    return table
