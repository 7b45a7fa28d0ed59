"""The adaptive section of a report for a terminal: what was decoded at which level, when the policy acted, what for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvsim.rendering.numbers import UNKNOWN, format_number, format_share
from kvsim.report import AdaptiveUse, Figure, PolicyOutcome
from kvsim.units import format_bytes

SHOWN_ACTIONS = 12


def adaptive_view(use: AdaptiveUse) -> Iterator[RenderableType]:
    """Levels, classes, acts, and this policy beside each level held."""
    yield _levels(use)
    if use.classes:
        yield _classes(use)
    yield _actions(use)
    yield _outcomes(use)


def _table(title: str, *headers: str, text_columns: int = 1) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index < text_columns else "right")
    return table


def _levels(use: AdaptiveUse) -> Table:
    headers = ("level", "compression", "KV/token", "prompts", "tokens decoded", "share", "policy here s")
    table = _table("Adaptive compression", *headers, text_columns=2)
    total = sum(level.tokens_decoded for level in use.levels)
    for level in use.levels:
        table.add_row(
            str(level.level),
            escape(level.compression),
            format_bytes(level.kv_bytes_per_token),
            f"{level.prompts:,}",
            f"{level.tokens_decoded:,}",
            format_share(level.tokens_decoded / total if total else None),
            format_number(level.policy_s),
        )
    return table


def _classes(use: AdaptiveUse) -> Table:
    headers = ("class", "completed", "at reduced precision", "P99 TTFT ms", "median TPOT ms")
    table = _table("Request classes", *headers)
    for one in use.classes:
        table.add_row(
            escape(one.name),
            f"{one.completed:,}",
            format_share(one.reduced_share.value),
            _milliseconds(one.ttft_p99_s),
            _milliseconds(one.tpot_median_s),
        )
    return table


def _actions(use: AdaptiveUse) -> Table | Text:
    summary = (
        f"Policy: tightened {use.tightened} times, relaxed {use.relaxed} times; encoded {use.requantized_sequences:,} "
        f"running sequences again ({use.requantized_tokens:,} tokens) in {format_number(use.requantize_s)} s of steps, "
        f"which freed {format_bytes(use.requantize_freed_bytes)} per device"
    )
    if not use.actions:
        return Text("Policy: never acted")
    table = _table(summary, "at s", "replica", "act", "KV use", "waiting", "freed", "reason", text_columns=0)
    table.columns[-1].justify = "left"
    for action in use.actions[:SHOWN_ACTIONS]:
        encoded = action.requantized_sequences
        table.add_row(
            format_number(action.time_s),
            str(action.replica),
            f"{encoded} encoded again" if encoded else f"level {action.from_level} to {action.to_level}",
            format_share(action.kv_utilization),
            str(action.waiting),
            format_bytes(action.freed_bytes) if encoded else "",
            action.reason,
        )
    more = use.total_actions - min(len(use.actions), SHOWN_ACTIONS)
    if more:
        table.add_row("", "", f"and {more} more", "", "", "", "the JSON report lists 100")
    return table


def _outcomes(use: AdaptiveUse) -> Table:
    columns: tuple[tuple[str, Callable[[PolicyOutcome], str]], ...] = (
        ("P99 TTFT ms", lambda one: _milliseconds(one.ttft_p99_s)),
        ("median TPOT ms", lambda one: _milliseconds(one.tpot_median_s)),
        ("P99 E2E ms", lambda one: _milliseconds(one.e2el_p99_s)),
        ("mean queue ms", lambda one: _milliseconds(one.queue_delay_mean_s)),
        ("output tok/s", lambda one: _number(one.output_throughput)),
        ("goodput req/s", lambda one: _number(one.request_goodput)),
        ("preemptions", lambda one: UNKNOWN if one.preemptions is None else f"{one.preemptions:,}"),
        ("reduced precision", lambda one: format_share(one.reduced_share.value)),
    )
    title = "What adapting bought: the same requests with each level held (central edge)"
    table = _table(title, "policy", "", *(header for header, _ in columns), text_columns=2)
    for one in use.outcomes:
        if one.reason is not None:
            table.add_row(one.policy, escape(one.compression), f"cannot run: {escape(one.reason)}")
        else:
            table.add_row(one.policy, escape(one.compression), *(read(one) for _, read in columns))
    return table


def _milliseconds(figure: Figure) -> str:
    return UNKNOWN if figure.value is None else format_number(figure.value * 1e3)


def _number(figure: Figure) -> str:
    return UNKNOWN if figure.value is None else format_number(figure.value)
