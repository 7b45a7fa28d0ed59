"""The committed tables: what every strategy did on the trained models. No torch.

Relative ordering only: they say nothing directly about a large model.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from kvsim.data_files import preset_dir
from kvsim.documents import load_json, validate, write_atomic
from kvsim.errors import InvalidSpec
from kvsim.specs.base import Spec

CAVEAT: Final = "relative ordering only; says nothing directly about a large model"
_TABLE: Final = "results.csv"
_RECORD: Final = "provenance.json"


class ResultRow(Spec):
    """One strategy on one model, or on ``all``, in one setting.

    ``task`` is a task with questions that the compressor has not seen, ``TASK-seen`` where the first question was in
    the prompt, and ``all`` or ``all-seen`` for the mean over tasks.
    """

    model: str
    task: str
    strategy: str
    sequences: int
    bits_per_element: float
    """As stored, with metadata, residual windows and exempt layers."""
    score: float
    """Exact match, mean of both questions; for language the share of unchanged most likely tokens."""
    uncompressed: float
    loss_low: float
    """95 % interval, paired, of how much of the score was lost."""
    loss_high: float
    first: float | None
    """Exact match of the first question alone."""
    second: float | None
    top1_agreement: float
    kl_nats: float
    """Divergence of answer tokens from the uncompressed cache's."""
    kl_low: float
    kl_high: float
    perplexity: float | None
    uncompressed_perplexity: float | None

    @property
    def loss(self) -> float:
        """How much of the uncompressed score was lost."""
        return self.uncompressed - self.score


class Results(Spec):
    """All rows with where they come from."""

    rows: tuple[ResultRow, ...] = Field(min_length=1)
    provenance: dict[str, Any]

    def over(self, model: str, task: str) -> tuple[ResultRow, ...]:
        """Rows of one model and setting."""
        return tuple(row for row in self.rows if row.model == model and row.task == task)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the trained models."""
        return tuple(dict.fromkeys(row.model for row in self.rows if row.model != "all"))


def write_results(rows: Iterable[ResultRow], provenance: dict[str, Any], folder: Path | None = None) -> None:
    """Write the table and its provenance."""
    folder = folder or preset_dir("small_model")
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(ResultRow.model_fields)
    for row in rows:
        writer.writerow([_cell(value) for value in row.model_dump().values()])
    write_atomic(folder / _TABLE, text.getvalue().encode())
    write_atomic(folder / _RECORD, f"{json.dumps(provenance, indent=1, ensure_ascii=False)}\n".encode())


@lru_cache(maxsize=4)
def load_results(folder: Path | None = None) -> Results:
    """Read the tables, the committed ones unless another folder is named.

    Raises
    ------
    InvalidSpec
        There are none, or a row is not as it should be.
    """
    folder = folder or preset_dir("small_model")
    path = folder / _TABLE
    if not path.exists():
        msg = f"{path}: no such file; write it with tools/write_small_model_results.py"
        raise InvalidSpec(msg)
    with path.open(encoding="utf-8", newline="") as lines:
        read: Sequence[dict[str, str]] = list(csv.DictReader(lines))
    rows = [{key: value for key, value in row.items() if value != ""} for row in read]
    filled = [
        {"first": None, "second": None, "perplexity": None, "uncompressed_perplexity": None, **row} for row in rows
    ]
    return validate(Results, {"rows": filled, "provenance": load_json(folder / _RECORD)}, path.name)


def _cell(value: object) -> object:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else value
