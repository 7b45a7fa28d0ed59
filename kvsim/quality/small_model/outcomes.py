"""Raw outcomes on disk, per model, setting and strategy, so that an evaluation can be resumed. No torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvsim.compression import parse_compression
from kvsim.documents import write_atomic
from kvsim.quality.small_model.tasks import TASKS
from kvsim.tensors import FloatArray

_ROUNDED: Final = 6
_NAME_LENGTH: Final = 120
"""Characters of a strategy's name in a file's; a layer plan's has no end, and the digest tells them apart."""


@dataclass(frozen=True)
class Setting:
    """A task, and whether the first question is in the prompt that is compressed."""

    task: str
    sees_question: bool = False

    @property
    def name(self) -> str:
        """Such as ``recall`` or ``recall-seen``."""
        return f"{self.task}-seen" if self.sees_question else self.task


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one strategy did to the answers of one task, per sequence.

    Attributes
    ----------
    exact : (B, questions)
        1 where every token of the answer is right. The language task has no right answer: 0.
    token_right : (B,)
        Share of answer tokens that are right.
    top1_agreement : (B,)
        Share of answer tokens where the most likely token is that of the uncompressed cache.
    kl_nats : (B,)
        Mean divergence of the answer tokens' distributions from those of the uncompressed cache.
    loss_nats : (B,)
        Mean -log p of the answer tokens.
    bits_per_element : float
        Everything that is stored, over the elements of the model's own cache: 16 where nothing is compressed.
    """

    exact: FloatArray
    token_right: FloatArray
    top1_agreement: FloatArray
    kl_nats: FloatArray
    loss_nats: FloatArray
    bits_per_element: float

    def score(self, task: str) -> FloatArray:
        """(B,): exact match over both questions, or for language how often the most likely token stayed."""
        return self.top1_agreement if task == "language" else self.exact.mean(axis=1)


def settings_of(strategy: str) -> tuple[Setting, ...]:
    """Every task with the question unseen; where tokens are selected also with the first question in the prompt."""
    unseen = tuple(Setting(task) for task in TASKS)
    if parse_compression(strategy).keeps_all_tokens:
        return unseen
    return (*unseen, *(Setting(task, sees_question=True) for task in TASKS if task != "language"))


class OutcomeFolder:
    """Outcomes of one model: ``folder/setting/strategy.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, setting: Setting, strategy: str) -> bool:
        """Whether this has been measured, or found not to run."""
        return self._path(setting, strategy).exists()

    def write(self, setting: Setting, strategy: str, outcome: Outcome | str) -> None:
        """Keep an outcome, or the reason why there is none."""
        path = self._path(setting, strategy)
        path.parent.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {"strategy": strategy}
        if isinstance(outcome, str):
            fields["reason"] = outcome
        else:
            fields |= {name: _plain(value) for name, value in vars(outcome).items()}
        write_atomic(path, f"{json.dumps(fields)}\n".encode())

    def read(self, setting: Setting, strategy: str) -> Outcome | str | None:
        """Give what was kept, if anything."""
        path = self._path(setting, strategy)
        if not path.exists():
            return None
        fields: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "reason" in fields:
            return str(fields["reason"])
        arrays = {name: np.asarray(fields[name], dtype=np.float32) for name in fields if isinstance(fields[name], list)}
        return Outcome(**arrays, bits_per_element=fields["bits_per_element"])

    def missing(self, strategies: Sequence[str]) -> Iterator[tuple[Setting, str]]:
        """What has not been measured yet."""
        for strategy in strategies:
            for setting in settings_of(strategy):
                if not self.has(setting, strategy):
                    yield setting, strategy

    def _path(self, setting: Setting, strategy: str) -> Path:
        digest = hashlib.sha256(strategy.encode()).hexdigest()[:8]
        return (
            self.folder / setting.name / f"{re.sub(r'[^a-z0-9]+', '-', strategy.lower())[:_NAME_LENGTH]}-{digest}.json"
        )


def _plain(value: FloatArray | float) -> object:
    if isinstance(value, np.ndarray):
        return np.round(value.astype(np.float64), _ROUNDED).tolist()
    return value
