"""A plan for a terminal and as Markdown: the set, what each device offers, crossovers, and commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvsim.rendering.edge import alone_line
from kvsim.rendering.numbers import format_number
from kvsim.units import format_seconds

if TYPE_CHECKING:
    from kvsim.planner import Plan, PlanPoint
    from kvsim.planner.answer import DevicePlan, RefusalCount

UNKNOWN = "unknown"
HEADERS = (
    "", "Device", "TP x replicas", "Strategy", "Seqs", "Tokens", "Mem", "Output tok/s", "Mean TTFT", "P99 TTFT",
    "$/1M tok", "J/tok", "Risk KL", "Quality", "Runs",
)  # fmt: skip
NOT_PLAYED = {
    "not run": "not run: not simulated, so it may miss a target that its mean holds (--simulate)",
    "doubtful": "doubtful: not simulated; one of the same layout and settings that should be faster missed a target",
}
BELOW = {
    150: frozenset({"Seqs", "Tokens", "Mem"}),
    128: frozenset({"Quality", "Mean TTFT"}),
    105: frozenset({"J/tok", "Runs"}),
}
"""What the table leaves out on a terminal of fewer columns; files and lines per device have it."""
NUMBERS = ("Seqs", "Tokens", "Mem", "Output tok/s", "Mean TTFT", "P99 TTFT", "$/1M tok", "J/tok", "Risk KL")


def plan_view(answer: Plan, rows: int, width: int) -> RenderableType:
    """Everything that ``kvsim plan`` shows."""
    parts: list[RenderableType] = [Text(headline(answer), style="bold"), _table(answer, rows, width)]
    if len(answer.points) > rows:
        parts.append(Text(f"and {len(answer.points) - rows} more points in the files (--out)"))
    shown = {_doubt(point) for point in answer.points[:rows] if point.simulated is None}
    parts += [Text(text) for name, text in NOT_PLAYED.items() if name in shown]
    for device in answer.devices:
        lines = list(device_lines(device))
        parts.append(Text(f"\n{device.device}: {device.title}", style="bold"))
        parts += [Text(f"  {line}") for line in lines]
    if answer.refused_in_simulation:
        parts.append(Text(f"\nmissed a limit when simulated: {_counts(answer.refused_in_simulation)}", style="yellow"))
    return Group(*parts)


def headline(answer: Plan) -> str:
    """What was asked, and how much was tried."""
    return (
        f"{answer.request.model}: {answer.screened:,} candidates screened, {answer.feasible:,} hold every limit, "
        f"{answer.on_screen_front:,} in the Pareto set by the closed form, {answer.simulated:,} simulated; "
        "mean TTFT and all else by the closed form, P99 TTFT by simulation"
    )


def _table(answer: Plan, rows: int, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    left_out = frozenset[str]().union(*(names for columns, names in BELOW.items() if width < columns))
    for header in HEADERS:
        if header in left_out:
            continue
        justify: Literal["left", "right"] = "right" if header in NUMBERS else "left"
        name = header.replace("TP x replicas", "TP x R") if left_out else header
        table.add_column(name, justify=justify, no_wrap=header not in ("Device", "Strategy"), overflow="fold")
    for point in answer.points[:rows]:
        shown = zip(HEADERS, cells(point), strict=True)
        table.add_row(*(escape(cell) for header, cell in shown if header not in left_out))
    return table


def cells(point: PlanPoint) -> tuple[str, ...]:
    """A point's cells, in the order of ``HEADERS``."""
    told, played = point.estimated, point.simulated
    share = point.settings.get("gpu_memory_utilization")
    return (
        point.name,
        point.device,
        f"{point.tensor_parallel_size} x {point.replicas}",
        point.strategy,
        f"{point.settings['max_num_seqs']}",
        f"{point.settings['max_num_batched_tokens']}",
        "-" if share is None else f"{share:g}",
        format_number(told.output_throughput),
        format_seconds(told.mean_ttft_s),
        _doubt(point) if played is None else format_seconds(played.p99_ttft_s),
        _known(told.usd_per_million_total_tokens),
        _known(told.joules_per_total_token),
        UNKNOWN if point.risk is None else f"{point.risk.kl_nats:.2g}",
        _quality(point),
        point.runs_on or "no",
    )


def _doubt(point: PlanPoint) -> str:
    """What stands in place of a figure that nobody simulated."""
    return "doubtful" if "like points missed a target" in point.marks else "not run"


def _known(value: float | None) -> str:
    return UNKNOWN if value is None else format_number(value)


def _quality(point: PlanPoint) -> str:
    if not point.quality:
        return "no floor"
    return ", ".join(UNKNOWN if held.share is None else f"{held.share:.3f}" for held in point.quality)


def device_lines(device: DevicePlan) -> Iterator[str]:
    """What one device offers, line by line."""
    yield f"{device.feasible:,} of {device.screened:,} candidates hold every limit" + (
        f"; missed: {_counts(device.refused)}" if device.refused else ""
    )
    yield f"limit and reason: {device.why}"
    if device.beside is not None:
        yield f"price and speed: {device.beside}"
    yield from device.facts
    if device.alone is not None and device.alone.reason is None:
        yield alone_line(device.alone)
    if device.runs_today is not None:
        yield from _pick_lines("runs today", device.runs_today)
    elif device.cheapest is not None:
        yield "runs today: nothing that was tried, holds every limit and is shipped for this device"
    if device.cheapest is not None and device.cheapest != device.runs_today:
        yield from _pick_lines("cheapest of all", device.cheapest)
    for crossover in device.crossovers:
        yield f"crossover: {crossover.line.partition(': ')[2]}"


def _pick_lines(name: str, point: PlanPoint) -> Iterator[str]:
    place = f"in the set as {point.name}" if point.in_set else "others dominate it"
    played = "not simulated"
    if point.simulated is not None:
        played = f"p99 TTFT {format_seconds(point.simulated.p99_ttft_s)}"
    yield f"{name}: {point.strategy} on {point.tensor_parallel_size} x {point.replicas} devices, {played} ({place})"
    for compared in point.compared:
        if compared.baseline != point.strategy:
            yield f"  against {compared.baseline}: {compared.decides}"
    for held in point.quality:
        yield f"  published: {held.line}"
    if point.risk is not None:
        risk = point.risk
        yield f"  risk: KL {risk.kl_nats:.3g} ({risk.kl_low:.3g} to {risk.kl_high:.3g}) nats on the small model"
    else:
        yield "  risk: not measured on the small model"
    yield from (f"  $ {line}" for line in command_lines(point))


def command_lines(point: PlanPoint) -> Iterator[str]:
    """How to run a point."""
    if not point.commands:
        yield f"({point.not_shipped})"
    for command in point.commands:
        said = [f"{command.engine} {command.since} or later" if command.since else command.engine]
        said += [f"needs {command.needs}"] if command.needs else []
        said += [command.remark] if command.remark else []
        said += [] if command.is_priced else ["its figures may differ"]
        yield f"{command.line}   # {'; '.join(said)}"


def _counts(refused: Sequence[RefusalCount]) -> str:
    return ", ".join(f"{one.limit} {one.count:,}" for one in refused)


def plan_markdown(answer: Plan, rows: int) -> str:
    """Render the whole answer as Markdown."""
    lines = [headline(answer) + ".", ""]
    lines += [_row(HEADERS), _row(["---:" if header in NUMBERS else "---" for header in HEADERS])]
    lines += [_row(cells(point)) for point in answer.points[:rows]]
    if len(answer.points) > rows:
        lines += ["", f"And {len(answer.points) - rows} more points."]
    for device in answer.devices:
        lines += ["", f"**{device.device}**, {device.title}", ""]
        for line in device_lines(device):
            indented = line.startswith("  ")
            lines.append(f"{'  ' if indented else ''}- {_escape(line.strip())}")
    if answer.refused_in_simulation:
        lines += ["", f"Missed a limit when simulated: {_counts(answer.refused_in_simulation)}."]
    lines += ["", *(f"- {_escape(note)}" for note in answer.notes)]
    return "\n".join(lines) + "\n"


def _row(cells_: Sequence[str]) -> str:
    return f"| {' | '.join(_escape(cell) for cell in cells_)} |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
