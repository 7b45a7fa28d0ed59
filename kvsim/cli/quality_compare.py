"""``kvsim quality compare`` and ``kvsim quality train``: methods at equal bytes, and the models that show it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvsim.cli.console import (
    joined_names,
    notice,
    print_json,
    print_notes,
    print_result,
    progress_bar,
    stdout_width,
    timed,
)
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsim.quality.compare import Point, Ranked

DEFAULT_BITS = "2.5,3.5,4.5,6.5,8.5"
SOURCES = ("ensemble", "small-model")
WIDTH_FOR_ALL, NARROW_COLUMNS = 130, 2
"""Narrower terminals see neither method nor family, and of further figures as many as NARROW_COLUMNS."""
_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^()]*\))")


def train_command(
    architecture: Annotated[str, typer.Option("--arch", help="plain, smeared or smeared-cla2.")] = "smeared",
    seed: Annotated[int, typer.Option(min=0, help="Weights follow from it, on one machine to the bit.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of the weights; else the user's cache.")
    ] = None,
) -> None:
    """Train the small transformer to its criterion on the CPU, unless its weights are there already (needs torch)."""
    weights = _with_torch()
    with timed(f"{architecture} seed {seed}: ready"):
        trained = weights.load_or_train(architecture, seed, out, notice)
    print_json({"folder": str(out or weights.cache_dir()), "name": trained.name, **trained.record})


def compare_command(
    on: Annotated[
        Literal["ensemble", "small-model", "both"], typer.Option("--on", help="What the methods are measured on.")
    ] = "both",
    bits: Annotated[str, typer.Option(help="Budgets in bits per element of the uncompressed cache.")] = DEFAULT_BITS,
    strategies: Annotated[
        str | None, typer.Option("--strategies", "-s", help="Only these, with commas between them.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="recall, needle, chain, copy, language; -seen: question in the prompt; or all.")
    ] = "all",
    model: Annotated[str, typer.Option(help="One trained model, such as plain-seed1, or all.")] = "all",
    recompute: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Measure on the small model now, with weights and outcomes in DIR."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Rank methods at equal bytes: each by its best configuration at or under the budget, metadata counted."""
    from kvsim.quality.compare import rank_at

    budgets = _parse_bits(bits)
    names = _parse_names(strategies)
    points = {source: _points(source, names, task, model, recompute) for source in SOURCES if on in (source, "both")}
    ranked = {source: {budget: rank_at(found, budget) for budget in budgets} for source, found in points.items()}
    if as_json:
        print_json(_document(ranked))
        return
    for source, by_budget in ranked.items():
        for budget, ranking in by_budget.items():
            _show(source, budget, ranking)
    _show_agreement(ranked, budgets)
    notice(_note("small-model" if on == "small-model" else on))


def _points(
    source: str, names: tuple[str, ...] | None, task: str, model: str, recompute: Path | None
) -> tuple[Point, ...]:
    if source == "ensemble":
        from kvsim.quality.ensemble_points import ensemble_points

        told: list[str] = []
        with timed("measured on the ensembles"), progress_bar("measuring") as progress:
            found = ensemble_points(names, told.append, progress=progress)
        print_notes(joined_names(told))
    else:
        from kvsim.quality.small_model.points import small_model_points

        if recompute is not None:
            _recompute(recompute, names)
        found = small_model_points(names, task=task, model=model, folder=recompute)
    return found


def _recompute(folder: Path, names: tuple[str, ...] | None) -> None:
    _with_torch()
    from kvsim.quality.small_model.report import measure_all

    with timed("measured on the small model"):
        measure_all(folder, folder, names=names, report=notice)


def _with_torch() -> Any:
    """Give the module of weights; raise InvalidSpec with a remedy where torch is missing."""
    try:
        from kvsim.quality.small_model import weights
    except ModuleNotFoundError as error:
        msg = f"{error.name} is not installed, and training needs it: pip install 'kvsim[capture]'"
        raise InvalidSpec(msg) from error
    return weights


def _parse_bits(text: str) -> tuple[float, ...]:
    try:
        budgets = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        budgets = ()
    if not budgets or not all(0 < budget <= 16 for budget in budgets):
        msg = f"--bits {text!r}: numbers above 0, at most 16, with commas between them, such as {DEFAULT_BITS}"
        raise InvalidSpec(msg)
    return budgets


def _parse_names(text: str | None) -> tuple[str, ...] | None:
    from kvsim.compression import parse_compression
    from kvsim.compression.plan_file import named_strategy

    if text is None or text.strip() == "all":
        return None
    parts = (part.strip() for part in _COMMA_OUTSIDE_PARENTHESES.split(text))
    return tuple(parse_compression(named_strategy(part)).name for part in parts if part)


def _note(on: str) -> str:
    from kvsim.quality.small_model.results import CAVEAT

    rule = "at a budget stands each method's best measured configuration at or under it; nothing is extrapolated"
    return f"note: {CAVEAT}; {rule}" if on != "ensemble" else f"note: synthetic tensors, relative ordering only; {rule}"


def _show(source: str, budget: float, ranking: Sequence[Ranked]) -> None:
    from rich import box
    from rich.table import Table

    is_wide = stdout_width() >= WIDTH_FOR_ALL
    title = f"{source}: at most {budget:g} bits per element"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right", no_wrap=True)
    if is_wide:
        table.add_column("method", no_wrap=True)
        table.add_column("family")
    table.add_column("best configuration", no_wrap=True)
    columns = [name for name, _ in ranking[0].point.columns] if ranking else []
    columns = columns if is_wide else columns[:NARROW_COLUMNS]
    for name in ("bits", *columns):
        table.add_column(name, justify="right")
    for one in ranking:
        place = f"{one.rank}{'=' if one.ties_with_best and one.rank > 1 else ''}"
        named = (one.method, one.family, one.point.strategy) if is_wide else (one.point.strategy,)
        cells = [text for _, text in one.point.columns[: len(columns)]]
        table.add_row(place, *named, f"{one.point.bits_per_element:.2f}", *cells)
    if not ranking:
        table.caption = "no measured configuration takes so few"
    print_result(table)


def _show_agreement(ranked: dict[str, dict[float, tuple[Ranked, ...]]], budgets: tuple[float, ...]) -> None:
    from kvsim.quality.compare import rank_agreement

    if len(ranked) < 2:
        return
    first, second = ranked.values()
    for budget in budgets:
        found = rank_agreement(first[budget], second[budget])
        text = "too few methods in both" if found is None else f"Spearman {found:.2f}"
        notice(f"order of methods on both at {budget:g} bits: {text}")


def _document(ranked: dict[str, dict[float, tuple[Ranked, ...]]]) -> list[dict[str, Any]]:
    return [
        {
            "on": source,
            "budget_bits": budget,
            "rank": one.rank,
            "method": one.method,
            "family": one.family,
            "strategy": one.point.strategy,
            "bits_per_element": one.point.bits_per_element,
            "risk": one.point.risk,
            "risk_interval": one.point.risk_interval,
            "ties_with_best": one.ties_with_best,
            **dict(one.point.columns),
        }
        for source, by_budget in ranked.items()
        for budget, ranking in by_budget.items()
        for one in ranking
    ]
