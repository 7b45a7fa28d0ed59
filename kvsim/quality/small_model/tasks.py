"""Sequences that the small model is trained and tested on, drawn from a seed. Plain numpy; every answer is in the text.

A sequence is a context and then questions with their answers. All sequences of one batch have one layout, so that
they can be handled together. Symbols have no meaning of their own: each sequence draws its own, so nothing can be
learned by heart, and noise is made of the very symbols that needles are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvsim.errors import InvalidSpec

Tokens: TypeAlias = NDArray[np.int64]

BEGIN: Final = 0
"""First token of every sequence: what an attention sink can form on."""
ASK: Final = 1
SEPARATOR: Final = 2
FIRST_SYMBOL: Final = 3
NUM_SYMBOLS: Final = 288
VOCABULARY: Final = FIRST_SYMBOL + NUM_SYMBOLS

RECORD_TOKENS: Final = 3
"""A key and an answer of two tokens; a link and its separator."""
HOPS: Final = 8
COPIED_TOKENS: Final = 16
NEEDLES: Final = 8
CONTINUED_TOKENS: Final = 48
MARKOV_STATES: Final = 8
MARKOV_PROBABILITIES: Final = (0.6, 0.2, 0.2)
MINIMUM_CONTEXT: Final = 32


@dataclass(frozen=True)
class Question:
    """Where a question and its answer lie: tokens ``ask`` to ``answer`` ask, ``answer`` to ``end`` answer."""

    ask: int
    answer: int
    end: int


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """Sequences of one task and one layout.

    Attributes
    ----------
    task : str
    tokens : (B, T)
    context_tokens : int
        Tokens before the first question.
    questions : tuple of Question
    entropy_nats : float or None
        Mean of -log p of the scored tokens under the source that drew them, where the source is known.
    """

    task: str
    tokens: Tokens
    context_tokens: int
    questions: tuple[Question, ...]
    entropy_nats: float | None = None

    @property
    def is_answer(self) -> NDArray[np.bool_]:
        """(T,): whether a token belongs to an answer."""
        marks = np.zeros(self.tokens.shape[1], dtype=np.bool_)
        for question in self.questions:
            marks[question.answer : question.end] = True
        return marks

    def take(self, rows: slice) -> TaskBatch:
        """Give some of the sequences."""
        return TaskBatch(self.task, self.tokens[rows], self.context_tokens, self.questions, self.entropy_nats)


def generate(task: str, rng: np.random.Generator, count: int, context_tokens: int, num_questions: int) -> TaskBatch:
    """Draw ``count`` sequences of a task.

    ``num_questions`` are asked of each, all different as long as the context holds so many; language has none and is
    continued by ``CONTINUED_TOKENS`` for each.

    Raises
    ------
    InvalidSpec
        No such task, or a context that does not hold it.
    """
    if task not in TASKS:
        msg = f"no task {task!r}; there are {', '.join(TASKS)}"
        raise InvalidSpec(msg)
    longest = RECORD_TOKENS * (NUM_SYMBOLS // RECORD_TOKENS)
    if not MINIMUM_CONTEXT <= context_tokens <= longest or num_questions < 1:
        msg = (
            f"context_tokens {context_tokens} with {num_questions} questions: {MINIMUM_CONTEXT} to {longest}, 1 or more"
        )
        raise InvalidSpec(msg)
    return TASKS[task](rng, count, context_tokens, num_questions)


def _recall(rng: np.random.Generator, count: int, context_tokens: int, num_questions: int) -> TaskBatch:
    """Records of a key and two more symbols, back to back; the question names a key."""
    records = (context_tokens - 1) // RECORD_TOKENS
    table = _symbols(rng, count)[:, : records * RECORD_TOKENS].reshape(count, records, RECORD_TOKENS)
    asked = _take_rows(table, _choose(rng, count, records, num_questions))
    context = _padded(table.reshape(count, -1), context_tokens)
    return _with_questions("recall", context, asked, 1)


def _needle(rng: np.random.Generator, count: int, context_tokens: int, num_questions: int) -> TaskBatch:
    """Records strewn over noise of the same kind of symbols; the question names a record's key."""
    needles = min(NEEDLES, context_tokens // 8)
    shuffled = _symbols(rng, count)
    taken = needles * RECORD_TOKENS
    table = shuffled[:, :taken].reshape(count, needles, RECORD_TOKENS)
    noise = rng.integers(taken, NUM_SYMBOLS, (count, context_tokens - 1))
    text = np.take_along_axis(shuffled, noise, axis=1)
    stride = (context_tokens - 1) // needles
    starts = np.arange(needles) * stride + rng.integers(0, stride - RECORD_TOKENS + 1, (count, needles))
    for step in range(RECORD_TOKENS):
        np.put_along_axis(text, starts + step, table[:, :, step], axis=1)
    asked = _take_rows(table, _choose(rng, count, needles, num_questions))
    return _with_questions("needle", _begun(text), asked, 1)


def _chain(rng: np.random.Generator, count: int, context_tokens: int, num_questions: int) -> TaskBatch:
    """Links of one long path in random order; the question names a symbol, the answer follows the path."""
    links = (context_tokens - 1) // RECORD_TOKENS
    path = _symbols(rng, count)[:, : links + 1]
    separators = np.full((count, links), SEPARATOR, dtype=np.int64)
    table = np.stack((path[:, :-1], path[:, 1:], separators), axis=2)
    context = _padded(_take_rows(table, _choose(rng, count, links, links)).reshape(count, -1), context_tokens)
    starts = _choose(rng, count, links - HOPS + 1, num_questions)
    asked = np.stack([np.take_along_axis(path, starts + hop, axis=1) for hop in range(HOPS + 1)], axis=2)
    return _with_questions("chain", context, asked, 1)


def _copy(rng: np.random.Generator, count: int, context_tokens: int, num_questions: int) -> TaskBatch:
    """A text in which no symbol repeats; the question names one, the answer goes on from there for 16 tokens."""
    text = _symbols(rng, count)[:, : context_tokens - 1]
    starts = _choose(rng, count, context_tokens - 1 - COPIED_TOKENS, num_questions)
    asked = np.stack([np.take_along_axis(text, starts + step, axis=1) for step in range(COPIED_TOKENS + 1)], axis=2)
    return _with_questions("copy", _begun(text), asked, 1)


def _language(rng: np.random.Generator, count: int, context_tokens: int, num_questions: int) -> TaskBatch:
    """A text of a Markov chain that each sequence draws anew: to go on well is to count what followed before."""
    length = context_tokens - 1 + CONTINUED_TOKENS * num_questions
    symbols = _symbols(rng, count)[:, :MARKOV_STATES]
    width = len(MARKOV_PROBABILITIES)
    successors = rng.random((count, MARKOV_STATES, MARKOV_STATES)).argsort(axis=2)[:, :, :width]
    choices = rng.choice(width, size=(count, length), p=MARKOV_PROBABILITIES)
    states = np.empty((count, length), dtype=np.int64)
    rows = np.arange(count)
    state = rng.integers(0, MARKOV_STATES, count)
    for step in range(length):
        states[:, step] = state
        state = successors[rows, state, choices[:, step]]
    tokens = _begun(np.take_along_axis(symbols, states, axis=1))
    entropy = -sum(share * float(np.log(share)) for share in MARKOV_PROBABILITIES)
    whole = Question(context_tokens, context_tokens, tokens.shape[1])
    return TaskBatch("language", tokens, context_tokens, (whole,), entropy)


TASKS: Final[Mapping[str, Callable[[np.random.Generator, int, int, int], TaskBatch]]] = {
    "recall": _recall,
    "needle": _needle,
    "chain": _chain,
    "copy": _copy,
    "language": _language,
}
QUESTION_TOKENS: Final[Mapping[str, int]] = {
    "recall": 1 + RECORD_TOKENS,
    "needle": 1 + RECORD_TOKENS,
    "chain": 2 + HOPS,
    "copy": 2 + COPIED_TOKENS,
    "language": CONTINUED_TOKENS,
}


def _symbols(rng: np.random.Generator, count: int) -> Tokens:
    """All symbols in random order, per sequence."""
    return FIRST_SYMBOL + rng.random((count, NUM_SYMBOLS)).argsort(axis=1)


def _choose(rng: np.random.Generator, count: int, choices: int, wanted: int) -> Tokens:
    """Choose ``wanted`` of ``choices`` per sequence, no choice again before all have been taken."""
    order = rng.random((count, choices)).argsort(axis=1)
    return order[:, np.arange(wanted) % choices]


def _take_rows(table: Tokens, rows: Tokens) -> Tokens:
    return np.take_along_axis(table, rows[:, :, None], axis=1)


def _begun(text: Tokens) -> Tokens:
    return np.concatenate((np.full((len(text), 1), BEGIN, dtype=np.int64), text), axis=1)


def _padded(text: Tokens, context_tokens: int) -> Tokens:
    """Begin the text, and fill a rest that is shorter than a record with separators."""
    begun = _begun(text)
    rest = np.full((len(text), context_tokens - begun.shape[1]), SEPARATOR, dtype=np.int64)
    return np.concatenate((begun, rest), axis=1)


def _with_questions(task: str, context: Tokens, asked: Tokens, cue_tokens: int) -> TaskBatch:
    """Append ``asked``, (B, questions, cue and answer), each after a mark."""
    count, num_questions, width = asked.shape
    marks = np.full((count, num_questions, 1), ASK, dtype=np.int64)
    asking = np.concatenate((marks, asked), axis=2).reshape(count, -1)
    begin = context.shape[1]
    starts = begin + (width + 1) * np.arange(num_questions)
    questions = tuple(Question(int(at), int(at) + 1 + cue_tokens, int(at) + 1 + width) for at in starts)
    return TaskBatch(task, np.concatenate((context, asking), axis=1), begin, questions)
