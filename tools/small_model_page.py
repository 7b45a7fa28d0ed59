"""The generated tables of docs/small-model.md, from the committed results."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvsim.compression import parse_compression
from kvsim.documents import write_atomic
from kvsim.quality.compare import rank_at
from kvsim.quality.small_model.points import small_model_points
from kvsim.quality.small_model.results import ResultRow, Results, load_results
from kvsim.quality.small_model.tasks import TASKS

TABLES = re.compile(r"(<!-- tables: begin.*? -->\n).*?(<!-- tables: end -->)", re.DOTALL)
BUDGETS = (2.5, 3.5, 4.5, 6.5, 8.5)
LOOKUPS = tuple(task for task in TASKS if task != "language")


def write_page(page: Path) -> None:
    """Replace what stands between the page's two marks."""
    results = load_results()
    text = page.read_text(encoding="utf-8")
    made = "\n".join(_tables(results))
    replaced, count = TABLES.subn(lambda match: f"{match[1]}\n{made}\n{match[2]}", text)
    if count != 1:
        msg = f"{page}: wanted one place for tables, found {count}"
        raise ValueError(msg)
    write_atomic(page, replaced.encode())


def _tables(results: Results) -> Iterator[str]:
    yield from _models(results)
    yield from _layers(results)
    yield from _budgets()
    yield from _strategies(results)
    yield from _questions(results)
    yield from _left_out(results)


def _models(results: Results) -> Iterator[str]:
    yield "### Models\n"
    lookups = " | ".join(LOOKUPS)
    yield f"| model | parameters | steps | {lookups} | language, share of tokens | weights, SHA-256 |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, record in results.provenance["models"].items():
        found = record["validation"]
        shares = " | ".join(f"{found[task]:.3f}" for task in (*LOOKUPS, "language"))
        digest = record["weights_sha256"][:12]
        yield f"| {name} | {record['parameters']:,} | {record['steps']} | {shares} | `{digest}` |"
    yield ""


def _layers(results: Results) -> Iterator[str]:
    yield "### Which layers look things up\n"
    yield (
        "Score in per cent, on 50 sequences a task, when the prompt's cache of one layer is hidden (of two layers that "
        "share it, for CLA); language: unchanged most likely tokens.\n"
    )
    yield f"| model | {' | '.join(TASKS)} |"
    yield "|---|---|---|---|---|---|"
    for name, record in results.provenance["models"].items():
        shares = (", ".join(f"{100 * share:.0f}" for share in record["score_without_layer"][task]) for task in TASKS)
        yield f"| {name} | {' | '.join(shares)} |"
    yield ""


def _budgets() -> Iterator[str]:
    points = small_model_points()
    yield "### Best configuration of each method at a budget\n"
    yield (
        "All models and tasks, question not seen. KL in thousandths of a nat per answer token; score lost in points; "
        "`=` ties with the first within its 95 % interval.\n"
    )
    for budget in BUDGETS:
        yield f"**At most {budget:g} bits per element**\n"
        yield "| # | method | family | configuration | bits | KL | score lost |"
        yield "|---|---|---|---|---|---|---|"
        for one in rank_at(points, budget):
            columns = dict(one.point.columns)
            tie = "=" if one.ties_with_best and one.rank > 1 else ""
            yield (
                f"| {one.rank}{tie} | {one.method} | {one.family} | `{one.point.strategy}` "
                f"| {one.point.bits_per_element:.2f} | {columns['KL, millinats']} | {columns['score lost, points']} |"
            )
        yield ""


def _strategies(results: Results) -> Iterator[str]:
    yield "### Every strategy, by task\n"
    yield (
        "Mean over models, question not seen. Score: exact match of both questions in per cent; language: perplexity "
        "and the share of unchanged most likely tokens. Ordered by bits.\n"
    )
    yield f"| strategy | family | bits | {' | '.join(LOOKUPS)} | perplexity | same top token | KL, millinats |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in sorted(results.over("all", "all"), key=lambda one: (-one.bits_per_element, one.strategy)):
        scores = " | ".join(f"{100 * _row(results, task, row.strategy).score:.1f}" for task in LOOKUPS)
        language = _row(results, "language", row.strategy)
        family = parse_compression(row.strategy).family
        yield (
            f"| `{row.strategy}` | {family} | {row.bits_per_element:.2f} | {scores} "
            f"| {language.perplexity:.2f} | {100 * language.score:.1f} | {1e3 * row.kl_nats:.3g} |"
        )
    yield ""


def _questions(results: Results) -> Iterator[str]:
    seen = results.over("all", "all-seen")
    if not seen:
        return
    yield "### Selections: first and second question\n"
    yield "Exact match in per cent, mean over models and the four look-up tasks.\n"
    yield "| strategy | bits | not seen: first | second | seen: first | second |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(seen, key=lambda one: (-one.bits_per_element, one.strategy)):
        unseen = [_row(results, task, row.strategy) for task in LOOKUPS]
        first, second = (sum(_share(one, name) for one in unseen) / len(unseen) for name in ("first", "second"))
        yield (
            f"| `{row.strategy}` | {row.bits_per_element:.2f} | {100 * first:.1f} | {100 * second:.1f} "
            f"| {100 * _share(row, 'first'):.1f} | {100 * _share(row, 'second'):.1f} |"
        )
    yield ""


def _left_out(results: Results) -> Iterator[str]:
    reasons = results.provenance.get("not_run", {})
    if reasons:
        yield "### Not measured\n"
        yield from _reasons(sorted(reasons.items()))
        yield ""


def _reasons(reasons: Sequence[tuple[str, str]]) -> Iterator[str]:
    for strategy, reason in reasons:
        yield f"- `{strategy}`: {reason}"


def _row(results: Results, task: str, strategy: str) -> ResultRow:
    return next(row for row in results.over("all", task) if row.strategy == strategy)


def _share(row: ResultRow, name: str) -> float:
    value = getattr(row, name)
    return float(value) if value is not None else 0.0
