"""Run a strategy on the small model's caches and see what becomes of the answers, sequence by sequence."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from kvsim.quality.small_model.architecture import PastKv, SmallTransformer
from kvsim.quality.small_model.caches import Prompts, answer, as_past, calibration_caches, prefill, with_signals
from kvsim.quality.small_model.outcomes import Outcome
from kvsim.quality.small_model.tasks import TASKS, TaskBatch, generate
from kvsim.quality.store import FittedStrategy, store_cache
from kvsim.tensors import FloatArray, KvTensors, SignalName

TEST_SEED: Final = 20_000
CALIBRATION_SEED: Final = 30_000
CALIBRATION_SEQUENCES_PER_TASK: Final = 3
NUM_QUESTIONS: Final = 2
CONTEXT_TOKENS: Final = 256


def measured_batch(task: str, count: int, context_tokens: int = CONTEXT_TOKENS, model: str = "") -> TaskBatch:
    """Sequences to be measured: the same for every strategy, others for every model, so that all models see more."""
    rng = np.random.default_rng((TEST_SEED, sorted(TASKS).index(task), zlib.crc32(model.encode())))
    return generate(task, rng, count, context_tokens, 1 if task == "language" else NUM_QUESTIONS)


def calibration_samples(
    model: SmallTransformer, context_tokens: int = CONTEXT_TOKENS, signals: Collection[SignalName] = ()
) -> list[KvTensors]:
    """Caches of other sequences of all tasks, for methods that must learn, with the signals that they ask for."""
    rng = np.random.default_rng(CALIBRATION_SEED)
    count = CALIBRATION_SEQUENCES_PER_TASK
    batches = [generate(task, rng, count, context_tokens, 1) for task in TASKS]
    samples: list[KvTensors] = calibration_caches(model, batches, signals)
    return samples


def evaluate(model: SmallTransformer, prompts: Prompts, reference: Tensor, strategy: FittedStrategy) -> Outcome:
    """Compress every sequence's cache, answer with what is read back, and compare."""
    known = with_signals(model, prompts, strategy.compression.selection.needs_signals)
    stored = [store_cache(strategy, known.sequence(row)) for row in range(prompts.count)]
    past = as_past(prompts, stored, strategy.compression.selection)
    logits, _ = answer(model, prompts, past)
    bits = float(np.mean([cache.total_bits for cache in stored])) / _elements(prompts)
    return compare_logits(prompts, logits, reference, bits)


def uncompressed_logits(model: SmallTransformer, prompts: Prompts) -> Tensor:
    """Answer with the cache as it is."""
    return answer(model, prompts, prompts.uncompressed())[0]


class Answered(Protocol):
    """Sequences whose tokens from ``start`` on were read with a cache."""

    @property
    def batch(self) -> TaskBatch:
        """The sequences."""

    @property
    def start(self) -> int:
        """First token read."""


def compare_logits(prompts: Answered, logits: Tensor, reference: Tensor, bits_per_element: float) -> Outcome:
    """Score the answers' tokens."""
    batch, start = prompts.batch, prompts.start
    targets = torch.from_numpy(batch.tokens[:, start + 1 :])
    marks = torch.from_numpy(batch.is_answer[start + 1 :])
    right = logits.argmax(dim=-1) == targets
    log_p, log_q = reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    loss = -log_q.gather(2, targets[:, :, None])[:, :, 0]
    agrees = logits.argmax(dim=-1) == reference.argmax(dim=-1)
    spans = [slice(asked.answer - start - 1, asked.end - start - 1) for asked in batch.questions]
    exact = torch.stack([right[:, span].all(dim=1) for span in spans], dim=1)
    if batch.entropy_nats is not None:
        exact = torch.zeros_like(exact)
    token_right, agreement, kl, nll = (
        _numpy(part[:, marks].float().mean(dim=1)) for part in (right, agrees, divergence, loss)
    )
    return Outcome(_numpy(exact.float()), token_right, agreement, kl, nll, bits_per_element)


def scores_without_layer(model: SmallTransformer, count: int = 50) -> dict[str, list[float]]:
    """Per task the score with the prompt's cache of one layer hidden, cache by cache: where look-up happens."""
    found: dict[str, list[float]] = {}
    for task in TASKS:
        prompts = prefill(model, measured_batch(task, count))
        reference = uncompressed_logits(model, prompts)
        found[task] = [
            float(compare_logits(prompts, answer(model, prompts, past)[0], reference, 0.0).score(task).mean())
            for past in _each_hidden(prompts.uncompressed())
        ]
    return found


def _each_hidden(past: tuple[PastKv, ...]) -> Iterator[tuple[PastKv, ...]]:
    for hidden, one in enumerate(past):
        nothing = replace(one, visible=torch.zeros_like(one.keys[..., 0], dtype=torch.bool))
        yield (*past[:hidden], nothing, *past[hidden + 1 :])


def _elements(prompts: Prompts) -> float:
    shape = prompts.shape
    return 2.0 * shape.num_caches * shape.num_kv_heads * shape.head_dim * prompts.prompt_tokens


def _numpy(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.numpy()
    return array
