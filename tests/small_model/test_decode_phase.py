"""Compression during decode on a small model: blocks read at once are steps, and cuts do what they say."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the small model needs torch")

from kvsim.compression import parse_compression  # noqa: E402
from kvsim.compression.selector import Selector  # noqa: E402
from kvsim.errors import NotRunnable  # noqa: E402
from kvsim.quality.small_model.architecture import SmallTransformer  # noqa: E402
from kvsim.quality.small_model.caches import prefill, with_signals  # noqa: E402
from kvsim.quality.small_model.decode_phase import (  # noqa: E402
    DecodeRun,
    Schedule,
    decode_with,
    decode_with_cuts,
    decode_without_cuts,
    mean_divergence,
    outcome_of,
)
from kvsim.quality.small_model.evaluation import evaluate, measured_batch, uncompressed_logits  # noqa: E402
from kvsim.quality.small_model.tasks import TaskBatch  # noqa: E402
from kvsim.quality.store import fit_strategy  # noqa: E402
from kvsim.tensors import KvTensors  # noqa: E402

TOKENS = 64
FLIPPED = 0.01
"""Logits move by less where K and V, rounded to bf16, come from sums of another order."""
CUTTING = ("rkv:20", "infokv(budget_tokens=20,window_size=8)", "snapkv(budget_tokens=20,window_size=8)",
           "streaming_llm:20", "decoding:20(decoding=rkv)")  # fmt: skip


def batch(task: str = "recall") -> TaskBatch:
    return measured_batch(task, 3, TOKENS)


def run(model: SmallTransformer, name: str, schedule: Schedule, task: str = "recall") -> DecodeRun:
    return decode_with(model, batch(task), schedule, parse_compression(name).selection)


@pytest.mark.parametrize("interval", [1, 7, 16, 1000])
@pytest.mark.parametrize("task", ["recall", "language"])
def test_nothing_cut_is_nothing_changed(model: SmallTransformer, task: str, interval: int) -> None:
    schedule = Schedule(12, interval)
    whole, cut = decode_without_cuts(model, batch(task), schedule), run(model, "native", schedule, task)
    assert cut.held_share == 1.0
    assert cut.logits.shape == whole.logits.shape
    assert (cut.logits - whole.logits).abs().max() < FLIPPED
    assert mean_divergence(cut, whole) == pytest.approx(np.zeros(3), abs=1e-6)
    assert outcome_of(cut, whole).kl_nats == pytest.approx(np.zeros(3), abs=1e-6)


@pytest.mark.parametrize("name", CUTTING[:4])
def test_one_cut_after_the_context_is_the_prompt_compressed(model: SmallTransformer, name: str) -> None:
    schedule, task = Schedule(TOKENS, 10_000), "recall"
    whole = decode_without_cuts(model, batch(), schedule)
    prompts = with_signals(model, prefill(model, batch()), parse_compression(name).selection.needs_signals)
    expected = evaluate(model, prompts, uncompressed_logits(model, prompts), fit_strategy(parse_compression(name)))
    found = outcome_of(run(model, name, schedule, task), whole)
    assert found.kl_nats == pytest.approx(expected.kl_nats, abs=1e-5)
    assert found.loss_nats == pytest.approx(expected.loss_nats, abs=1e-5)
    assert found.kl_nats.max() > 0


class Watched(Selector):
    """Keeps the newest tokens, and remembers what it was given."""

    def __init__(self, kept: int) -> None:
        self.kept = kept
        self.seen: list[KvTensors] = []

    def select(self, kv: KvTensors) -> KvTensors:
        self.seen.append(kv)
        layers = tuple(
            layer.take(np.tile(np.arange(max(0, layer.num_tokens - self.kept), layer.num_tokens), (2, 1)))
            for layer in kv.layers
        )
        return KvTensors(layers, kv.rope, kv.attention_scale, kv.source, signals=kv.signals)


def test_cuts_come_when_they_should_and_see_what_is_held(model: SmallTransformer) -> None:
    cut, schedule = Watched(10), Schedule(20, 8)
    generated = decode_with_cuts(model, batch(), schedule, cut)
    end = batch().tokens.shape[1] - 1
    stops = list(range(20, end, 8))
    assert len(cut.seen) == 3 * len(stops)
    for stop, kv in zip(stops, cut.seen[::3], strict=True):
        for layer in kv.layers:
            held = 20 if stop == 20 else 18
            assert layer.positions[0].tolist() == list(range(stop - held, stop))
            assert layer.prompt_queries.shape[1] == stop
        assert kv.signals.entropy is not None
        assert kv.signals.distance is not None
        assert kv.signals.entropy.shape == (stop,)
        assert kv.signals.distance.shape == (len(kv.layers), stop)
    teeth = [10 + 1 + (step % 8) for step in range(end - 20)]
    shares = [held / (20 + step + 1) for step, held in enumerate(teeth)]
    assert generated.held_share == pytest.approx(np.mean(shares))


@pytest.mark.parametrize("name", CUTTING)
def test_a_cut_changes_what_comes_after_it_alone(model: SmallTransformer, name: str) -> None:
    """Two schedules that part at their second cut agree up to there."""
    early, late = (run(model, name, Schedule(24, interval)) for interval in (8, 16))
    apart = (early.logits - late.logits).abs()
    assert apart[:, :8].max() < FLIPPED
    assert apart[:, 8:].max() > 5 * FLIPPED


def test_signals_while_decoding_are_those_of_a_prefill(model: SmallTransformer) -> None:
    """With nothing cut: entropy and distance as the prompt's signals have them."""
    cut = Watched(1000)
    decode_with_cuts(model, batch(), Schedule(20, 11), cut)
    known = with_signals(model, prefill(model, batch()), ("entropy", "distance")).sequence(0).signals
    found = cut.seen[-3].signals
    for mine, theirs in ((found.entropy, known.entropy), (found.distance, known.distance)):
        assert mine is not None
        assert theirs is not None
        count = min(mine.shape[-1], theirs.shape[-1])
        assert mine[..., :count] == pytest.approx(theirs[..., :count], abs=1e-3)
    assert known.distance is not None
    assert (known.distance >= -1e-6).all()


def test_the_last_layer_is_at_no_distance(model: SmallTransformer) -> None:
    known = with_signals(model, prefill(model, batch()), ("entropy", "distance")).sequence(0).signals
    assert known.entropy is not None
    assert known.distance is not None
    if model.shape.layers_per_cache == 1:
        assert known.distance[-1] == pytest.approx(np.zeros(TOKENS), abs=1e-6)
    assert (known.entropy >= 0).all()
    assert (known.entropy <= np.log(256) + 1e-6).all()


@pytest.mark.parametrize(("name", "reason"), [("quest:32", "reads sparsely"), ("qfilter:0.5", "learns")])
def test_what_does_not_run_while_decoding_says_why(model: SmallTransformer, name: str, reason: str) -> None:
    with pytest.raises(NotRunnable) as refused:
        run(model, name, Schedule(20, 8))
    assert reason in str(refused.value) + str(refused.value.reason)
