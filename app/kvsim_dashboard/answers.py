"""Asking kvsim, and remembering the answers that this server has given."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import streamlit as st

from kvsim.errors import KvsimError
from kvsim.simulate import Comparison, compare
from kvsim_dashboard.question import Method, Question

Answer = tuple[Comparison, ...]
MAX_ANSWERS: Final = 128


class AnswerStore:
    """The last answers by canonical key, shared by all sessions.

    Answers are frozen values, so they are shared without copies. ``st.cache_data`` would pickle them, and cannot draw
    a progress bar from inside the function that it caches.
    """

    def __init__(self, max_answers: int = MAX_ANSWERS) -> None:
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        self._max_answers = max_answers
        self._lock = threading.Lock()

    def get(self, key: str) -> Answer | None:
        """Take an answer, and keep it longest of all."""
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; the one unused for longest goes where there are too many."""
        with self._lock:
            self._answers[key] = answer
            self._answers.move_to_end(key)
            while len(self._answers) > self._max_answers:
                self._answers.popitem(last=False)


@st.cache_resource(show_spinner=False)
def answer_store() -> AnswerStore:
    """Return the one store of this server."""
    return AnswerStore()


def known_answer(question: Question, method: Method) -> Answer | None:
    """Look an answer up without running anything."""
    return answer_store().get(question.key(method))


def ask(question: Question, method: Method, progress: Callable[[float], None] | None = None) -> Answer:
    """Answer a question from the store, or by running kvsim; raise KvsimError as ``compare`` does."""
    answer = known_answer(question, method)
    if answer is None:
        answer = _run(question, method, progress)
        answer_store().put(question.key(method), answer)
    return answer


def _run(question: Question, method: Method, progress: Callable[[float], None] | None) -> Answer:
    if question.trace is None:
        return compare(question.scenario, question.strategies, method=method, progress=progress)
    with tempfile.TemporaryDirectory(prefix="kvsim-dashboard-") as folder:
        path = Path(folder) / question.trace.safe_name
        path.write_bytes(question.trace.content)
        try:
            rows = compare(
                question.scenario, question.strategies, base_dir=path.parent, method=method, progress=progress
            )
        except KvsimError as error:
            error.args = (_named_by_user(str(error), path),)
            raise
    return tuple(_without_folder(row, path) for row in rows)


def _without_folder(row: Comparison, path: Path) -> Comparison:
    """Reason or notes without the place where this server kept the file for the run."""
    if row.report is None:
        return replace(row, reason=_named_by_user(row.reason or "", path))
    provenance = row.report.provenance
    notes = tuple(_named_by_user(note, path) for note in provenance.notes)
    cleaned = provenance.model_copy(update={"notes": notes})
    return replace(row, report=row.report.model_copy(update={"provenance": cleaned}))


def _named_by_user(text: str, path: Path) -> str:
    return text.replace(str(path), path.name)
