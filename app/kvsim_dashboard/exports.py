"""What can be taken away: a table as CSV, the scenario as YAML, the reports as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Final

import yaml

from kvsim import __version__
from kvsim.metrics import METRICS, read
from kvsim.simulate import Comparison
from kvsim_dashboard.question import Question
from kvsim_dashboard.tables import basis_of

CSV_HEADER: Final = ("strategy", "metric", "header", "unit", "value", "low", "high", "basis")
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")


def guarded(value: object) -> object:
    """Put an apostrophe before text that a spreadsheet would run as a formula; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return "" if value is None else value


def metrics_csv(comparisons: Sequence[Comparison]) -> str:
    """One line per strategy and metric, in the metric's unit; a strategy that cannot run gives its reason."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for comparison in comparisons:
        report = comparison.report
        if report is None:
            refusal = (comparison.strategy, "reason", "cannot run because", "", comparison.reason, None, None, None)
            writer.writerow([guarded(cell) for cell in refusal])
            continue
        for metric in METRICS:
            reading = read(report, metric)
            shown = "unknown" if reading.value is None else reading.value
            cells = (shown, reading.low, reading.high, basis_of(report, metric))
            row = (comparison.strategy, metric.tag, metric.header, metric.unit, *cells)
            writer.writerow([guarded(cell) for cell in row])
    return lines.getvalue()


def scenario_yaml(question: Question) -> str:
    """The scenario as a file for ``kvsim compare``."""
    strategies = ",".join(question.strategies)
    head = [
        f"# kvsim {__version__}, scenario {question.scenario.fingerprint()[:12]}",
        f"# kvsim compare THIS_FILE --strategies {strategies}",
    ]
    if question.trace is not None:
        head.append(f"# The trace {question.trace.safe_name} belongs beside this file.")
    body = yaml.safe_dump(question.document, sort_keys=False, allow_unicode=True)
    return "\n".join([*head, body])


def reports_json(comparisons: Sequence[Comparison]) -> str:
    """All reports, in the shape of ``kvsim compare --json``."""
    rows = [
        {"strategy": c.strategy, "reason": c.reason, "report": c.report and c.report.model_dump(mode="json")}
        for c in comparisons
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False)
