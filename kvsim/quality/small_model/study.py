"""Measure many strategies on one trained model, in several processes, keeping what is done."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from kvsim.compression import parse_compression
from kvsim.errors import KvsimError, NotRunnable
from kvsim.quality.run import needed_signals
from kvsim.quality.small_model.caches import Prompts, prefill
from kvsim.quality.small_model.evaluation import (
    calibration_samples,
    evaluate,
    measured_batch,
    uncompressed_logits,
)
from kvsim.quality.small_model.grid import SEQUENCES
from kvsim.quality.small_model.outcomes import OutcomeFolder, Setting
from kvsim.quality.small_model.weights import TrainedModel, load_or_train
from kvsim.quality.store import FittedStrategy, fit_strategy

_CHUNKS_PER_WORKER: Final = 1
"""Each chunk reads all prompts anew."""


@dataclass(frozen=True)
class Job:
    """Strategies to be measured on one model by one process."""

    architecture: str
    seed: int
    weights: Path
    results: Path
    strategies: tuple[str, ...]
    sequences: int


def run_study(
    models: Sequence[tuple[str, int]],
    strategies: Sequence[str],
    *,
    weights: Path,
    results: Path,
    sequences: int = SEQUENCES,
    workers: int = 2,
    report: Callable[[str], None] | None = None,
) -> None:
    """Measure every strategy on every model, (architecture, seed), unless ``results`` has it already.

    ``results / model`` gets one file per setting and strategy, see :class:`OutcomeFolder`. Weights must be there.
    """
    jobs = list(_jobs(models, strategies, weights, results, sequences, workers))
    say = report or (lambda _line: None)
    # Forked children of a process that has used OpenMP can hang in it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            say(f"{done}/{len(jobs)} {job.architecture} seed {job.seed}: {future.result()} outcomes")


def _jobs(
    models: Sequence[tuple[str, int]],
    strategies: Sequence[str],
    weights: Path,
    results: Path,
    sequences: int,
    workers: int,
) -> Iterator[Job]:
    for architecture, seed in models:
        folder = OutcomeFolder(results / f"{architecture}-seed{seed}")
        todo = list(dict.fromkeys(strategy for _, strategy in folder.missing(strategies)))
        chunks = min(len(todo), workers * _CHUNKS_PER_WORKER)
        for index in range(chunks):
            yield Job(architecture, seed, weights, results, tuple(todo[index::chunks]), sequences)


def run_job(job: Job) -> int:
    """Measure one job's strategies setting by setting; give how many outcomes were written."""
    torch.set_num_threads(1)
    trained = load_or_train(job.architecture, job.seed, job.weights)
    folder = OutcomeFolder(job.results / trained.name)
    todo: dict[Setting, list[str]] = {}
    for setting, strategy in folder.missing(job.strategies):
        todo.setdefault(setting, []).append(strategy)
    fitted = _fit_all(trained, job.strategies)
    written = 0
    for setting, names in todo.items():
        batch = measured_batch(setting.task, job.sequences, model=trained.name)
        prompts = prefill(trained.model, batch, sees_question=setting.sees_question)
        reference = uncompressed_logits(trained.model, prompts)
        for name in names:
            _measure(folder, setting, name, fitted[name], trained, prompts, reference)
            written += 1
    return written


def _measure(
    folder: OutcomeFolder,
    setting: Setting,
    name: str,
    strategy: FittedStrategy | str,
    trained: TrainedModel,
    prompts: Prompts,
    reference: Tensor,
) -> None:
    if isinstance(strategy, str):
        folder.write(setting, name, strategy)
        return
    try:
        folder.write(setting, name, evaluate(trained.model, prompts, reference, strategy))
    except NotRunnable as error:
        folder.write(setting, name, error.reason)
    except KvsimError as error:
        folder.write(setting, name, str(error))


def _fit_all(trained: TrainedModel, names: Sequence[str]) -> dict[str, FittedStrategy | str]:
    """Fit every strategy, or say why it does not run on this model."""
    signals = needed_signals(names, to_fit=True)
    samples = calibration_samples(trained.model, signals=signals) if names else []
    fitted: dict[str, FittedStrategy | str] = {}
    for name in names:
        try:
            fitted[name] = fit_strategy(parse_compression(name), samples)
        except NotRunnable as error:
            fitted[name] = error.reason
        except KvsimError as error:
            fitted[name] = str(error)
    return fitted
