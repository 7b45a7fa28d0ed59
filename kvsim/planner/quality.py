"""What is known of a strategy's quality, in two layers that are never mixed: published scores and the small model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

from kvsim.compression import Compression, parse_compression
from kvsim.quality.published import published_quality, without_coding
from kvsim.quality.small_model.results import CAVEAT, ResultRow, load_results
from kvsim.report import QualityNote
from kvsim.specs.base import Spec

RISK_NOTE: Final = (
    f"risk is the divergence (KL, nats) of the small trained model's answers with this strategy ({CAVEAT}); floors are "
    "held against published scores of large models; neither stands for the other"
)


NATIVE_BITS: Final = 16
"""What the small model stores of each number without compression."""


class Retained(Spec):
    """The least share of the uncompressed cache's score that is published of a strategy in one class of tasks."""

    task_class: str
    share: float | None
    """Score over the uncompressed cache's, the other way round where less is better; None where none is known."""
    note: QualityNote | None = None
    """The score that it is."""

    @property
    def line(self) -> str:
        """It in one line, with task, model, setting and source."""
        if self.share is None:
            return f"{self.task_class}: no published score"
        if self.note is None:
            return f"{self.task_class}: 1 (gives the same numbers back)"
        return f"{self.task_class}: {self.share:.3f} ({self.note.line}, {self.note.source})"


class Risk(Spec):
    """What the small model lost with a strategy; it orders strategies, and says nothing directly of a large model."""

    kl_nats: float
    kl_low: float
    kl_high: float
    score_loss: float
    """Of the mean score over its tasks."""
    measured_as: str


@cache
def retained(compression: Compression, task_class: str) -> Retained:
    """The lowest published share over models and settings; exact storage keeps all by definition."""
    if gives_same_numbers(compression):
        return Retained(task_class=task_class, share=1.0)
    known = sorted(_shares(compression, task_class), key=lambda item: item[0])
    if not known:
        return Retained(task_class=task_class, share=None)
    share, note = known[0]
    return Retained(task_class=task_class, share=share, note=note)


def gives_same_numbers(compression: Compression) -> bool:
    """Whether attention sees what it would see without compression."""
    return without_coding(compression) == Compression()


def _shares(compression: Compression, task_class: str) -> Iterator[tuple[float, QualityNote]]:
    for note in published_quality(compression).notes:
        share = _share(note)
        if note.task_class == task_class and share is not None:
            yield share, note


def _share(note: QualityNote) -> float | None:
    """Score over baseline; None where either is missing, is a difference, or is bounded from the wrong side."""
    if not note.baseline or note.value <= 0:
        return None
    loose = "at most" if note.direction == "higher" else "at least"
    if note.bound == loose:
        return None
    return note.value / note.baseline if note.direction == "higher" else note.baseline / note.value


@cache
def risk(compression: Compression) -> Risk | None:
    """What the small model measured of exactly this strategy over all its tasks and trainings, or None.

    None too where a format saved nothing on that model, so that what it lost there says nothing: vLLM's TurboQuant
    spares two layers at either end, which are all that it has, and xKV's bases are larger than its caches.
    """
    row = _rows().get(without_coding(compression))
    if row is None or (_saved_nothing(row, compression) and not gives_same_numbers(compression)):
        return None
    return Risk(
        kl_nats=row.kl_nats, kl_low=row.kl_low, kl_high=row.kl_high, score_loss=row.loss, measured_as=row.strategy
    )


def _saved_nothing(row: ResultRow, compression: Compression) -> bool:
    """Whether a strategy that keeps and reads every token stored no fewer bits than the small model's 16."""
    return row.bits_per_element >= NATIVE_BITS and compression.selection.family == "baseline"


@cache
def _rows() -> dict[Compression, ResultRow]:
    return {parse_compression(row.strategy): row for row in load_results().over("all", "all")}
