"""Train what is missing, measure what is missing, and write the tables."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvsim import __version__
from kvsim.errors import InvalidSpec
from kvsim.quality.small_model.evaluation import (
    CALIBRATION_SEED,
    CALIBRATION_SEQUENCES_PER_TASK,
    CONTEXT_TOKENS,
    TEST_SEED,
    scores_without_layer,
)
from kvsim.quality.small_model.grid import MODELS, SEQUENCES, load_grid, measured_strategies
from kvsim.quality.small_model.outcomes import OutcomeFolder
from kvsim.quality.small_model.results import CAVEAT, write_results
from kvsim.quality.small_model.study import run_study
from kvsim.quality.small_model.summary import BASELINE, not_run, summarise
from kvsim.quality.small_model.weights import load_or_train, model_name

_CRITERION = ("criterion_exact", "criterion_language")
Say = Callable[[str], None]
Models = Sequence[tuple[str, int]]


def measure_all(
    weights: Path,
    outcomes: Path,
    *,
    names: Sequence[str] | None = None,
    models: Models = MODELS,
    tables: Path | None = None,
    sequences: int = SEQUENCES,
    workers: int = 2,
    report: Say | None = None,
) -> None:
    """Train models whose weights are absent, measure strategies that have no outcome yet, write tables.

    The uncompressed cache is always among the strategies. ``tables`` is ``outcomes`` unless given.

    Raises
    ------
    NotConverged
        A model missed its criterion.
    InvalidSpec
        The outcomes are of other weights, or of another number of sequences.
    """
    say = report or (lambda _line: None)
    strategies = tuple(dict.fromkeys((BASELINE, *(names or measured_strategies()))))
    records = train_missing(weights, models, workers, say)
    _hold_to(outcomes, records, sequences)
    run_study(
        models, strategies, weights=weights, results=outcomes, sequences=sequences, workers=workers, report=report
    )
    folders = {name: OutcomeFolder(outcomes / name) for name in records}
    reasons = {**not_run(folders, strategies), **load_grid().left_out}
    provenance = _provenance(records, sequences) | {"not_run": reasons}
    write_results(summarise(folders, strategies), provenance, tables or outcomes)


def train_missing(weights: Path, models: Models, workers: int, say: Say) -> dict[str, dict[str, Any]]:
    """Train in processes of their own; give each model's record, by name."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        futures = {
            pool.submit(_record, architecture, seed, weights): (architecture, seed) for architecture, seed in models
        }
        for future in as_completed(futures):
            record = future.result()
            architecture, seed = futures[future]
            say(f"{model_name(architecture, seed)}: {record['steps']} steps, {record['seconds']:.0f} s of training")
        done = {futures[future]: future.result() for future in futures}
    return {model_name(*model): done[model] for model in models}


def _record(architecture: str, seed: int, weights: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    trained = load_or_train(architecture, seed, weights)
    return {**trained.record, "score_without_layer": scores_without_layer(trained.model)}


def _hold_to(outcomes: Path, records: dict[str, dict[str, Any]], sequences: int) -> None:
    """Refuse outcomes that were measured on something else."""
    for name, record in records.items():
        folder = outcomes / name
        folder.mkdir(parents=True, exist_ok=True)
        mark = folder / "measured-on.txt"
        text = f"{record['weights_sha256']} {sequences} sequences of {CONTEXT_TOKENS} tokens\n"
        if mark.exists() and mark.read_text(encoding="utf-8") != text:
            msg = f"{folder}: outcomes of other weights or sequences ({mark.name}); remove the folder or name another"
            raise InvalidSpec(msg)
        mark.write_text(text, encoding="utf-8")


def _provenance(records: dict[str, dict[str, Any]], sequences: int) -> dict[str, Any]:
    kept = (
        "seed",
        "steps",
        "seconds",
        "validation",
        "weights_sha256",
        "parameters",
        "torch_version",
        "cpu",
        "shape",
        "score_without_layer",
    )
    return {
        "caveat": CAVEAT,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "kvsim": __version__,
        "numpy": np.__version__,
        "sequences_per_task": sequences,
        "context_tokens": CONTEXT_TOKENS,
        "test_seed": TEST_SEED,
        "calibration_seed": CALIBRATION_SEED,
        "calibration_sequences_per_task": CALIBRATION_SEQUENCES_PER_TASK,
        "criterion": {name: records[next(iter(records))]["recipe"][name] for name in _CRITERION},
        "models": {name: {key: record[key] for key in kept} for name, record in records.items()},
    }
