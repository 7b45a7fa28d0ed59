"""What fits on one person's device, for a terminal.

A narrow terminal sees central values alone, and of these the ones that a choice hangs on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvsim.rendering.numbers import EN_DASH, UNKNOWN, format_number
from kvsim.units import format_seconds

if TYPE_CHECKING:
    from kvsim.edge import EdgeAnswer
    from kvsim.report import Figure

MINUTE_S = 60.0
HEADERS = ("fits", "readable", "longest", "ends by", "prefill", "tok/s", "sustained", "J/token", "battery")
WIDTH_FOR_BANDS = 180
BELOW = {112: frozenset({"fits", "readable"}), 90: frozenset({"prefill"})}
"""What the table leaves out on a terminal of fewer columns."""


def edge_view(
    answers: Sequence[EdgeAnswer], reading_tokens_per_s: float, width: int = WIDTH_FOR_BANDS
) -> RenderableType:
    """One row per strategy, with bands where there is room; what cannot run below, with the reason."""
    ran = [answer for answer in answers if answer.reason is None]
    parts: list[RenderableType] = []
    if ran:
        parts.append(_table(ran, width))
        parts.append(Text(_sentence(ran[0], reading_tokens_per_s)))
        if width < WIDTH_FOR_BANDS:
            parts.append(Text(f"Bands, and below {max(BELOW)} columns some figures, need a wider terminal or --json."))
    for reason in dict.fromkeys(one.reason for one in answers if one.reason):
        names = ", ".join(one.strategy for one in answers if one.reason == reason)
        parts.append(Text(f"{names} cannot run: {reason}", style="yellow"))
    return Group(*parts)


def alone_line(answer: EdgeAnswer) -> str:
    """One strategy's answer in a line."""
    context, cold = _flat(answer.context_tokens, _whole), _flat(answer.decode_tokens_per_s, format_number)
    kept, energy = (_flat(one, format_number) for one in (answer.sustained_tokens_per_s, answer.joules_per_token))
    return (
        f"one user: {context} tokens of context, ended by {answer.limit}; behind {answer.rated_tokens:,} of them "
        f"{cold} tokens/s cold, {kept} after minutes, {energy} J/token, battery {_flat(answer.battery_s, _minutes)} "
        "(kvsim edge has bands and other strategies)"
    )


def _flat(figure: Figure | None, show: Callable[[float], str]) -> str:
    """Central value alone."""
    return UNKNOWN if figure is None or figure.value is None else show(figure.value)


def _table(answers: Sequence[EdgeAnswer], width: int) -> Table:
    title = f"One sequence on {answers[0].device}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False,
                  padding=(0, 1) if width >= WIDTH_FOR_BANDS else (0, 1, 0, 0))  # fmt: skip
    table.add_column("strategy", overflow="fold")
    left_out = frozenset[str]().union(*(names for columns, names in BELOW.items() if width < columns))
    for header in HEADERS:
        if header not in left_out:
            table.add_column(header, justify="right", no_wrap=width < WIDTH_FOR_BANDS)
    for answer in answers:
        named = zip(HEADERS, _cells(answer), strict=True)
        shown = [cell for header, cell in named if header not in left_out]
        central = [cell.partition("\n")[0] for cell in shown] if width < WIDTH_FOR_BANDS else shown
        table.add_row(escape(answer.strategy), *central)
    return table


def _cells(answer: EdgeAnswer) -> list[str]:
    memory = answer.memory_tokens
    return [
        "any" if memory is None or memory.value is None else _tokens(memory),
        _tokens(answer.readable_tokens),
        _tokens(answer.context_tokens),
        answer.limit or UNKNOWN,
        _spread(answer.prefill_s, format_seconds),
        _spread(answer.decode_tokens_per_s, format_number),
        _spread(answer.sustained_tokens_per_s, format_number),
        _spread(answer.joules_per_token, format_number),
        _spread(answer.battery_s, _minutes),
    ]


def _tokens(figure: Figure | None) -> str:
    return _spread(figure, _whole)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _minutes(seconds: float) -> str:
    return f"{seconds / MINUTE_S:,.0f} min"


def _spread(figure: Figure | None, show: Callable[[float], str]) -> str:
    """Central value, and its band below it."""
    if figure is None or figure.value is None:
        return UNKNOWN
    shown = show(figure.value)
    if figure.low is None or figure.high is None or figure.low == figure.high:
        return shown
    return f"{shown}\n({show(figure.low)}{EN_DASH}{show(figure.high)})"


def _sentence(answer: EdgeAnswer, reading_tokens_per_s: float) -> str:
    return (
        f"fits: longest prompt in memory; readable: longest context decoded at {reading_tokens_per_s:g} tokens/s; the "
        f"model ends at {answer.model_tokens:,}. Rates and energy behind {answer.rated_tokens:,} tokens in the first "
        "row, and behind each row's own longest context where none was asked for. Bands span the priors; basis: "
        "literature."
    )
