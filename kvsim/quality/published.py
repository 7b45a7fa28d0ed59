"""What is published about a strategy's quality: sourced rows, matched exactly, never estimated."""

from __future__ import annotations

from functools import lru_cache

from pydantic import Field

from kvsim.compression import Compression, parse_compression
from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml, validate
from kvsim.report import Quality, QualityNote
from kvsim.specs.base import Spec


class QualityRow(Spec):
    """One published score of one strategy."""

    strategy: str
    task: str
    metric: str
    value: float
    baseline: float
    """The same task with uncompressed KV."""
    model: str


class QualityTable(Spec):
    """Rows of one source: ``presets/quality/<source>.yaml``."""

    source: str
    rows: tuple[QualityRow, ...] = Field(min_length=1)


@lru_cache(maxsize=1)
def published_notes() -> tuple[tuple[Compression, QualityNote], ...]:
    """Every published row with the strategy that it belongs to, in file order.

    Raises
    ------
    InvalidSpec, UnknownName
        A file has a wrong field or a strategy that no encoding or selection carries.
    """
    notes: list[tuple[Compression, QualityNote]] = []
    for path in sorted(preset_dir("quality").glob("*.yaml")):
        table = validate(QualityTable, load_yaml(path), path.name)
        notes += [
            (
                parse_compression(row.strategy),
                QualityNote(
                    task=row.task,
                    metric=row.metric,
                    value=row.value,
                    baseline=row.baseline,
                    model=row.model,
                    source=table.source,
                ),
            )
            for row in table.rows
        ]
    return tuple(notes)


@lru_cache(maxsize=256)
def published_quality(compression: Compression) -> Quality:
    """Collect what is known of ``compression``: rows measured with these very parameters.

    A score at another budget, or of one half of a pair, is not this strategy's and does not count: the status is then
    ``unknown``.
    """
    if compression == Compression():
        return Quality(status="baseline")
    notes = tuple(note for measured, note in published_notes() if measured == compression)
    return Quality(status="published", notes=notes) if notes else Quality()
