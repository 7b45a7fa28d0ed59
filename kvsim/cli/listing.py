"""``kvsim list``: what can be named in a scenario."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.console import print_json, print_result

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Entry = dict[str, Any]
CUT_COLUMNS = ("source", "fitted_from")
CUT_CHARACTERS = 60
_UNIT_SUFFIX = re.compile(r"(_bytes|_flops)(_per_s)?$")
list_app = typer.Typer(no_args_is_help=True, help="List models, devices, strategies or workloads.")


@list_app.command("models")
def list_models_command(as_json: JsonFlag = False) -> None:
    """Model presets."""
    _show(model_entries(), as_json=as_json)


@list_app.command("devices")
def list_devices_command(as_json: JsonFlag = False) -> None:
    """Devices, with datasheet facts."""
    _show(device_entries(), as_json=as_json)


@list_app.command("strategies")
def list_strategies_command(as_json: JsonFlag = False) -> None:
    """KV compression strategies."""
    _show(strategy_entries(), as_json=as_json)


@list_app.command("workloads")
def list_workloads_command(as_json: JsonFlag = False) -> None:
    """Workload presets."""
    _show(workload_entries(), as_json=as_json)


def model_entries() -> list[Entry]:
    """One entry per model preset."""
    from kvsim.model_catalog import list_models, load_model

    return [_model_entry(name, load_model(name)) for name in list_models()]


def _model_entry(name: str, spec: ModelSpec) -> Entry:
    return {
        "name": name,
        "parameters": spec.num_parameters,
        "active_parameters": spec.num_active_parameters,
        "layers": spec.num_layers,
        "attention": list(dict.fromkeys(group.kind.value for group in spec.groups)),
        "weight_bits": spec.weight_bits,
        "max_position_embeddings": spec.max_position_embeddings,
        "source": spec.source,
    }


def device_entries() -> list[Entry]:
    """One entry per device spec."""
    from kvsim.device_catalog import list_devices, load_device

    entries = []
    for name in list_devices():
        spec = load_device(name).spec
        entries.append(
            {
                "name": name,
                "title": spec.title,
                "kind": spec.kind,
                "memory_bytes": spec.capacity_bytes,
                "bandwidth_bytes_per_s": spec.bandwidth_bytes_per_s,
                "dense_half_flops_per_s": spec.dense_half_flops_per_s,
                "native_dtypes": list(spec.native_dtypes.value),
                "confidence": spec.confidence,
                "aliases": list(spec.aliases),
            }
        )
    return entries


def strategy_entries() -> list[Entry]:
    """One entry per named strategy."""
    from kvsim.compression import STRATEGIES, describe_strategy

    return [{"name": name, "description": describe_strategy(name)} for name in STRATEGIES]


def workload_entries() -> list[Entry]:
    """One entry per workload preset."""
    from kvsim.specs.workload import SyntheticWorkload
    from kvsim.workload_catalog import list_workloads, load_workload

    entries = []
    for name in list_workloads():
        spec = load_workload(name)
        entry: Entry = {"name": name, "kind": spec.kind, "arrivals": spec.arrivals.kind}
        if isinstance(spec, SyntheticWorkload):
            entry |= {
                "input_len": spec.input_len.kind,
                "output_len": spec.output_len.kind,
                "shared_prefix_tokens": spec.shared_prefix_tokens,
                "turns": "several" if spec.conversations else "one",
                "fitted_from": spec.fitted_from or "unknown",
            }
        entries.append(entry)
    return entries


def _show(entries: Sequence[Entry], *, as_json: bool) -> None:
    if as_json:
        print_json(list(entries))
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    columns = list(dict.fromkeys(key for entry in entries for key in entry))
    for key in columns:
        is_number = all(isinstance(entry.get(key, 0), (int, float)) for entry in entries)
        table.add_column(
            _UNIT_SUFFIX.sub("", key).replace("_", " "),
            justify="right" if is_number else "left",
            no_wrap=key == "name",
            overflow="fold",
        )
    for entry in entries:
        table.add_row(*(escape(_shown(key, entry.get(key, ""))) for key in columns))
    print_result(table)


def _shown(key: str, value: Any) -> str:
    """Show a value in a table: readable units by the key's suffix, and long provenance cut (JSON has it whole)."""
    from kvsim.units import format_bytes, format_rate

    if key.endswith("_per_s"):
        return format_rate(value, "B/s" if "bytes" in key else "FLOPS")
    if key.endswith("_bytes"):
        return format_bytes(value)
    if "parameters" in key:
        return format_rate(value, "").strip().replace("G", "B")
    if isinstance(value, (int, float)):
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    text = ", ".join(value) if isinstance(value, list) else str(value)
    is_cut = key in CUT_COLUMNS and len(text) > CUT_CHARACTERS
    return text[: CUT_CHARACTERS - 1] + "…" if is_cut else text
