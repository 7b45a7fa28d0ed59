"""The generated tables of docs/layer-plans.md, from the committed results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvsim.documents import write_atomic
from kvsim.quality.small_model.plan_results import (
    ALL,
    CALIBRATED,
    ORACLE,
    EnsembleRow,
    PlanResults,
    PlanRow,
    load_plan_results,
)

TABLES = re.compile(r"(<!-- tables: begin.*? -->\n).*?(<!-- tables: end -->)", re.DOTALL)


def write_page(page: Path) -> None:
    """Replace what stands between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    made = "\n".join(tables(load_plan_results()))
    replaced, count = TABLES.subn(lambda match: f"{match[1]}\n{made}\n{match[2]}", text)
    if count != 1:
        msg = f"{page}: wanted one place for tables, found {count}"
        raise ValueError(msg)
    write_atomic(page, replaced.encode())


def tables(results: PlanResults) -> Iterator[str]:
    """Give the page's tables line by line."""
    totals = tuple(dict.fromkeys(row.question for row in results.rows))
    for total in totals:
        yield from _contest(results, total)
    yield from _by_model(results, totals)
    yield from _by_task(results, totals)
    yield from _uniforms(results, totals)
    yield from _ensembles(results)


def _contest(results: PlanResults, total: str) -> Iterator[str]:
    rows = results.over(ALL, total)
    every, asked = (
        tuple(dict.fromkeys(row.model for row in some if row.model != ALL))
        for some in (results.rows, [row for row in results.rows if row.question == total])
    )
    yield f"### {total}, {'all models' if asked == every else ' and '.join(asked)}\n"
    yield "| what each layer gets | score, % | KL, nats | above the best uniform policy, points | above the oracle |"
    yield "|---|---|---|---|---|"
    shown = [row for row in rows if row.kind == "plan" or row.name in {CALIBRATED, ORACLE}]
    for row in sorted(shown, key=lambda row: row.kind, reverse=True):
        name = f"the same policy, {row.name}" if row.kind == "uniform" else f"plan: {row.name}"
        yield f"| {name} | {_percent(row.score)} | {row.kl_nats:.3g} | {_gain(row)} | {_oracle(row)} |"
    yield ""


def _by_model(results: PlanResults, totals: Sequence[str]) -> Iterator[str]:
    yield "### Model by model\n"
    yield "| model | total | best uniform policy | its score, % | plan by KL, % | gain, points | the plan |"
    yield "|---|---|---|---|---|---|---|"
    for model in dict.fromkeys(row.model for row in results.rows if row.model != ALL):
        for total in totals:
            rows = results.over(model, total)
            if not rows:
                continue
            alike = next(row for row in rows if row.is_chosen)
            plan = next(row for row in rows if row.name == "KL")
            cells = (model, total, alike.name, _percent(alike.score), _percent(plan.score), _gain(plan))
            yield f"| {' | '.join(cells)} | `{plan.strategy}` |"
    yield ""


def _by_task(results: PlanResults, totals: Sequence[str]) -> Iterator[str]:
    names = ("KL", "KL, from copy and language", "KL, task left out")
    local = ("local", "local, from copy and language", "local, task left out")
    tasks = tuple(results.over(ALL, totals[0])[0].by_task)
    yield "### Tasks that the plan was not calibrated on\n"
    yield f"| total | what each layer gets | {' | '.join(tasks)} |"
    yield f"|---|---|{'---|' * len(tasks)}"
    for total in totals:
        rows = {row.name: row for row in results.over(ALL, total)}
        for name in (one for one in (CALIBRATED, *names, *local) if one in rows):
            scores = " | ".join(_percent(rows[name].by_task[task]) for task in tasks)
            yield f"| {total} | {'the same policy' if name == CALIBRATED else f'plan: {name}'} | {scores} |"
    yield ""


def _uniforms(results: PlanResults, totals: Sequence[str]) -> Iterator[str]:
    yield "### Uniform policies\n"
    yield "Score in per cent over all models.\n"
    yield "| total | policy: score |"
    yield "|---|---|"
    for total in totals:
        rows = [
            row for row in results.over(ALL, total) if row.kind == "uniform" and row.name not in {CALIBRATED, ORACLE}
        ]
        ordered = sorted(rows, key=lambda row: -row.score)
        yield f"| {total} | {', '.join(f'{row.name}: {_percent(row.score)}' for row in ordered)} |"
    yield ""


def _ensembles(results: PlanResults) -> Iterator[str]:
    yield "### Ensembles\n"
    yield (
        "Relative error of attention outputs in per cent, and how much of the best uniform policy's squared error is "
        "gone, in per cent.\n"
    )
    yield "| ensemble | total | best uniform policy | its error | plan | both | policy only | budget only |"
    yield "|---|---|---|---|---|---|---|---|"
    for ensemble, total in dict.fromkeys((row.ensemble, row.question) for row in results.ensembles):
        rows = [row for row in results.ensembles if (row.ensemble, row.question) == (ensemble, total)]
        plans = {row.name: row for row in rows if row.kind == "plan"}
        best = next(row for row in rows if row.name == CALIBRATED)
        same = [row.name for row in rows if row.is_chosen and row.name != CALIBRATED]
        name, error = same[0] if same else "one per cache", _percent(best.output_error)
        gains = " | ".join(
            _ensemble_gain(plans[plan]) for plan in ("local", "local, policy only", "local, budget only")
        )
        yield f"| {ensemble} | {total} | {name} | {error} | {_percent(plans['local'].output_error)} | {gains} |"
    yield ""


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _gain(row: PlanRow) -> str:
    return f"{100 * row.gain:+.1f} ({100 * row.gain_low:+.1f} to {100 * row.gain_high:+.1f})"


def _oracle(row: PlanRow) -> str:
    return f"{100 * row.gain_over_oracle:+.1f} ({100 * row.oracle_low:+.1f} to {100 * row.oracle_high:+.1f})"


def _ensemble_gain(row: EnsembleRow) -> str:
    return f"{100 * row.gain:.1f} ({100 * row.gain_low:.1f} to {100 * row.gain_high:.1f})"
