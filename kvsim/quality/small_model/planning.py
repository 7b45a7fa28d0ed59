"""The small models as a bench for layer plans: every outcome is measured once and kept on disk."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Final, Literal

import numpy as np
import torch

from kvsim.compression import parse_compression
from kvsim.documents import write_atomic
from kvsim.numerics.arrays import DoubleArray
from kvsim.quality.layer_plans import local_harms
from kvsim.quality.small_model.caches import Prompts, calibration_caches, prefill
from kvsim.quality.small_model.decode_phase import (
    DecodeRun,
    Schedule,
    decode_with,
    decode_without_cuts,
    outcome_of,
)
from kvsim.quality.small_model.evaluation import (
    CONTEXT_TOKENS,
    NUM_QUESTIONS,
    evaluate,
    measured_batch,
    uncompressed_logits,
)
from kvsim.quality.small_model.outcomes import Outcome, OutcomeFolder, Setting
from kvsim.quality.small_model.tasks import TASKS, TaskBatch, generate
from kvsim.quality.small_model.weights import TrainedModel
from kvsim.quality.store import fit_strategy

PLAN_SEED: Final = 40_000
"""Of calibration sequences; neither the test's nor those that codecs learn from."""
SCHEDULE: Final = Schedule(prompt_tokens=64, interval=32)
"""Of the decode phase: 64 tokens are read, the other 192 of a context and the answers are generated."""


def plan_batch(task: str, count: int, model: str) -> TaskBatch:
    """Sequences to calibrate a plan of ``model`` on."""
    rng = np.random.default_rng((PLAN_SEED, sorted(TASKS).index(task), zlib.crc32(model.encode())))
    return generate(task, rng, count, CONTEXT_TOKENS, 1 if task == "language" else NUM_QUESTIONS)


class Bench:
    """One model with sequences of each task, and every outcome that was ever measured on them."""

    phase: ClassVar[str] = ""
    """What its folders are called after."""

    def __init__(
        self,
        trained: TrainedModel,
        folder: Path,
        batch: Callable[[str], TaskBatch],
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.trained, self.outcomes, self.folder = trained, OutcomeFolder(folder), folder
        self._batch, self._report = batch, report or (lambda _line: None)
        self._prompts: dict[str, Prompts] = {}
        self._references: dict[str, torch.Tensor] = {}
        self._runs: dict[str, DecodeRun] = {}

    def outcome(self, strategy: str, task: str) -> Outcome:
        """What a strategy does to the answers of a task, measured if it was not yet."""
        setting = Setting(task)
        if not self.outcomes.has(setting, strategy):
            self.outcomes.write(setting, strategy, self.measured(strategy, task))
        found = self.outcomes.read(setting, strategy)
        if not isinstance(found, Outcome):
            msg = f"{strategy} did not run on {task}: {found}"
            raise TypeError(msg)
        return found

    def measured(self, strategy: str, task: str) -> Outcome:
        """Measure a strategy on a task now."""
        prompts = self._prompted(task)
        fitted = fit_strategy(parse_compression(strategy))
        return evaluate(self.trained.model, prompts, self._references[task], fitted)

    def mean_kl(self, strategy: str, tasks: Iterable[str] = tuple(TASKS)) -> float:
        """Mean over tasks of the mean divergence from the full cache, in nats."""
        return float(np.mean([self.outcome(strategy, task).kl_nats.mean() for task in tasks]))

    def score(self, strategy: str, tasks: Iterable[str] = tuple(TASKS)) -> float:
        """Mean score over tasks."""
        return float(np.mean([self.outcome(strategy, task).score(task).mean() for task in tasks]))

    def local(self, strategies: Sequence[str], task: str) -> DoubleArray:
        """Local harm of each strategy in each layer, (strategies, L), on the sequences of a task."""
        path = self.folder / f"local-{task}.json"
        known: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        missing = [one for one in strategies if one not in known]
        if missing:
            caches = calibration_caches(self.trained.model, [self._batch(task)])
            known |= {one: local_harms(parse_compression(one), caches).tolist() for one in missing}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, f"{json.dumps(known)}\n".encode())
        return np.array([known[one] for one in strategies])

    def _prompted(self, task: str) -> Prompts:
        if task not in self._prompts:
            self._prompts[task] = prefill(self.trained.model, self._batch(task))
            self._references[task] = uncompressed_logits(self.trained.model, self._prompts[task])
            self._report(f"{self.trained.name}: read {task}")
        return self._prompts[task]


class DecodeBench(Bench):
    """The same while decoding: nearly all of a text is generated, and its cache is cut every so many tokens."""

    phase: ClassVar = "-decode"

    def measured(self, strategy: str, task: str) -> Outcome:
        """Measure a strategy on a task now."""
        if task not in self._runs:
            batch = self._batch(task)
            self._runs[task] = decode_without_cuts(self.trained.model, batch, SCHEDULE)
        reference = self._runs[task]
        selection = parse_compression(strategy).selection
        return outcome_of(decode_with(self.trained.model, reference.batch, SCHEDULE, selection), reference)


def bench(
    trained: TrainedModel,
    folder: Path,
    name: Literal["calibration", "test"],
    count: int,
    kind: type[Bench] = Bench,
    report: Callable[[str], None] | None = None,
) -> Bench:
    """Bench of calibration or of test sequences, ``count`` of each task."""

    def batch(task: str) -> TaskBatch:
        if name == "calibration":
            return plan_batch(task, count, trained.name)
        return measured_batch(task, count, model=trained.name)

    return kind(trained, folder / f"{name}{kind.phase}" / trained.name, batch, report)
