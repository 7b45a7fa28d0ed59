"""``kvsim list calibrations``: what a set pins, and how wrong each fit is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.console import notice, print_json, print_result

if TYPE_CHECKING:
    from rich.table import Table

    from kvsim.calibration.artefact import Artefact

Entry = dict[str, Any]


def list_calibrations_command(
    set_name: Annotated[str, typer.Argument(metavar="SET", help="Name of a set, or path of its file.")] = "default",
    device: Annotated[str | None, typer.Option(help="Only this device's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Fitted kernels of a set, with their errors on shapes that the fit had not seen."""
    from kvsim.calibration.sets import load_set
    from kvsim.device_catalog import load_device

    calibration = load_set(set_name)
    wanted = load_device(device).spec.name if device is not None else None
    entries = [
        artefact_entry(calibration.load(pin), is_default=pin.default)
        for pin in calibration.pins
        if wanted in (None, pin.device)
    ]
    if as_json:
        print_json(entries)
        return
    print_result(artefact_table(entries))
    notice(
        "median / 90th percentile of the error on shapes that the fit had not seen (cold: KV beyond the cache);\n"
        "*: what auto takes; stale: kvsim's own kernel was changed since it was measured"
    )


def artefact_entry(artefact: Artefact, *, is_default: bool) -> Entry:
    """One artefact as JSON has it."""
    return {
        "id": artefact.id,
        "device": artefact.device,
        "operation": artefact.operation,
        "kernel": artefact.kernel,
        "version": artefact.version,
        "dtype": artefact.dtype,
        "kv_dtype": artefact.kv_dtype,
        "default": is_default,
        "basis": artefact.basis.value,
        "law": artefact.law,
        "rows": artefact.rows,
        "held_out_by": list(artefact.held_out_by),
        "held_out": {name: found.model_dump(mode="json") for name, found in sorted(artefact.held_out.items())},
        "stale": artefact.is_stale,
        "origins": list(dict.fromkeys(f"{one.origin} ({one.licence})" for one in artefact.origins)),
    }


def artefact_table(entries: Sequence[Entry]) -> Table:
    """Entries as a table for the terminal."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("device", "operation", "kernel", "version", "format", "basis"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "cold", "cached"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("id", no_wrap=True)
    for entry in entries:
        words = [entry["dtype"], *([entry["kv_dtype"]] if entry["kv_dtype"] else [])]
        marks = ("*" if entry["default"] else "") + (" stale" if entry["stale"] else "")
        table.add_row(
            *(escape(entry[name]) for name in ("device", "operation", "kernel", "version")),
            "/".join(words),
            entry["basis"],
            f"{entry['rows']:,}",
            _errors(entry["held_out"].get("cold")),
            _errors(entry["held_out"].get("cached")),
            f"{entry['id']}{marks}",
        )
    return table


def _errors(found: dict[str, Any] | None) -> str:
    if found is None or found["median_ape"] is None:
        return "-"
    return f"{found['median_ape']:.1%} / {found['p90_ape']:.1%}"
