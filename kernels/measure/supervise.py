"""Run jobs in child processes: a kernel that kills its process, or hangs it, loses that kernel and no other."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .plan import Item
from .worker import Job

QUIET_LIMIT_S = 240.0
"""A child that reports nothing for so long hangs."""
GRACE_S = 20.0
"""How long a child may go on after the deadline before it is ended."""
MOST_CRASHES = 2
_POLL_S = 0.5
_LATE = "the time is up"
_PACKAGE = __name__.rpartition(".")[0]
_IMPORT_ROOT = Path(__file__).resolve().parents[2]

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
RunChild = Callable[[Job], Iterator[Event]]


@dataclass
class Casualties:
    """What processes died over, and why: items by key, and whole variants."""

    items: dict[str, str] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)


def run_child(job: Job, stop: threading.Event | None = None) -> Iterator[Event]:
    """Run a job in a child process; yield its events, and last ``{"event": "exit", "status": ..., "late": ...}``.

    A child is ended when `stop` is set or the deadline is past, which is late, or when it is silent for too long.
    """
    environment = dict(os.environ)
    paths = [str(_IMPORT_ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", _PACKAGE, "--worker"]
    with Path(job.out, "log.txt").open("ab") as log:
        child = subprocess.Popen(  # noqa: S603
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    if child.stdin is None or child.stdout is None:
        raise AssertionError
    events: queue.Queue[Event | None] = queue.Queue()
    stdout = child.stdout

    def listen() -> None:
        for line in stdout:
            if line.startswith('{"event"'):
                events.put(json.loads(line))
        events.put(None)

    listener = threading.Thread(target=listen, daemon=True)
    try:
        with suppress(BrokenPipeError):
            child.stdin.write(job.to_json())
            child.stdin.close()
        listener.start()
        reason = yield from _events_until(events, job.deadline_unix_s, stop or threading.Event())
        if reason:
            child.kill()
        status = reason or f"exit status {child.wait()}"
        yield {"event": "exit", "status": "" if status == "exit status 0" else status, "late": reason == _LATE}
    finally:
        child.kill()
        child.wait()
        stdout.close()


def _events_until(
    events: "queue.Queue[Event | None]", deadline_unix_s: float | None, stop: threading.Event
) -> Generator[Event, None, str]:
    """Yield events until the child closes its output; give why it must be ended, or an empty string."""
    quiet_since = time.monotonic()
    while True:
        try:
            event = events.get(timeout=_POLL_S)
        except queue.Empty:
            if stop.is_set() or (deadline_unix_s is not None and time.time() >= deadline_unix_s + GRACE_S):
                return _LATE
            if time.monotonic() - quiet_since >= QUIET_LIMIT_S:
                return f"no sign of life for {QUIET_LIMIT_S:.0f} s"
            continue
        if event is None:
            return ""
        quiet_since = time.monotonic()
        yield event


def run_job(job: Job, on_event: OnEvent, run: RunChild = run_child) -> Casualties:
    """Run a job to its end, with a new child for the rest whenever one dies.

    The block that a child died over is tried again, each item alone. An item that a child dies over alone is given up,
    as is a variant over whose check, or over `MOST_CRASHES` of whose items, a child dies.
    """
    progress = _Progress(job)
    while progress.left:
        ended = {"status": "no exit", "late": False}
        for event in run(replace(job, items=tuple(progress.left), alone=tuple(progress.alone))):
            progress.take_in(event)
            if event["event"] == "exit":
                ended = event
            on_event(event)
        if not ended["status"] or ended["late"]:
            break
        progress.bury(ended["status"])
    return progress.lost


class _Progress:
    """How far the children of a job came."""

    def __init__(self, job: Job) -> None:
        self.lost = Casualties()
        self.left = list(job.items)
        self.alone: set[str] = set()
        self._by_variant = job.mode == "check"
        self._crashes: Counter[str] = Counter()
        self._current: tuple[str, ...] = ()
        self._checking: str | None = None
        self._deaths_without_progress = 0

    def _unit(self, item: Item) -> str:
        """What a child reports as begun and done: a variant where correctness is the job, an item elsewhere."""
        return item.variant if self._by_variant else item.key

    def _drop(self, units: Sequence[str]) -> None:
        self.left = [item for item in self.left if self._unit(item) not in units]

    def take_in(self, event: Event) -> None:
        """Note what a child began or finished."""
        match event["event"]:
            case "start":
                self._current = tuple(event["keys"])
            case "finish":
                self._drop(event["keys"])
                self._current, self._deaths_without_progress = (), 0
            case "checking":
                self._checking = event["variant"]
            case "checked":
                self._checking = None

    def bury(self, status: str) -> None:
        """Blame a child's death on what it was doing, and prepare for the next child."""
        self._deaths_without_progress += 1
        if self._checking is not None:
            self.lost.variants[self._checking] = f"died while it was checked: {status}"
        elif len(self._current) == 1:
            self._bury_one(self._current[0], status)
        elif self._deaths_without_progress > MOST_CRASHES and not self._current:
            self.lost.variants |= {item.variant: f"the process does not start: {status}" for item in self.left}
        self.alone |= set(self._current)
        self.left = [item for item in self.left if item.variant not in self.lost.variants]
        self.left.sort(key=lambda item: item.key not in self.alone)
        self._current, self._checking = (), None

    def _bury_one(self, unit: str, status: str) -> None:
        variant = unit.partition("|")[0]
        self._crashes[variant] += 1
        self._drop([unit])
        if self._by_variant:
            self.lost.variants[variant] = f"died while it was checked: {status}"
            return
        self.lost.items[unit] = status
        if self._crashes[variant] >= MOST_CRASHES:
            self.lost.variants[variant] = f"its processes died {MOST_CRASHES} times: {status}"


def run_jobs(jobs: Sequence[Job], on_event: OnEvent) -> Mapping[str, str]:
    """Run jobs at the same time; give the variants that processes died over, and why."""
    lost: dict[str, str] = {}
    lock, stop = threading.Lock(), threading.Event()

    def one_at_a_time(event: Event) -> None:
        with lock:
            on_event(event)

    def run_one(job: Job) -> None:
        casualties = run_job(job, one_at_a_time, partial(run_child, stop=stop))
        with lock:
            lost.update(casualties.variants)

    threads = [threading.Thread(target=run_one, args=(job,)) for job in jobs if job.items]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        # After an interruption: no child outlives this call.
        stop.set()
    return lost
