"""Train the small model to a criterion: a curriculum of growing contexts, then a decay of the learning rate.

The same seed gives the same weights on the same machine, torch build and number of threads: data and start come from
the seed, kernels are torch's deterministic ones. Sums are taken in another order elsewhere, so the last bits, and with
them the later course, may differ there; what holds everywhere is the criterion, which is measured at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from kvsim.errors import KvsimError
from kvsim.quality.small_model.architecture import Shape, SmallTransformer
from kvsim.quality.small_model.recipe import LOOKUP_TASKS, RECIPE, Recipe, meets
from kvsim.quality.small_model.tasks import QUESTION_TOKENS, TaskBatch, generate

ASKED_TOKENS: Final = 72
"""Tokens of questions and answers behind each training context: many questions teach faster than two."""
LANGUAGE_WEIGHT: Final = 3.0
"""Language is learned last; look-ups then leave it the gradient."""
VALIDATION_SEED: Final = 999_331


class NotConverged(KvsimError):
    """Training ended without reaching its criterion."""


@dataclass
class TrainingLog:
    """What happened, for the record."""

    shape: Mapping[str, object]
    recipe: Mapping[str, object]
    seed: int
    torch_version: str = torch.__version__
    steps: int = 0
    seconds: float = 0.0
    reached: bool = False
    validation: Mapping[str, float] = field(default_factory=dict)
    stages: list[tuple[int, int]] = field(default_factory=list)
    """(context, step at which it was left)."""


@dataclass
class _Progress:
    """Running shares of right answers while training."""

    right: dict[str, float] = field(default_factory=dict)

    def add(self, task: str, share: float) -> None:
        self.right[task] = 0.9 * self.right.get(task, share) + 0.1 * share


def train(
    shape: Shape, seed: int, recipe: Recipe | None = None, report: Callable[[str], None] | None = None
) -> tuple[SmallTransformer, TrainingLog]:
    """Train one model.

    Raises
    ------
    NotConverged
        The criterion was not reached within ``max_steps``.
    """
    recipe = recipe or RECIPE
    log = TrainingLog(shape.as_dict(), asdict(recipe), seed)
    say = report or (lambda _line: None)
    began = time.perf_counter()
    with _deterministic(recipe.threads):
        torch.manual_seed(seed)
        model = SmallTransformer(shape)
        _run(model, np.random.default_rng(seed), recipe, log, lambda line: say(f"{_elapsed(began)} {line}"))
        log.validation = validate(model, recipe.contexts[-1], recipe.tasks)
    log.seconds = time.perf_counter() - began
    log.reached = meets(log.validation, recipe)
    if not log.reached:
        msg = (
            f"{shape.architecture} with seed {seed} did not reach the criterion in {log.steps} steps: "
            f"{_line(log.validation)}; wanted {recipe.criterion_exact} exact and "
            f"{recipe.criterion_language} of the tokens of language; try another seed"
        )
        raise NotConverged(msg)
    model.eval()
    return model, log


def _run(
    model: SmallTransformer, rng: np.random.Generator, recipe: Recipe, log: TrainingLog, say: Callable[[str], None]
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    progress = _Progress()
    stage, decay_from = 0, None
    for step in range(recipe.max_steps):
        context = recipe.contexts[stage]
        is_last = stage == len(recipe.contexts) - 1
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(step, decay_from, recipe)
        _step(model, optimizer, _draw(rng, context, recipe), progress)
        log.steps = step + 1
        if decay_from is not None and step + 1 - decay_from >= recipe.decay_steps:
            return
        if (step + 1) % recipe.check_every:
            continue
        say(f"step {step + 1} context {context} training {_line(progress.right)}")
        if decay_from is not None:
            continue
        if not is_last and _looks_up(progress, recipe, recipe.advance_at):
            log.stages.append((context, step + 1))
            stage, progress = stage + 1, _Progress()
        elif step + 1 + recipe.decay_steps >= recipe.max_steps or (
            is_last and _looks_up(progress, recipe, recipe.decay_at)
        ):
            # Language is learned while the learning rate decays.
            decay_from = step + 1


def _looks_up(progress: _Progress, recipe: Recipe, share: float) -> bool:
    """Whether look-ups work in training."""
    return all(progress.right.get(task, 0.0) > share for task in LOOKUP_TASKS if task in recipe.tasks)


def _step(
    model: SmallTransformer,
    optimizer: torch.optim.Optimizer,
    batches: tuple[TaskBatch, ...],
    progress: _Progress,
) -> None:
    tokens, scored, owners = _joined(batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1]).logits
    targets, marks = tokens[:, 1:], scored[:, 1:]
    losses = nnf.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    shares = []
    right = logits.argmax(dim=-1) == targets
    for index, batch in enumerate(batches):
        chosen = marks & (owners == index)[:, None]
        loss = losses[chosen].mean()
        is_language = batch.entropy_nats is not None
        shares.append(loss * LANGUAGE_WEIGHT if is_language else loss)
        if is_language:
            progress.add("nats", float(loss.detach()))
        progress.add(batch.task, float(right[chosen].float().mean()))
    optimizer.zero_grad(set_to_none=True)
    torch.stack(shares).mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _draw(rng: np.random.Generator, context: int, recipe: Recipe) -> tuple[TaskBatch, ...]:
    count = max(1, recipe.tokens_per_step // (context + ASKED_TOKENS) // len(recipe.tasks))
    return tuple(generate(task, rng, count, context, _questions(task)) for task in recipe.tasks)


def _questions(task: str) -> int:
    return max(1, ASKED_TOKENS // QUESTION_TOKENS[task])


def _joined(batches: tuple[TaskBatch, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All tasks in one batch: tokens and which are scored, (B, T), and the number of each row's task, (B,)."""
    longest = max(batch.tokens.shape[1] for batch in batches)
    tokens, scored, owners = [], [], []
    for index, batch in enumerate(batches):
        rest = longest - batch.tokens.shape[1]
        marks = batch.is_answer
        if batch.task == "language":
            marks[1:] = True  # every token of it can be learned from
        tokens.append(np.pad(batch.tokens, ((0, 0), (0, rest))))
        scored.append(np.broadcast_to(np.pad(marks, (0, rest)), tokens[-1].shape))
        owners.append(np.full(len(batch.tokens), index))
    return tuple(torch.from_numpy(np.concatenate(parts)) for parts in (tokens, scored, owners))


@torch.no_grad()  # type: ignore[untyped-decorator]
def validate(model: SmallTransformer, context: int, tasks: tuple[str, ...], count: int = 64) -> dict[str, float]:
    """Exact match per look-up task, and the share of right tokens for language, uncompressed."""
    rng = np.random.default_rng(VALIDATION_SEED)
    found = {}
    for task in tasks:
        batch = generate(task, rng, count, context, 2 if task != "language" else 1)
        tokens = torch.from_numpy(batch.tokens)
        logits = model(tokens[:, :-1]).logits
        right = (logits.argmax(dim=-1) == tokens[:, 1:]).numpy()
        if task == "language":
            found[task] = float(right[:, batch.is_answer[1:]].mean())
        else:
            exact = [right[:, asked.answer - 1 : asked.end - 1].all(axis=1).mean() for asked in batch.questions]
            found[task] = float(np.mean(exact))
    return found


def _rate(step: int, decay_from: int | None, recipe: Recipe) -> float:
    if decay_from is not None:
        return max(0.02, 1 - (step - decay_from) / recipe.decay_steps)
    return min(1.0, (step + 1) / recipe.warmup_steps)


class _deterministic:  # noqa: N801 - a context manager, used like a function
    """Torch's deterministic kernels and a fixed number of threads, for a while."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
        torch.utils.deterministic.fill_uninitialized_memory = False  # it only costs time here
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_error: object) -> None:
        torch.set_num_threads(self.before[0])
        torch.use_deterministic_algorithms(self.before[1])


def _elapsed(began: float) -> str:
    return f"{time.perf_counter() - began:6.1f} s"


def _line(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
