"""What is published about a strategy's quality: sourced rows, never estimated across tasks, models or settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from kvsim.compression import Compression, parse_compression
from kvsim.compression.coding.none import NoCoding
from kvsim.data_files import preset_dir
from kvsim.documents import load_yaml, validate
from kvsim.quality.interpolation import between
from kvsim.report import Quality, QualityNote, TaskClass
from kvsim.specs.base import Spec

FLAT_POINTS: Final = 2.0
"""A loss of so many points on short reasoning still passes as flat."""
REASONING_WARNING: Final = (
    "no score on reasoning, and short reasoning says little about it: 4-bit KV that was flat on GSM8K (+0.2 and -0.1 "
    "points) lost 17 and 40 points on AIME25 (SGLang documentation, FP4 KV cache); vLLM's turboquant_4bit_nc lost 5 "
    "(vLLM blog 2026-05-11)"
)


class QualityRow(Spec):
    """One published score of one strategy."""

    strategy: str
    task: str
    task_class: TaskClass
    metric: str
    direction: Literal["higher", "lower"] = "higher"
    value: float
    bound: Literal["at most", "at least"] | None = None
    baseline: float | None
    """The same with uncompressed KV; 0 where the metric is a difference to it, null where it is not stated."""
    model: str
    query: Literal["aware", "agnostic"] | None = None
    reasoning: bool = False
    setting: str = ""
    evidence: Literal["primary", "secondary", "recalled", "digitised"] = "primary"


class QualityTable(Spec):
    """Rows of one source: ``presets/quality/<source>.yaml``."""

    source: str
    defaults: dict[str, Any] = Field(default_factory=dict)
    """Fields that all rows share unless they say otherwise."""
    rows: tuple[QualityRow, ...] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("defaults", {}), Mapping):
            return data
        defaults, rows = data.get("defaults", {}), data.get("rows", ())
        filled = [{**defaults, **row} if isinstance(row, Mapping) else row for row in rows]
        return {**data, "rows": filled}


@lru_cache(maxsize=1)
def published_notes() -> tuple[tuple[Compression, QualityNote], ...]:
    """Every published row with the strategy that it belongs to, in file order.

    Raises
    ------
    InvalidSpec, UnknownName
        A file has a wrong field or a strategy that no part carries.
    """
    notes: list[tuple[Compression, QualityNote]] = []
    for path in sorted(preset_dir("quality").glob("*.yaml")):
        table = validate(QualityTable, load_yaml(path), path.name)
        notes += [
            (
                parse_compression(row.strategy),
                QualityNote(source=table.source, **row.model_dump(exclude={"strategy"})),
            )
            for row in table.rows
        ]
    return tuple(notes)


@lru_cache(maxsize=8192)
def published_quality(compression: Compression) -> Quality:
    """Collect what is published of ``compression``.

    Rows count that were measured with these very parameters; where a source has none, a score between its two nearest
    ones counts if they differ in a single size alone (budget, ratio, bits), and says so. A score outside of what was
    measured, or of one part of a combination, does not count: the status is then ``unknown``. A coding is lossless, so
    the scores are those of what it codes.
    """
    read_back = without_coding(compression)
    if read_back == Compression():
        return Quality(status="baseline")
    alike = ((one, note) for one, note in published_notes() if _kinds(one) == _kinds(read_back))
    rows = tuple((without_coding(one), note) for one, note in alike)
    exact = tuple(note for one, note in rows if one == read_back)
    notes = (*exact, *between(read_back, rows, exact))
    if not notes:
        return Quality()
    return Quality(status="published" if exact else "interpolated", notes=notes, warnings=_warnings(notes))


def _kinds(compression: Compression) -> tuple[str, str, str]:
    """Kinds of the parts that decide what is read back; no two scores of one curve differ in them."""
    return compression.selection.kind, compression.reduction.kind, compression.encoding.kind


def without_coding(compression: Compression) -> Compression:
    """The strategy that gives the same numbers back without its lossless coding."""
    return compression.model_copy(update={"coding": NoCoding()})


def _warnings(notes: tuple[QualityNote, ...]) -> tuple[str, ...]:
    if any(note.task_class == "reasoning" for note in notes):
        return ()
    if any(note.task_class == "short reasoning" and _is_flat(note) for note in notes):
        return (REASONING_WARNING,)
    return ()


def _is_flat(note: QualityNote) -> bool:
    if note.baseline is None:
        return False
    loss = note.value - note.baseline if note.direction == "lower" else note.baseline - note.value
    return loss <= FLAT_POINTS
