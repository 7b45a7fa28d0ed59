"""Flags in vLLM's names that build a scenario, or change the one in a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.scenario import Scenario
    from kvsim.scenario_file import Assignment

SCENARIO = "Scenario"
ENGINE = "Engine"
LOAD = "Load"
SLO_NAMES = ("ttft", "tpot", "e2el")

RequestRateOption = Annotated[
    str | None, typer.Option(rich_help_panel=LOAD, help="Requests per second (Poisson), or inf for all at once.")
]
MaxConcurrencyOption = Annotated[
    int | None, typer.Option(rich_help_panel=LOAD, help="Closed loop with this many clients.")
]
NumPromptsOption = Annotated[int | None, typer.Option(rich_help_panel=LOAD, help="How many requests.")]


@dataclass(frozen=True)
class ScenarioFlags:
    """Everything on the command line that says what to simulate."""

    file: Annotated[
        Path | None, typer.Argument(metavar="SCENARIO.yaml", help="Scenario file; flags and --set change it.")
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=SCENARIO,
            help="Any field by its dotted key, such as engine.block_size=32. Repeatable.",
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(rich_help_panel=SCENARIO, help="Preset, config.json, its folder, or hub id.")
    ] = None
    device: Annotated[str | None, typer.Option(rich_help_panel=SCENARIO, help="Name of a device.")] = None
    workload: Annotated[str | None, typer.Option(rich_help_panel=SCENARIO, help="Name of a workload preset.")] = None
    compression: Annotated[
        str | None,
        typer.Option(rich_help_panel=SCENARIO, help="Strategy, such as fp8 or snapkv+kivi-2, or a PLAN.yaml."),
    ] = None
    seed: Annotated[int | None, typer.Option(rich_help_panel=SCENARIO, help="Seed of the workload.")] = None
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", rich_help_panel=ENGINE, help="Devices per replica.")
    ] = None
    max_num_seqs: Annotated[int | None, typer.Option(rich_help_panel=ENGINE, help="Most sequences in one step.")] = None
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(rich_help_panel=ENGINE, help="Token budget of one step.")
    ] = None
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(rich_help_panel=ENGINE, help="Share of memory that the engine may use.")
    ] = None
    block_size: Annotated[int | None, typer.Option(rich_help_panel=ENGINE, help="Tokens per KV block.")] = None
    max_model_len: Annotated[int | None, typer.Option(rich_help_panel=ENGINE, help="Longest prompt plus output.")] = (
        None
    )
    request_rate: RequestRateOption = None
    max_concurrency: MaxConcurrencyOption = None
    num_prompts: NumPromptsOption = None
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", rich_help_panel=LOAD,
                     help="SLO in milliseconds, as vLLM: ttft:500, tpot:50 or e2el:5000. Repeatable."),
    ] = None  # fmt: skip

    @property
    def base_dir(self) -> Path:
        """Folder that relative trace paths start from."""
        return self.file.parent if self.file is not None else Path()


_ENGINE_FLAGS = (
    "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "block_size", "max_model_len",
)  # fmt: skip
_SCENARIO_FLAGS = ("model", "device", "workload", "compression", "tensor_parallel_size", "seed")


class ScenarioCommand(TyperCommand):
    """A command that reads vLLM's ``--goodput ttft:500 tpot:50``: several values after one flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every further objective a flag of its own, which is what the option parser knows."""
        spread: list[str] = []
        in_objectives = False
        for argument in args:
            is_objective = argument.partition(":")[0] in SLO_NAMES and ":" in argument
            if in_objectives and is_objective and spread[-1] != "--goodput":
                spread.append("--goodput")
            in_objectives = argument == "--goodput" or (in_objectives and is_objective)
            spread.append(argument)
        return super().parse_args(ctx, spread)


def takes_scenario(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's first parameter, ScenarioFlags, by one command-line parameter per field."""
    return takes_flags(ScenarioFlags, command)


def takes_flags(kind: type[Any], command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's first parameter, a dataclass of flags, by one command-line parameter per field."""
    hints = get_type_hints(kind, include_extras=True)
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    names = [field.name for field in fields(kind)]

    @wraps(command)
    def wrapper(**given: Any) -> None:
        flags = kind(**{name: given.pop(name) for name in names})
        command(flags, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    shared = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
        for field in fields(kind)
    ]
    own = [parameter.replace(kind=keyword) for parameter in own]
    wrapper.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (*shared, *own)}
    return wrapper


def read_scenario(flags: ScenarioFlags) -> Scenario:
    """Build the scenario: file first, then flags, then --set; raise InvalidSpec where something is wrong."""
    from kvsim.scenario_file import load_document

    document = load_document(flags.file) if flags.file is not None else {}
    where = str(flags.file) if flags.file is not None else "command line"
    return read_scenario_over(flags, document, where)


def read_scenario_over(flags: ScenarioFlags, document: dict[str, Any], where: str) -> Scenario:
    """Build the scenario of a document that is there already, changed by flags and --set."""
    from kvsim.scenario_file import build_scenario, parse_override

    require_units = flags.file is None or flags.file.suffix != ".json"
    overrides = [parse_override(text) for text in flags.set_ or ()]
    assignments = [*_assignments(flags, document), *overrides]
    scenario = build_scenario(document, assignments, where, require_units=require_units)
    load = list(_load_assignments(flags, scenario))
    if not load:
        return scenario
    return build_scenario(document, [*assignments, *load], where, require_units=require_units)


def _assignments(flags: ScenarioFlags, document: dict[str, Any]) -> Iterator[Assignment]:
    from kvsim.compression.plan_file import named_strategy

    missing = [name for name in ("model", "device", "workload") if not (document.get(name) or getattr(flags, name))]
    set_keys = {text.partition("=")[0].partition(".")[0].strip() for text in flags.set_ or ()}
    missing = [name for name in missing if name not in set_keys]
    if missing and flags.file is None:
        msg = f"name a scenario file, or give {', '.join(f'--{name}' for name in missing)}"
        raise InvalidSpec(msg)
    for name in _SCENARIO_FLAGS:
        if getattr(flags, name) is not None:
            yield name, getattr(flags, name) if name != "compression" else named_strategy(flags.compression or "")
    for name in _ENGINE_FLAGS:
        if getattr(flags, name) is not None:
            yield f"engine.{name}", getattr(flags, name)
    for objective in flags.goodput or ():
        yield parse_objective(objective, "--goodput")


def parse_objective(text: str, flag: str) -> Assignment:
    """``ttft:500``, in milliseconds, as a field of a file; raise InvalidSpec naming the flag."""
    name, _, milliseconds = text.partition(":")
    try:
        value = float(milliseconds)
    except ValueError:
        value = -1.0
    if name not in SLO_NAMES or not value > 0:
        msg = f"{flag}: {text!r} is not NAME:MS; allowed names: {', '.join(SLO_NAMES)}, such as ttft:500"
        raise InvalidSpec(msg)
    return f"slo.{name}_s", f"{milliseconds.strip()} ms"


def _load_assignments(flags: ScenarioFlags, scenario: Scenario) -> Iterator[Assignment]:
    kind = getattr(scenario.workload, "kind", "synthetic")
    yield from load_assignments(flags.request_rate, flags.max_concurrency, flags.num_prompts, kind)


def load_assignments(
    request_rate: str | None, max_concurrency: int | None, num_prompts: int | None, kind: str
) -> Iterator[Assignment]:
    """Arrivals and number of requests, in the words of the workload's kind."""
    if request_rate is not None and max_concurrency is not None:
        msg = "--request-rate and --max-concurrency exclude each other: an open loop or a closed one"
        raise InvalidSpec(msg)
    if request_rate is not None:
        everything_at_once = request_rate.strip().lower() == "inf"
        yield (
            "workload.arrivals",
            {"kind": "burst"} if everything_at_once else {"kind": "poisson", "request_rate": request_rate},
        )
    if max_concurrency is not None:
        yield "workload.arrivals", {"kind": "concurrency", "max_concurrency": max_concurrency}
    if num_prompts is not None:
        yield f"workload.{'max_requests' if kind == 'trace' else 'num_prompts'}", num_prompts
