"""``kvsim list strategies``: what each one takes, what its price rests on, and what is known of its risk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.console import notice, print_json, print_result, stdout_width

if TYPE_CHECKING:
    from rich.table import Table

    from kvsim.quality.layers import RiskLayers
    from kvsim.strategy_table import StrategyRow

WIDE_COLUMNS = 150
NAME_WIDTH = 28
CLASS_LETTERS = {
    "language modelling": "L", "knowledge": "K", "short reasoning": "S", "reasoning": "R", "code": "C",
    "long-context retrieval": "N", "long-context understanding": "U", "unstated": "?",
}  # fmt: skip
"""Of task classes, where the terminal has no room for their names; N is for needles."""


def list_strategies_command(
    model: Annotated[
        str, typer.Option(help="Model that bytes are of: preset, config.json or hub id.")
    ] = "llama-3.1-8b",
    device: Annotated[str, typer.Option(help="Device that decode prices are for.")] = "h100-sxm",
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt that the fold is taken at.")] = 8192,
    family: Annotated[str | None, typer.Option(help="Only this family, such as rotation or 'low rank'.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Descriptions, kernels and reasons too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """KV compression strategies: bytes, kernels, what prices and risk rest on."""
    from kvsim.strategy_table import strategy_table

    rows = strategy_table(model, device, context, family)
    if as_json:
        print_json([row.model_dump(mode="json") for row in rows])
        return
    is_wide = stdout_width() >= WIDE_COLUMNS
    print_result(_table(rows, is_wide=is_wide))
    if verbose:
        print_result(_details(rows))
    notice(_legend(model, device, context, is_wide=is_wide))


def _table(rows: Sequence[StrategyRow], *, is_wide: bool) -> Table:
    """One row per strategy, under a heading per family."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=is_wide, overflow="fold", max_width=None if is_wide else NAME_WIDTH)
    for header in ("B/token", "bits", "fold") if is_wide else ("bits", "fold"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("frees", "kernel", "price"):
        table.add_column(header, no_wrap=True)
    table.add_column("risk", no_wrap=not is_wide, overflow="fold")
    if is_wide:
        table.add_column("description", overflow="fold")
    for family in dict.fromkeys(_heading(row) for row in rows):
        table.add_row(Text(family, style="bold"))
        for row in rows:
            if _heading(row) == family:
                table.add_row(*map(escape, _cells(row, is_wide=is_wide)))
    return table


def _heading(row: StrategyRow) -> str:
    return "combinations" if " + " in row.family else row.family


def _cells(row: StrategyRow, *, is_wide: bool) -> list[str]:
    from kvsim.rendering.numbers import format_number

    cells = [
        f" {row.name}",
        "-" if row.bytes_per_token is None else f"{row.bytes_per_token:,.0f}",
        "-" if row.bits_per_value is None else f"{row.bits_per_value:.2f}",
        "-" if row.fold is None else format_number(row.fold),
        _frees(row),
        "ours" if row.kernels else "none",
        "-" if row.decode_basis is None else str(row.decode_basis),
        _risk(row.risk, spelled=is_wide),
    ]
    # Bits say it already, and names must not be cut.
    return [*cells, row.description] if is_wide else [cells[0], *cells[2:]]


def _frees(row: StrategyRow) -> str:
    if row.frees_memory is None:
        return "-"
    return ("yes" if row.frees_memory else "no") + ("*" if row.masked_in else "")


def _risk(risk: RiskLayers, *, spelled: bool) -> str:
    layers = [name for name, known in (("theory", risk.theory), ("tensors", risk.tensors)) if known]
    if spelled:
        published = f"{'interpolated' if risk.interpolated else 'published'}: {', '.join(risk.published)}"
        return "; ".join([*layers, *([published] if risk.published else [])]) or "none"
    letters = "".join(CLASS_LETTERS[one] for one in risk.published)
    parts = ["t" if risk.theory else "-", "m" if risk.tensors else "-"]
    return "".join(parts) + (f" {'~' if risk.interpolated else ''}{letters}" if letters else " -")


def _details(rows: Sequence[StrategyRow]) -> Table:
    """What has no room in a column, strategy by strategy."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(escape(row.name), escape(row.description))
        lines = [f"kernels: {', '.join(row.kernels) or 'none yet'}"]
        lines += [f"masked, not freed, in: {row.masked_in}"] if row.masked_in else []
        lines += [f"freed in: {row.freed_in}"] if row.freed_in else []
        lines += [f"cannot run: {row.cannot_run}"] if row.cannot_run else []
        lines += [f"not on tensors: {row.risk.why_not_on_tensors}"] if row.risk.why_not_on_tensors else []
        table.add_row("", escape("\n".join(lines)), style="dim")
    return table


def _legend(model: str, device: str, context: int, *, is_wide: bool) -> str:
    size = "B/token, and bits" if is_wide else "bits"
    lines = [
        f"{size} per K and V value, of one kept token of {model}; fold: all held, after {context:,} tokens",
        "frees: whether it holds less than native KV; *: some public code merely masks, and frees nothing (--verbose)",
        f"price: what reading the cache in a decode step rests on, on {device}; -: cannot run (reason: --verbose)",
    ]
    if not is_wide:
        names = ", ".join(f"{letter} {name}" for name, letter in CLASS_LETTERS.items() if letter != "?")
        lines += [
            "risk: t theory, m measured on tensors, then classes of published scores (~: all interpolated):",
            names,
        ]
    return "\n".join(lines)
