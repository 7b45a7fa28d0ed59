"""The small model's tables as points of a ranking. No torch."""

from __future__ import annotations

from pathlib import Path

from kvsim.errors import InvalidSpec, UnknownName
from kvsim.quality.compare import Point
from kvsim.quality.small_model.results import ResultRow, Results, load_results

ALL = "all"


def small_model_points(
    names: tuple[str, ...] | None = None, *, task: str = ALL, model: str = ALL, folder: Path | None = None
) -> tuple[Point, ...]:
    """Give every strategy's divergence of answers on a trained model, or on all of them together.

    Raises
    ------
    UnknownName, InvalidSpec
        The tables hold no such model, task or strategy.
    """
    results = load_results(folder)
    rows = results.over(_known("model", model, (*results.models, ALL)), _known("task", task, _tasks(results)))
    if names is not None:
        measured = {row.strategy for row in rows}
        unknown = [name for name in names if name not in measured]
        if unknown:
            msg = f"not measured on the small model: {', '.join(unknown)}; use --recompute DIR to measure it"
            raise InvalidSpec(msg)
        rows = tuple(row for row in rows if row.strategy in names)
    return tuple(_point(row) for row in rows)


def _tasks(results: Results) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row.task for row in results.rows))


def _known(kind: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise UnknownName(kind=kind, name=name, known=known)
    return name


def _point(row: ResultRow) -> Point:
    columns = (
        ("KL, millinats", f"{1e3 * row.kl_nats:.3g} ({1e3 * row.kl_low:.3g} to {1e3 * row.kl_high:.3g})"),
        ("score lost, points", f"{100 * row.loss:.1f} ({100 * row.loss_low:.1f} to {100 * row.loss_high:.1f})"),
        ("same top token, %", f"{100 * row.top1_agreement:.1f}"),
    )
    return Point(row.strategy, row.bits_per_element, row.kl_nats, (row.kl_low, row.kl_high), columns)
