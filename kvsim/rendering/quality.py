"""Tables of risk: three groups of columns that are never added up."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvsim.quality.run import ContinuationRisk, StrategyRisk, TheoryRisk

if TYPE_CHECKING:
    from rich.table import Table

    from kvsim.quality.measure import MeasuredRisk
    from kvsim.report import Quality

GROUPS = {"theory": "bright_black", "measured": "bold", "model": "bold", "published": "cyan"}
UNKNOWN = "-"
WIDTH_FOR_ALL = 130
"""Columns of text that the whole table needs."""
NARROW = frozenset(
    {
        ("theory", "output"), ("measured", "output"), ("measured", "lost mass"), ("model", "KL, nats"),
    }
)  # fmt: skip
"""What a narrow terminal sees of it."""
SHORT = {"heavy keys": "keys", "diffuse": "diffuse", "quiet heavy tokens": "sinks", "large noise": "noise"}
"""Cautions as a narrow column spells them."""


def risk_document(row: StrategyRisk, *, heads: bool = False) -> dict[str, Any]:
    """Give a row as plain values; unknown is None."""
    return {
        "strategy": row.strategy,
        "reason": row.reason,
        "bits_per_element": row.measured and row.measured.bits_per_element,
        "native_layers": row.native_layers,
        "outer_layers": row.outer_layers,
        "theory": row.theory and _theory(row.theory, heads=heads),
        "theory_reason": row.theory_reason,
        "measured": row.measured and _measured(row.measured, heads=heads),
        "model": row.continuation and _model(row.continuation),
        "published": row.published.model_dump(mode="json"),
    }


def _theory(theory: TheoryRisk, *, heads: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "output_error": theory.output_error,
        "logit_error": theory.logit_error,
        "eviction_bound": theory.eviction_bound,
        "cautions": theory.cautions,
    }
    if heads:
        document["heads"] = [vars(head) | {"cautions": sorted(head.cautions)} for head in theory.heads]
    return document


def _measured(measured: MeasuredRisk, *, heads: bool) -> dict[str, Any]:
    worst = measured.worst
    document: dict[str, Any] = {
        "output_error": measured.output_error,
        "worst_head": {"layer": worst.layer, "head": worst.head, "output_error": worst.output_error},
        "logit_error": measured.mean("logit_error"),
        "lost_mass": measured.mean("lost_mass"),
        "top1_agreement": measured.mean("top1_agreement"),
        "needle_survival": measured.needle_survival,
    }
    if heads:
        document["heads"] = [vars(head) for head in measured.heads]
    return document


def _model(continuation: ContinuationRisk) -> dict[str, Any]:
    return {
        "mean_kl_nats": continuation.mean_kl,
        "max_kl_nats": max(continuation.kl),
        "top1_agreement": continuation.top1_agreement,
        "tokens": len(continuation.kl),
    }


def risk_table(rows: Sequence[StrategyRisk], title: str, width: int = WIDTH_FOR_ALL) -> Table:
    """One line per strategy; headers name the kind of risk above each column.

    Below WIDTH_FOR_ALL columns of text, those that tell most.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=escape(title), title_justify="left", title_style="bold")
    is_wide = width >= WIDTH_FOR_ALL
    table.add_column("\nstrategy", no_wrap=is_wide, overflow="fold")
    with_model = any(row.continuation for row in rows)
    columns = _columns(with_model=with_model)
    shown = [one for one in columns if is_wide or one in NARROW]
    table.add_column("\nbits/element" if is_wide else "\nbits", justify="right", no_wrap=True)
    for group, name in shown:
        table.add_column(f"{group}\n{name}", justify="left" if name in ("status", "caution") else "right",
                         header_style=GROUPS[group], no_wrap=not is_wide)  # fmt: skip
    for row in rows:
        if row.measured is None:
            blank = dict.fromkeys(columns, UNKNOWN) | {columns[-1]: _published(row.published)}
            table.add_row(escape(row.strategy), UNKNOWN, *(blank[one] for one in shown))
            continue
        cells = [*_theory_cells(row.theory), *_measured_cells(row.measured)]
        if with_model:
            cells += _model_cells(row.continuation)
        cells.append(_published(row.published))
        named = dict(zip(columns, cells, strict=True))
        table.add_row(escape(row.strategy), f"{row.measured.bits_per_element:.3f}", *(named[one] for one in shown))
    return table


def _columns(*, with_model: bool) -> list[tuple[str, str]]:
    columns = [("theory", name) for name in ("output", "logit", "eviction ≤", "caution")]
    columns += [("measured", name) for name in ("output", "worst head", "logit", "lost mass", "top-1", "needles")]
    if with_model:
        columns += [("model", "KL, nats"), ("model", "top-1")]
    return [*columns, ("published", "status")]


def _theory_cells(theory: TheoryRisk | None) -> list[str]:
    if theory is None:
        return [UNKNOWN] * 4
    bound = theory.eviction_bound
    cautions = [f"{SHORT[name]} {count / len(theory.heads):.0%}" for name, count in theory.cautions.items()]
    return [
        f"{theory.output_error:.3g}",
        f"{theory.logit_error:.3g}",
        UNKNOWN if bound is None else f"{bound:.3g}",
        ", ".join(cautions),
    ]


def _measured_cells(measured: MeasuredRisk) -> list[str]:
    worst, needles = measured.worst, measured.needle_survival
    return [
        f"{measured.output_error:.3g}",
        f"{worst.output_error:.3g} L{worst.layer}H{worst.head}",
        f"{measured.mean('logit_error'):.3g}",
        f"{measured.mean('lost_mass'):.3g}",
        f"{measured.mean('top1_agreement'):.1%}",
        UNKNOWN if needles is None else f"{needles:.1%}",
    ]


def _model_cells(continuation: ContinuationRisk | None) -> list[str]:
    if continuation is None:
        return [UNKNOWN, UNKNOWN]
    return [f"{continuation.mean_kl:.3g}", f"{continuation.top1_agreement:.1%}"]


def _published(quality: Quality) -> str:
    return f"{quality.status} ({len(quality.notes)})" if quality.notes else quality.status


def head_table(row: StrategyRisk) -> Table:
    """One line per query head of one strategy."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=escape(row.strategy), title_justify="left", title_style="bold")
    for name in ("layer", "query head"):
        table.add_column(f"\n{name}", justify="right")
    for group, name in _columns(with_model=False)[:-1]:
        if name != "worst head":
            table.add_column(f"{group}\n{name}", justify="left" if name == "caution" else "right",
                             header_style=GROUPS[group])  # fmt: skip
    for line in _head_rows(row):
        table.add_row(*(_cell(value) for value in line.values()))
    return table


def _cell(value: object) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _head_rows(row: StrategyRisk) -> list[dict[str, Any]]:
    if row.measured is None:
        return []
    theory = row.theory.heads if row.theory is not None else (None,) * len(row.measured.heads)
    return [
        {
            "layer": seen.layer,
            "head": seen.head,
            "theory_output_error": said and said.output_error,
            "theory_logit_error": said and said.logit_error,
            "theory_eviction_bound": said and said.eviction_bound,
            "theory_cautions": said and ", ".join(sorted(said.cautions)),
            "measured_output_error": seen.output_error,
            "measured_logit_error": seen.logit_error,
            "measured_lost_mass": seen.lost_mass,
            "measured_top1_agreement": seen.top1_agreement,
            "measured_needle_survival": seen.needle_survival,
        }
        for said, seen in zip(theory, row.measured.heads, strict=True)
    ]


def risk_csv(rows: Sequence[StrategyRisk], *, heads: bool = False) -> str:
    """One line per strategy, or per strategy and head; empty is unknown."""
    if heads:
        lines = [{"strategy": row.strategy} | line for row in rows for line in _head_rows(row)]
    else:
        lines = [_flat(risk_document(row)) for row in rows]
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(document: dict[str, Any]) -> dict[str, Any]:
    """Put groups into the columns' names; of nested values keep what fits a cell."""
    line = {key: value for key, value in document.items() if not isinstance(value, dict) and key != "model"}
    for group in ("theory", "measured", "model"):
        for key, value in (document[group] or {}).items():
            if key == "worst_head":
                line |= {f"{group}_worst_{part}": one for part, one in value.items()}
            else:
                line[f"{group}_{key}"] = "; ".join(f"{k} {v}" for k, v in value.items()) if key == "cautions" else value
    return line | {"published_status": document["published"]["status"]}
