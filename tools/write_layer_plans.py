"""Try layer plans against uniform policies on the small models and the ensembles; write the tables and their page.

Run ``OMP_NUM_THREADS=1 python tools/write_layer_plans.py --work DIR --weights DIR`` with the capture extra installed
and the weights that ``tools/write_small_model_results.py`` trains. It can be stopped and started again: what lies in
the work folder is not measured twice. ``--tables-only`` only writes the page from the committed tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from layer_plan_page import write_page

from kvsim import __version__
from kvsim.compression.parse import parse_compression
from kvsim.compression.plan_file import plan_of, write_plan
from kvsim.quality.layer_plans import Option
from kvsim.quality.plan_ensembles import (
    CALIBRATION_SEQUENCES,
    TEST_SEQUENCES,
    EnsembleContest,
    EnsembleHarms,
    ensemble_contests,
    ensemble_harms,
)
from kvsim.quality.small_model.grid import MODELS
from kvsim.quality.small_model.plan_questions import (
    CANDIDATES,
    ENSEMBLE_CANDIDATES,
    ENSEMBLE_SHARES,
    FEW_TASKS,
    FINE_SHARES,
    SHARES,
    UNIFORM_ONLY,
    decode_question,
    questions,
)
from kvsim.quality.small_model.plan_results import (
    Contest,
    load_plan_results,
    summarise,
    summarise_ensembles,
    write_plan_results,
)
from kvsim.quality.small_model.results import CAVEAT
from kvsim.tensors.ensemble import PRESETS

CHECKOUT = Path(__file__).resolve().parents[1]
CALIBRATION, TEST = 20, 40
DECODE_CALIBRATION, DECODE_TEST = 8, 20
"""Sequences of each of the five tasks, per model."""
DECODE_MODELS = (("plain", 1), ("smeared", 1))
SEQUENCES = (CALIBRATION, TEST, DECODE_CALIBRATION, DECODE_TEST)
ENSEMBLE_SEEDS = (0,)
EXAMPLE = ("plain-seed1", "keep 50 %", "KL")
"""Model, total and plan that become ``examples/layer-plan.yaml``."""


def main() -> None:
    """Do what the command line asks."""
    options = _options()
    if not options.tables_only:
        _measure(options)
    if not (options.models or options.ensembles_only):
        write_page(CHECKOUT / "docs" / "layer-plans.md")


def _measure(options: argparse.Namespace) -> None:
    from kvsim.quality.small_model.plan_study import PlanJob, run_plan_job  # noqa: PLC0415 - needs torch

    models = [model for model in MODELS if not options.models or f"{model[0]}:{model[1]}" in options.models.split(",")]
    jobs = [
        PlanJob(*model, options.weights, options.work, *SEQUENCES, with_decode=model in DECODE_MODELS)
        for model in models
    ]
    # Forked children of a process that has used OpenMP can hang in it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=options.workers, mp_context=context) as pool:
        contests = [one for found in pool.map(run_plan_job, () if options.ensembles_only else jobs) for one in found]
        seeds = [(name, seed, options.work) for name in PRESETS for seed in ENSEMBLE_SEEDS]
        drawn = [one for found in pool.map(_ensemble, *zip(*seeds, strict=True)) for one in found]
    if options.models or options.ensembles_only:
        print("only some were measured: nothing written")
        return
    write_plan_results(summarise(contests), summarise_ensembles(drawn), _provenance(options.weights))
    load_plan_results.cache_clear()
    _write_example(contests)


def _ensemble(name: str, seed: int, work: Path) -> list[EnsembleContest]:
    asked = questions(ENSEMBLE_CANDIDATES, ENSEMBLE_SHARES, window_size=None)
    every = sorted({option for one in asked for option in (*one.options, *one.extra)}, key=lambda one: one.name)
    found = _kept(work / "ensembles" / f"{name}-{seed}.npz", name, seed, every)
    print(f"{name}, seed {seed}: measured", flush=True)
    each = [ensemble_contests(found, one.name, one.options, one.units_per_layer, one.extra) for one in asked]
    return [contest for contests in each for contest in contests]


def _kept(path: Path, name: str, seed: int, options: list[Option]) -> EnsembleHarms:
    """Harms that were measured before, if they are of these options."""
    names = [option.name for option in options]
    if path.exists():
        kept = np.load(path)
        if kept["names"].tolist() == names:
            return EnsembleHarms(name, seed, tuple(options), kept["calibrated"], kept["held_out"])
    found = ensemble_harms(name, seed, options)
    order = [found.options.index(option) for option in options]
    calibrated, held_out = found.calibrated[:, order], found.held_out[:, :, order]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, names=names, calibrated=calibrated, held_out=held_out)
    return EnsembleHarms(name, seed, tuple(options), calibrated, held_out)


def _provenance(weights: Path) -> dict[str, Any]:
    names = [f"{architecture}-seed{seed}" for architecture, seed in MODELS]
    records = {name: json.loads((weights / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    return {
        "caveat": CAVEAT,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "kvsim": __version__,
        "numpy": np.__version__,
        "calibration_sequences_per_task": CALIBRATION,
        "test_sequences_per_task": TEST,
        "decode_models": [f"{architecture}-seed{seed}" for architecture, seed in DECODE_MODELS],
        "decode_calibration_sequences_per_task": DECODE_CALIBRATION,
        "decode_test_sequences_per_task": DECODE_TEST,
        "candidates": list(CANDIDATES),
        "uniform_only": list(UNIFORM_ONLY),
        "shares_in_64ths": list(SHARES),
        "shares_in_64ths_of_two_caches": list(FINE_SHARES),
        "totals": [asked.name for asked in (*questions(), decode_question())],
        "transfer_from": list(FEW_TASKS),
        "ensemble_candidates": list(ENSEMBLE_CANDIDATES),
        "ensemble_shares_in_64ths": list(ENSEMBLE_SHARES),
        "ensemble_seeds": list(ENSEMBLE_SEEDS),
        "ensemble_calibration_sequences": CALIBRATION_SEQUENCES,
        "ensemble_test_sequences": TEST_SEQUENCES,
        "weights_sha256": {name: record["weights_sha256"] for name, record in records.items()},
    }


def _write_example(contests: list[Contest]) -> None:
    model, question, name = EXAMPLE
    found = next(one for one in contests if (one.model, one.question, one.name) == EXAMPLE)
    strategy = next(iter(found.strategies.values()))
    relative = parse_compression(strategy.replace("layer_plan[", "layer_plan:relative["))
    source = (
        f"{name} plan of the small model {model} ({question} of the prompt), calibrated on {CALIBRATION} sequences of "
        "each of five tasks; in relative depth, so that any model runs it, for which nothing has been calibrated"
    )
    write_plan(CHECKOUT / "examples" / "layer-plan.yaml", plan_of(relative, "small-model-50", source))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of outcomes")
    parser.add_argument("--weights", type=Path, help="folder of trained weights")
    parser.add_argument("--models", help="only measure these, such as plain:1,smeared:2, and write nothing")
    parser.add_argument("--ensembles-only", action="store_true", help="only measure these, and write nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tables-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
