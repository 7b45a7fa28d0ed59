"""Does a layer plan beat every uniform policy at an equal total? Contenders, each judged on sequences it never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kvsim.quality.layer_plans import Freedom, Sensitivity, best_plan, planned, sensitivity_by, uniform
from kvsim.quality.small_model.plan_questions import FEW_TASKS, Question, decode_question, questions, shares_for
from kvsim.quality.small_model.plan_results import Contest
from kvsim.quality.small_model.planning import Bench, DecodeBench, bench
from kvsim.quality.small_model.tasks import TASKS
from kvsim.quality.small_model.weights import load_or_train


@dataclass(frozen=True)
class PlanJob:
    """One model with all totals, and sequences of each task: fewer while decoding, which takes longer."""

    architecture: str
    seed: int
    weights: Path
    folder: Path
    calibration: int
    test: int
    decode_calibration: int
    decode_test: int
    with_decode: bool = True


def run_plan_job(job: PlanJob) -> tuple[Contest, ...]:
    """Measure what is missing of one model, in this process, and give every contender."""
    torch.set_num_threads(1)
    trained = load_or_train(job.architecture, job.seed, job.weights)
    calibration = bench(trained, job.folder, "calibration", job.calibration)
    held_out = bench(trained, job.folder, "test", job.test)
    say = partial(print, flush=True)
    every = questions(shares=shares_for(trained.model.shape.num_caches))
    found = [one for asked in every for one in run_contest(asked, calibration, held_out, say)]
    if not job.with_decode:
        return tuple(found)
    decode = (
        bench(trained, job.folder, "calibration", job.decode_calibration, DecodeBench),
        bench(trained, job.folder, "test", job.decode_test, DecodeBench),
    )
    return (*found, *run_contest(decode_question(), *decode, say))


def run_contest(
    question: Question, calibration: Bench, held_out: Bench, report: Callable[[str], None] | None = None
) -> Iterator[Contest]:
    """Make every plan on the calibration sequences, and give each contender's outcomes on the held-out ones."""
    say = report or (lambda _line: None)
    num_layers = calibration.trained.model.shape.num_caches
    by_task = {task: _kl(question, calibration, num_layers, task) for task in TASKS}
    local = {} if isinstance(calibration, DecodeBench) else {t: _local(question, calibration, t) for t in TASKS}
    say(f"{calibration.trained.name}, {question.name}: calibrated")
    chosen = min(question.uniforms.values(), key=lambda one: (-calibration.score(one), one))
    for name, strategy in question.uniforms.items():
        yield _contest(
            question, held_out, "uniform", name, dict.fromkeys(TASKS, strategy), is_chosen=strategy == chosen
        )
    for name, strategies in _plans(question, calibration, by_task, local).items():
        yield _contest(question, held_out, "plan", name, strategies)
    say(f"{calibration.trained.name}, {question.name}: tested")


def _plans(
    question: Question, calibration: Bench, by_task: Mapping[str, Sensitivity], local: Mapping[str, Sensitivity]
) -> dict[str, dict[str, str]]:
    """Name of each plan -> per task what is tested there."""
    everything, few = tuple(TASKS), FEW_TASKS
    policy = _best_policy(question, calibration)
    made = {
        "KL": _name(question, by_task, everything),
        "KL, policy only": _name(question, by_task, everything, "policy"),
        "KL, budget only": _name(question, by_task, everything, "budget", policy),
        "KL, from copy and language": _name(question, by_task, few),
    }
    if local:
        made |= {
            "local": _name(question, local, everything),
            "local, from copy and language": _name(question, local, few),
        }
    as_wholes = (made["KL"], made["KL, budget only"], *question.uniforms.values())
    made["KL, checked as a whole"] = min(as_wholes, key=calibration.mean_kl)
    plans = {name: dict.fromkeys(TASKS, strategy) for name, strategy in made.items()}
    for name, found in (("KL", by_task), *((("local", local),) if local else ())):
        plans[f"{name}, task left out"] = {
            task: _name(question, found, [other for other in TASKS if other != task]) for task in TASKS
        }
    return plans


def _best_policy(question: Question, calibration: Bench) -> str:
    """The policy whose uniform form is best on calibration data: budgets alone are moved under it."""
    sized = [option for option in question.options if option.cost == question.units_per_layer]
    return min(sized, key=lambda one: (calibration.mean_kl(uniform(one).name), one.policy)).policy


def _name(
    question: Question,
    found: Mapping[str, Sensitivity],
    tasks: Sequence[str],
    freedom: Freedom = "policy and budget",
    policy: str | None = None,
) -> str:
    first = found[tasks[0]]
    harms = np.mean([found[task].harms for task in tasks], axis=0)
    plan = best_plan(Sensitivity(first.options, harms), question.units_per_layer, freedom, policy)
    return planned(plan).name


def _kl(question: Question, bench: Bench, num_layers: int, task: str) -> Sensitivity:
    return sensitivity_by(lambda one: bench.mean_kl(one.name, (task,)), question.options, num_layers)


def _local(question: Question, bench: Bench, task: str) -> Sensitivity:
    harmful = [option for option in question.options if not option.is_free_of_harm]
    measured = bench.local([uniform(option).name for option in harmful], task)
    harms = np.zeros((measured.shape[1], len(question.options)))
    for option, row in zip(harmful, measured, strict=True):
        harms[:, question.options.index(option)] = row
    return Sensitivity(question.options, harms)


def _contest(
    question: Question, bench: Bench, kind: str, name: str, strategies: dict[str, str], *, is_chosen: bool = False
) -> Contest:
    outcomes = {task: bench.outcome(strategy, task) for task, strategy in strategies.items()}
    return Contest(
        model=bench.trained.name,
        question=question.name,
        kind=kind,
        name=name,
        strategies=strategies,
        scores={task: one.score(task) for task, one in outcomes.items()},
        kl_nats={task: one.kl_nats for task, one in outcomes.items()},
        bits_per_element=float(np.mean([one.bits_per_element for one in outcomes.values()])),
        is_chosen=is_chosen,
    )
