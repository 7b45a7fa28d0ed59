"""``kvsim list``: what can be named in a scenario."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.console import notice, print_json, print_result, print_text, stdout_width

if TYPE_CHECKING:
    from kvsim.kernel_catalog import CompiledTarget
    from kvsim.specs.model import ModelSpec

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Entry = dict[str, Any]
CUT_COLUMNS = ("source", "fitted_from")
CUT_CHARACTERS = 60
MIN_WIDTH_FOR_KERNEL_TABLE = 155
_UNIT_SUFFIX = re.compile(r"(_bytes|_flops)(_per_s)?$")
list_app = typer.Typer(no_args_is_help=True, help="List models, devices, links, strategies, workloads or kernels.")


@list_app.command("models")
def list_models_command(as_json: JsonFlag = False) -> None:
    """Model presets."""
    _show(model_entries(), as_json=as_json)


@list_app.command("devices")
def list_devices_command(as_json: JsonFlag = False) -> None:
    """Devices, with datasheet facts."""
    _show(device_entries(), as_json=as_json)


@list_app.command("links")
def list_links_command(as_json: JsonFlag = False) -> None:
    """Links that KV can take between replicas, with what transfers reach of them."""
    _show(link_entries(), as_json=as_json)


@list_app.command("workloads")
def list_workloads_command(as_json: JsonFlag = False) -> None:
    """Workload presets."""
    _show(workload_entries(), as_json=as_json)


@list_app.command("kernels")
def list_kernels_command(as_json: JsonFlag = False) -> None:
    """Reference kernels: what is checked, compiled and measured."""
    entries = kernel_entries()
    if as_json:
        print_json(entries)
    else:
        _show_kernels(entries)


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


def link_entries() -> list[Entry]:
    """One entry per link."""
    from kvsim.cost.links import price_link
    from kvsim.link_catalog import list_links, load_link

    entries = []
    for name in list_links():
        spec, priced = load_link(name), price_link(name)
        entries.append(
            {
                "name": name,
                "title": spec.title,
                "nominal_bytes_per_s": spec.bandwidth.value,
                "reached_bytes_per_s": priced.bytes_per_s,
                "setup_s": priced.setup_s,
                "aliases": list(spec.aliases),
                "source": spec.sources[spec.bandwidth.source].title,
            }
        )
    return entries


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


def kernel_entries() -> list[Entry]:
    """One entry per variant of a reference kernel, with its clocks per cost unit on each target."""
    from kvsim.kernel_catalog import TARGETS, load_compiled_kernels, measured_sources

    measured = measured_sources()
    return [
        {
            "name": kernel.variant,
            "operation": kernel.operation,
            "format": kernel.kv_format,
            "strategy": kernel.strategy,
            "form": kernel.form,
            "cost_unit": kernel.cost_unit,
            "read_bytes_per_unit": kernel.read_bytes_per_unit,
            "written_bytes_per_unit": kernel.written_bytes_per_unit,
            "targets": {name: _target_entry(kernel.targets[name]) for name in TARGETS if name in kernel.targets},
            "correctness": f"{kernel.correctness.where} {kernel.correctness.passed}/{kernel.correctness.cases}",
            "measured": (kernel.variant, kernel.source_sha256) in measured,
            "triton": kernel.triton,
        }
        for kernel in load_compiled_kernels()
    ]


def _target_entry(target: CompiledTarget) -> Entry:
    if target.unsupported is not None:
        return {"supported": False, "reason": target.unsupported}
    entry: Entry = {"supported": True, "config": target.configs[0].config}
    if target.count is None:
        return entry
    return entry | {
        "clocks": target.count.busiest_clocks,
        "busiest_pipe": target.count.busiest_pipe,
        "loops_counted_once": target.count.loops_counted_once,
        "unpriced": list(target.count.unpriced),
    }


def _show_kernels(entries: Sequence[Entry]) -> None:
    """Print a table per folder of kernels; a narrow terminal gets two lines per variant instead."""
    from kvsim.kernel_catalog import TARGETS

    if stdout_width() < MIN_WIDTH_FOR_KERNEL_TABLE:
        for entry in entries:
            state = "measured" if entry["measured"] else "not measured"
            print_text(f"{entry['name']}  {entry['correctness']}  {state}")
            clocks = ((target, _shown_clocks(entry["targets"].get(target))) for target in TARGETS)
            print_text("  " + "  ".join(f"{target} {shown}" for target, shown in clocks))
    else:
        _print_kernel_tables(entries)
    notice(
        "clocks per unit of a multiprocessor's busiest pipe, counted in machine code (default tiling), not measured;\n"
        "+: too few, as a loop is counted once or an instruction has no price; -: not supported (reason: --json)"
    )


def _print_kernel_tables(entries: Sequence[Entry]) -> None:
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    from kvsim.kernel_catalog import TARGETS

    tables = []
    for folder in dict.fromkeys(entry["operation"].split("/")[0] for entry in entries):
        rows = [entry for entry in entries if entry["operation"].split("/")[0] == folder]
        table = Table(box=box.SIMPLE_HEAD, title=folder, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
        table.add_column("kernel", no_wrap=True)
        table.add_column("checked", justify="right")
        for target in TARGETS:
            table.add_column(target, justify="right", no_wrap=True)
        table.add_column("clocks per", no_wrap=True)
        table.add_column("measured")
        for entry in rows:
            clocks = (_shown_clocks(entry["targets"].get(target), with_pipe=True) for target in TARGETS)
            name = escape(entry["name"].removeprefix(f"{folder}/"))
            passed = entry["correctness"].split()[-1]
            table.add_row(name, passed, *clocks, entry["cost_unit"], "yes" if entry["measured"] else "no")
        tables.append(table)
    print_result(Group(*tables))


def _shown_clocks(target: Entry | None, *, with_pipe: bool = False) -> str:
    """Show the clocks of the busiest pipe: ``+`` where they are known to be too few, ``-`` where there is no kernel."""
    if target is None or not target["supported"]:
        return "-"
    if "clocks" not in target:
        return "library"
    more = "+" if target["loops_counted_once"] or target["unpriced"] else ""
    pipe = f" {target['busiest_pipe']}" if with_pipe else ""
    return f"{target['clocks']:.3g}{more}{pipe}"


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
