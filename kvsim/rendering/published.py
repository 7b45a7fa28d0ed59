"""Published scores as rows of text, with every mark that keeps a reader from comparing what is not alike."""

from __future__ import annotations

from kvsim.rendering.numbers import UNKNOWN, format_number
from kvsim.report import Quality, QualityNote

QUALITY_HEADERS = ("Task class", "Task", "Score", "Native", "Model", "Setting", "Evidence", "Source")
_BOUND_SIGNS = {"at most": "\N{LESS-THAN OR EQUAL TO} ", "at least": "\N{GREATER-THAN OR EQUAL TO} "}
_RISKIEST_FIRST = ("reasoning",)


def headline(quality: Quality) -> QualityNote | None:
    """The score to show where there is room for one: on reasoning where there is any, with its baseline if possible."""

    def rank(note: QualityNote) -> tuple[bool, bool, bool]:
        return note.task_class not in _RISKIEST_FIRST, note.bound is not None, note.baseline is None

    return min(quality.notes, key=rank, default=None)


def score_text(note: QualityNote) -> str:
    """The score with its bound sign, or with a mark where it was interpolated."""
    sign = _BOUND_SIGNS[note.bound] if note.bound else "~" if note.interpolated_between else ""
    return f"{sign}{format_number(note.value)}"


def headline_text(quality: Quality) -> str:
    """One short line: task, score, baseline and marks; the status where no score is known."""
    note = headline(quality)
    if note is None:
        return quality.status
    hidden = " (query-agnostic)" if note.query == "agnostic" else ""
    metric = f" {_unsaid(note)}" if note.baseline == 0 else ""
    native = f" vs {format_number(note.baseline)}" if note.baseline else ""
    marks = [str(note.evidence)] if note.evidence in ("secondary", "recalled") else []
    marks += ["interpolated"] if note.interpolated_between else []
    marked = f" ({', '.join(marks)})" if marks else ""
    return f"{note.task}{hidden}{metric} {score_text(note)}{native}{marked}"


def _unsaid(note: QualityNote) -> str:
    """The metric without a first word that the task ends in: perplexity, perplexity increase %."""
    first, _, rest = note.metric.partition(" ")
    return rest if rest and note.task.endswith(first) else note.metric


def quality_rows(quality: Quality) -> list[tuple[str, ...]]:
    """One row per score in the order of QUALITY_HEADERS, classes together."""
    notes = sorted(quality.notes, key=lambda note: note.task_class)
    return [
        (
            note.task_class,
            f"{note.task}, {note.metric} ({note.direction} is better)",
            score_text(note),
            _native_text(note),
            note.model,
            note.setting_line,
            note.evidence_line,
            note.source,
        )
        for note in notes
    ]


def _native_text(note: QualityNote) -> str:
    if note.baseline == 0:
        return "difference to it"
    return UNKNOWN if note.baseline is None else format_number(note.baseline)
