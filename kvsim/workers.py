"""Worker processes that a Ctrl-C ends quietly, whenever it comes."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned workers (polars' threads do not survive a fork) that are gone when the block ends, however it ends."""
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = _Workers(workers, mp_context=context, initializer=ignore_interrupt)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    pool.shutdown()


def ignore_interrupt() -> None:
    """Leave Ctrl-C to the parent, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Workers(ProcessPoolExecutor):
    """Workers start when work is submitted, and are deaf to Ctrl-C from their first moment.

    Before the initializer runs, a worker imports what its work is made of, for a second or so: without the block that
    it inherits, a Ctrl-C would then end it with a traceback.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit work; a Ctrl-C waits until the workers have been started."""
        with _interrupt_held_back():
            return super().submit(fn, *args, **kwargs)


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let a SIGINT take effect after the block; processes that start meanwhile have it blocked for good.

    A thread of a library that has it unblocked may still receive it, and then Python's handler runs: it only notes it.
    Windows has no signal masks: there, workers that have only just started are not deaf.
    """
    came = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True

    # Handlers run in the main thread alone, and only one that Python has set can be put back.
    is_ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not None
    handler = signal.signal(signal.SIGINT, note) if is_ours else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if hasattr(signal, "pthread_sigmask") else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_ours:
            signal.signal(signal.SIGINT, handler)
    if came:
        signal.raise_signal(signal.SIGINT)
