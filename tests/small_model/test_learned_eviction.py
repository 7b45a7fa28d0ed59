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
from kvsim.quality.store import fit_strategy  # noqa: E402

TOKENS = 96


def test_the_surrogate_beats_chance_on_sequences_it_has_not_seen(model: SmallTransformer) -> None:
    """Rank correlation of guessed and true scores per layer and head, of a chain's held-out contexts."""
    samples = calibration_samples(model, TOKENS, signals=("hidden", "repeat_queries"))
    selector = fit_strategy(parse_compression("kvzap_linear(window_size=16)"), samples).selector
    assert isinstance(selector, KVzapSelector)
    assert selector.surrogate is not None
    prompts = with_signals(model, prefill(model, measured_batch("chain", 4, TOKENS)), ("hidden", "repeat_queries"))
    found = []
    for row in range(4):
        kv = prompts.sequence(row)
        for index, guess in enumerate(predicted_scores(kv, selector.surrogate.maps)):
            truth = reconstruction_scores(kv, index, "kvzip")
            found.append([_rank_correlation(*pair) for pair in zip(guess, truth, strict=True)])
    # Of 96 tokens chance gives 0 with a deviation of 0.1 per head.
    assert np.mean(found) > 0.3


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
