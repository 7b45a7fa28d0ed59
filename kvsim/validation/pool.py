"""Independent work over processes, results in the order of the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from typing import Final, TypeVar

from kvsim.validation.suite import Options, Progress, Tally
from kvsim.workers import worker_pool

Job = TypeVar("Job")
Answer = TypeVar("Answer")
Subject = TypeVar("Subject")
THREAD_LIMITS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")
"""One thread per worker: the processes have the cores already, and sums then have one order."""


def in_processes(
    work: Callable[[Job], Answer], jobs: Sequence[Job], workers: int, progress: Progress | None = None
) -> list[Answer]:
    """Apply a module-level function to every job; one process or one job runs here.

    Workers are spawned, because polars' threads do not survive a fork.
    """
    if workers <= 1 or len(jobs) <= 1:
        answers = []
        for position, job in enumerate(jobs):
            answers.append(work(job))
            if progress is not None:
                progress((position + 1) / len(jobs))
        return answers
    found: dict[int, Answer] = {}
    size = min(workers, len(jobs))
    with _single_threaded(), worker_pool(size) as pool:
        pending = {pool.submit(work, job): position for position, job in enumerate(jobs)}
        for future in as_completed(pending):
            found[pending[future]] = future.result()
            if progress is not None:
                progress(len(found) / len(jobs))
    return [found[position] for position in range(len(jobs))]


def predictions(
    tally: Tally,
    work: Callable[[tuple[Subject, str, str | None]], Answer | str],
    subjects: Sequence[Subject],
    options: Options,
    count: Callable[[Subject], int] = lambda _: 1,
) -> Iterator[tuple[Subject, Answer]]:
    """Predict every subject in processes, under the calibration of `options`; give those that have an answer.

    A text instead of an answer is the reason why there is none: it is counted as skipped, `count` rows of it.
    """
    jobs = [(subject, options.calibration, options.as_unseen) for subject in subjects]
    for subject, answer in zip(subjects, in_processes(work, jobs, options.workers, options.progress), strict=True):
        if isinstance(answer, str):
            tally.skip(answer, count(subject))
        else:
            yield subject, answer


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Have processes that start meanwhile use one thread each, unless the user set a number."""
    mine = [name for name in THREAD_LIMITS if name not in os.environ]
    os.environ.update(dict.fromkeys(mine, "1"))
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
