"""``kvsim plan``: which compression, device and settings serve a load within its limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.boundary import naming_file
from kvsim.cli.console import notice, print_json, print_notes, print_result, progress_bar, stdout_width, timed
from kvsim.cli.flags import (
    LOAD,
    MaxConcurrencyOption,
    NumPromptsOption,
    RequestRateOption,
    load_assignments,
    parse_objective,
    takes_flags,
)
from kvsim.cli.sweep import available_cores
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.planner import Plan, PlanRequest

OUT_SUFFIXES = (".json", ".parquet", ".csv", ".md")
LIMITS = "Limits"
SEARCH = "Search"


@dataclass(frozen=True)
class PlanFlags:
    """Everything on the command line that says what to plan for."""

    file: Annotated[
        Path | None, typer.Argument(metavar="REQUEST.yaml", help="Request file; flags and --set change it.")
    ] = None
    model: Annotated[str | None, typer.Option(help="Preset, config.json, its folder, or hub id.")] = None
    device: Annotated[str | None, typer.Option(help="Devices with commas between them.")] = None
    workload: Annotated[str | None, typer.Option(rich_help_panel=LOAD, help="Name of a workload preset.")] = None
    request_rate: RequestRateOption = None
    max_concurrency: MaxConcurrencyOption = None
    num_prompts: NumPromptsOption = None
    seed: Annotated[int | None, typer.Option(rich_help_panel=LOAD, help="Seed of the workload.")] = None
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", rich_help_panel=LIMITS, help="ttft:500, tpot:50 or e2el:5000. Repeatable."),
    ] = None
    floor: Annotated[
        list[str] | None,
        typer.Option(metavar="CLASS=SHARE", rich_help_panel=LIMITS,
                     help="Least share of the uncompressed score on a class of tasks: retrieval=0.98. Repeatable."),
    ] = None  # fmt: skip
    unknown_quality: Annotated[
        str | None, typer.Option(rich_help_panel=LIMITS, help="Without a published score: allow (marked) or refuse.")
    ] = None
    budget_usd_per_hour: Annotated[
        float | None, typer.Option(rich_help_panel=LIMITS, help="Most dollars per hour of all devices.")
    ] = None
    budget_watts: Annotated[float | None, typer.Option(rich_help_panel=LIMITS, help="Most TDP of all devices.")] = None
    budget_device_memory: Annotated[
        str | None, typer.Option(rich_help_panel=LIMITS, help="Most memory of one device, such as '60 GB'.")
    ] = None
    budget_sequence_kv: Annotated[
        str | None, typer.Option(rich_help_panel=LIMITS, help="Most KV of a mean sequence, such as '100 MB'.")
    ] = None
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies", "-s", rich_help_panel=SEARCH, help="Names with commas between them.",
            show_default="every part, and pairs of them",
        ),
    ] = None  # fmt: skip
    also: Annotated[
        str | None,
        typer.Option(rich_help_panel=SEARCH, help="Further strategies beside those, with commas; layer plans by file."),
    ] = None
    max_devices: Annotated[int | None, typer.Option(rich_help_panel=SEARCH, help="Most devices of a kind.")] = None
    max_candidates: Annotated[
        int | None, typer.Option(rich_help_panel=SEARCH, help="Most candidates screened per device.")
    ] = None
    simulate: Annotated[
        int | None, typer.Option(rich_help_panel=SEARCH, help="Points to simulate for p99 TTFT; 0 for none.")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", rich_help_panel=SEARCH,
                     help="Any field by its dotted key, such as search.max_num_seqs=[64,256]. Repeatable."),
    ] = None  # fmt: skip

    @property
    def base_dir(self) -> Path:
        """Folder that relative paths in the file start from."""
        return self.file.parent if self.file is not None else Path()


def plan_command(
    flags: PlanFlags,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes for simulations where that is worth it.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Most points in the table.")] = 16,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write: .json, .md, or a row per point .parquet, .csv.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Choose: the Pareto set of what serves a load within its limits, with reasons, crossovers and flags to run it."""
    from kvsim.documents import check_output_path
    from kvsim.planner import plan

    if as_json and as_markdown:
        msg = "--json and --markdown exclude each other"
        raise InvalidSpec(msg)
    if out is not None:
        check_output_path(out, OUT_SUFFIXES)
    request = read_request(flags)
    with naming_file(flags.file), timed("planned"), progress_bar("planning") as progress:
        answer = plan(
            request,
            base_dir=flags.base_dir,
            workers=workers or available_cores(),
            progress=None if progress is None else lambda stage, share: progress(_overall(stage, share)),
        )
    if out is not None:
        _write(answer, out, rows)
    _show(answer, rows, as_json=as_json, as_markdown=as_markdown)


def _overall(stage: str, share: float) -> float:
    """Share of all work: screening and simulating usually take about as long."""
    return share / 2 if stage == "screening" else 0.5 + share / 2


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _strategies(text: str | None) -> list[str] | None:
    from kvsim.cli.compare import parse_strategies

    return None if text is None else list(parse_strategies(text))


def _with_unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value!r} {unit}"


def read_request(flags: PlanFlags) -> PlanRequest:
    """Build the request: file first, then flags, then --set; raise InvalidSpec where something is wrong."""
    from kvsim.documents import validate
    from kvsim.planner import PlanRequest
    from kvsim.scenario_file import assign, load_document

    document = load_document(flags.file) if flags.file is not None else {}
    where = str(flags.file) if flags.file is not None else "command line"
    for key, value in _assignments(flags, document):
        assign(document, key, value, where)
    _read_layer_plans(document.get("search"), flags.base_dir)
    missing = [name for name in ("model", "devices", "workload") if not document.get(name)]
    if missing and flags.file is None:
        listed = ", ".join("--device" if name == "devices" else f"--{name}" for name in missing)
        msg = f"name a request file, or give {listed}"
        raise InvalidSpec(msg)
    require_units = flags.file is None or flags.file.suffix != ".json"
    return validate(PlanRequest, document, where, require_units=require_units)


def _read_layer_plans(search: Any, base_dir: Path) -> None:
    """Put what layer plan files say in place of their names, in place; a file's names start from its folder."""
    from kvsim.compression.plan_file import is_file, named_strategy

    for key in ("strategies", "also"):
        given = search.get(key) if isinstance(search, dict) else None
        names = [given] if isinstance(given, str) else given
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            search[key] = [
                named_strategy(
                    "+".join(str(base_dir / piece) if is_file(piece) else piece for piece in name.split("+"))
                )
                for name in names
            ]


def _assignments(flags: PlanFlags, document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    values = {
        "model": flags.model, "devices": _split(flags.device), "workload": flags.workload, "seed": flags.seed,
        "simulate": flags.simulate, "unknown_quality": flags.unknown_quality,
        "search.strategies": _strategies(flags.strategies), "search.also": _strategies(flags.also),
        "search.max_devices": flags.max_devices,
        "search.max_candidates": flags.max_candidates,
        "budget.usd_per_hour": _with_unit(flags.budget_usd_per_hour, "USD/h"),
        "budget.watts": _with_unit(flags.budget_watts, "W"),
        "budget.device_memory": flags.budget_device_memory, "budget.sequence_kv": flags.budget_sequence_kv,
    }  # fmt: skip
    yield from ((key, value) for key, value in values.items() if value is not None)
    yield from (parse_objective(text, "--slo") for text in flags.slo or ())
    if flags.floor:
        yield "floors", {**(document.get("floors") or {}), **dict(map(_floor, flags.floor))}
    yield from map(_override, flags.set_ or ())
    yield from _load(flags, document)


def _floor(text: str) -> tuple[str, float]:
    from kvsim.planner.request import TASK_CLASSES, task_class

    name, equals, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not equals or not 0 < value <= 1:
        msg = (
            f"--floor: {text!r} is not CLASS=SHARE with a share above 0 and at most 1, such as retrieval=0.98; "
            f"classes: {', '.join(TASK_CLASSES)}"
        )
        raise InvalidSpec(msg)
    return task_class(name), value


def _override(text: str) -> tuple[str, Any]:
    from kvsim.documents import parse_yaml
    from kvsim.field_paths import check_dotted_key
    from kvsim.planner import PlanRequest

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        msg = f"--set: {text!r} is not of the form key=value, such as search.max_devices=4"
        raise InvalidSpec(msg)
    if not key.strip().startswith("floors."):
        check_dotted_key(PlanRequest, key.strip(), "--set")
    return key.strip(), parse_yaml(value, f"--set {key.strip()}")


def _load(flags: PlanFlags, document: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    workload = document.get("workload")
    kind = workload.get("kind", "synthetic") if isinstance(workload, dict) else "synthetic"
    yield from load_assignments(flags.request_rate, flags.max_concurrency, flags.num_prompts, kind)


def _write(answer: Plan, out: Path, rows: int) -> None:
    from kvsim.documents import write_output

    if out.suffix == ".json":
        write_output(out, (answer.model_dump_json(indent=2) + "\n").encode())
    elif out.suffix == ".md":
        from kvsim.rendering.plan import plan_markdown

        write_output(out, plan_markdown(answer, rows).encode())
    else:
        from kvsim.batch import write_results
        from kvsim.planner.rows import to_frame

        write_results(to_frame(answer), out)


def _show(answer: Plan, rows: int, *, as_json: bool, as_markdown: bool) -> None:
    print_notes(answer.notes)
    if as_json:
        print_json(answer.model_dump(mode="json"))
    elif as_markdown:
        from kvsim.rendering.plan import plan_markdown

        typer.echo(plan_markdown(answer, rows), nl=False)
    else:
        from kvsim.rendering.plan import plan_view

        print_result(plan_view(answer, rows, stdout_width()))
    if not answer.points:
        notice("no point is left")


plan_command = takes_flags(PlanFlags, plan_command)
