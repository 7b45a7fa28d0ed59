"""Every question has one answer, and it stands in the text."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec
from kvsim.quality.small_model.tasks import (
    ASK,
    BEGIN,
    FIRST_SYMBOL,
    HOPS,
    MARKOV_STATES,
    QUESTION_TOKENS,
    SEPARATOR,
    TASKS,
    VOCABULARY,
    TaskBatch,
    generate,
)

SEEDS = st.integers(0, 2**32 - 1)
CONTEXTS = st.integers(32, 288)


def _batch(task: str, seed: int, context: int, questions: int = 2, count: int = 3) -> TaskBatch:
    return generate(task, np.random.default_rng(seed), count, context, questions)


def _asked(batch: TaskBatch, row: int) -> list[tuple[list[int], list[int]]]:
    """(cue, answer) of each question."""
    tokens = batch.tokens[row].tolist()
    return [(tokens[one.ask + 1 : one.answer], tokens[one.answer : one.end]) for one in batch.questions]


@settings(max_examples=30, deadline=None)
@given(task=st.sampled_from(sorted(TASKS)), seed=SEEDS, context=CONTEXTS)
def test_layout(task: str, seed: int, context: int) -> None:
    batch = _batch(task, seed, context)
    assert batch.context_tokens == context
    assert (batch.tokens[:, 0] == BEGIN).all()
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < VOCABULARY
    assert batch.questions[-1].end == batch.tokens.shape[1] == context + 2 * QUESTION_TOKENS[task]
    assert batch.is_answer.sum() == sum(one.end - one.answer for one in batch.questions)
    for one in batch.questions if task != "language" else ():
        assert (batch.tokens[:, one.ask] == ASK).all()


@settings(max_examples=30, deadline=None)
@given(task=st.sampled_from(["recall", "needle", "copy"]), seed=SEEDS, context=CONTEXTS)
def test_the_cue_stands_once_and_the_answer_follows_it(task: str, seed: int, context: int) -> None:
    batch = _batch(task, seed, context)
    for row in range(len(batch.tokens)):
        text = batch.tokens[row, :context].tolist()
        for cue, answer in _asked(batch, row):
            assert text.count(cue[0]) == 1
            at = text.index(cue[0])
            assert text[at : at + 1 + len(answer)] == cue + answer


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, context=CONTEXTS)
def test_a_chain_can_be_followed_link_by_link(seed: int, context: int) -> None:
    batch = _batch("chain", seed, context)
    for row in range(len(batch.tokens)):
        text = batch.tokens[row, 1:context]
        links = text[: len(text) // 3 * 3].reshape(-1, 3)
        following = {int(here): int(there) for here, there, _ in links}
        assert len(following) == len(links)
        assert (links[:, 2] == SEPARATOR).all()
        for cue, answer in _asked(batch, row):
            walked = [cue[0]]
            for _ in range(HOPS):
                walked.append(following[walked[-1]])
            assert walked[1:] == answer


@settings(max_examples=20, deadline=None)
@given(task=st.sampled_from(["recall", "needle", "copy", "chain"]), seed=SEEDS)
def test_two_questions_differ(task: str, seed: int) -> None:
    batch = _batch(task, seed, 64)
    for row in range(len(batch.tokens)):
        (first, _), (second, _) = _asked(batch, row)
        assert first != second


def test_noise_is_made_of_what_needles_are_made_of() -> None:
    """Over many sequences every symbol is as often in needles as in noise: no lexical mark."""
    batch = _batch("needle", 0, 256, questions=8, count=2000)
    in_needles = np.zeros(VOCABULARY)
    for one in batch.questions:
        np.add.at(in_needles, batch.tokens[:, one.ask + 1 : one.end], 1)
    everywhere = np.bincount(batch.tokens[:, 1:256].ravel(), minlength=VOCABULARY)[FIRST_SYMBOL:]
    share = in_needles[FIRST_SYMBOL:] / everywhere
    assert share.mean() == pytest.approx(24 / 255, rel=0.01)
    assert share.std() < 0.15 * share.mean()
    counts = [np.unique(row[1:256], return_counts=True)[1] for row in batch.tokens]
    single = np.mean([(count == 1).sum() for count in counts])
    assert single > 4 * 24, "most symbols that stand once are noise, so standing once gives nothing away"


def test_language_follows_its_own_chain_of_few_states() -> None:
    batch = _batch("language", 3, 256, questions=1, count=20)
    for row in batch.tokens:
        text = row[1:].tolist()
        assert len(set(text)) <= MARKOV_STATES
        successors: dict[int, set[int]] = {}
        for here, there in pairwise(text):
            successors.setdefault(here, set()).add(there)
        assert max(map(len, successors.values())) <= 3
    assert batch.entropy_nats == pytest.approx(0.9503, abs=1e-3)


def test_equal_seeds_give_equal_sequences() -> None:
    for task in TASKS:
        assert np.array_equal(_batch(task, 4, 96).tokens, _batch(task, 4, 96).tokens)
        assert not np.array_equal(_batch(task, 4, 96).tokens, _batch(task, 5, 96).tokens)


@pytest.mark.parametrize(("task", "context"), [("riddle", 64), ("recall", 8), ("recall", 999)])
def test_what_cannot_be_drawn_is_refused(task: str, context: int) -> None:
    with pytest.raises(InvalidSpec):
        _batch(task, 0, context)
