"""KVzip and KVzap on a model, trained or not: a surrogate that has seen other sequences beats chance."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch")

from kvsim.compression import parse_compression  # noqa: E402
from kvsim.compression.selection.kvzap import KVzapSelector, predicted_scores  # noqa: E402
from kvsim.compression.selection.reconstruction import reconstruction_scores  # noqa: E402
from kvsim.quality.small_model.architecture import SmallTransformer  # noqa: E402
from kvsim.quality.small_model.caches import prefill, with_signals  # noqa: E402
from kvsim.quality.small_model.evaluation import (  # noqa: E402
    calibration_samples,
    evaluate,
    measured_batch,
    uncompressed_logits,
)
from kvsim.quality.small_model.weights import cache_dir, load_or_train  # noqa: E402
from kvsim.quality.store import fit_strategy  # noqa: E402

TOKENS = 96


def _correlations(model: SmallTransformer, context_tokens: int, task: str) -> np.ndarray:
    """Rank correlation of guessed and true scores on sequences that were not learned from, (rows, L)."""
    both = ("hidden", "repeat_queries")
    samples = calibration_samples(model, context_tokens, signals=both)
    selector = fit_strategy(parse_compression("kvzap_linear(window_size=16)"), samples).selector
    assert isinstance(selector, KVzapSelector)
    assert selector.surrogate is not None
    prompts = with_signals(model, prefill(model, measured_batch(task, 4, context_tokens)), both)
    found = []
    for row in range(prompts.count):
        kv = prompts.sequence(row)
        guesses = enumerate(predicted_scores(kv, selector.surrogate.maps))
        truths = [(guess, reconstruction_scores(kv, index, "kvzip")) for index, guess in guesses]
        found.append([np.mean([_rank_correlation(*pair) for pair in zip(*both, strict=True)]) for both in truths])
    return np.array(found)


def test_the_surrogate_beats_chance_where_hidden_states_tell_something(model: SmallTransformer) -> None:
    """Of an untrained model only where a token's embedding and biases say what is looked at."""
    if model.shape.architecture != "plain":
        pytest.skip("without biases an untrained model looks at nothing in particular")
    # Of 96 tokens chance gives 0 with a deviation of 0.1 per head and sequence.
    assert _correlations(model, TOKENS, "chain").mean() > 0.3


@pytest.mark.skipif(not (cache_dir() / "plain-seed1.safetensors").exists(), reason="no trained model is kept here")
@pytest.mark.parametrize("task", ["recall", "chain"])
def test_the_surrogate_beats_chance_on_a_trained_model(task: str) -> None:
    found = _correlations(load_or_train("plain", 1).model, 256, task).mean(axis=0)
    assert (found[1:] > 0.3).all(), "layers above the first"


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    ranks = [values.argsort().argsort() for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("name", ["kvzip:0.5", "kvzip:0.5(budget_over=head)", "kvzap_linear:0.5(window_size=16)"])
def test_they_run_end_to_end(model: SmallTransformer, name: str) -> None:
    samples = calibration_samples(model, TOKENS, signals=("hidden", "repeat_queries"))
    prompts = prefill(model, measured_batch("recall", 2, TOKENS))
    strategy = fit_strategy(parse_compression(name), samples)
    outcome = evaluate(model, prompts, uncompressed_logits(model, prompts), strategy)
    assert 4.0 < outcome.bits_per_element < 13.0
    assert (outcome.kl_nats >= 0).all()
    assert not prompts.signals
