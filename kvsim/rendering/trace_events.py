"""A watched run as Chrome trace events, which Perfetto and ``chrome://tracing`` open.

Format: "Trace Event Format" (Google). Times are microseconds with the clock's picoseconds behind the point.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from kvsim.errors import InvariantViolation
from kvsim.sim.observer import LinkWatch, ReplicaWatch, RunObserver, Sample, SideActivity, StepRun
from kvsim.sim.recorder import RequestLog

TICKS_PER_US: Final = 10**6
MAX_REQUESTS: Final = 5_000
"""Requests whose lives are drawn; a viewer is of no use with more."""
STEP_TRACK: Final = 1
Event = dict[str, Any]


def trace_document(observer: RunObserver, title: str) -> tuple[bytes, tuple[str, ...]]:
    """Trace as JSON, one event a line, and notices about what was left out."""
    notices = []
    requests = len(observer.requests or ())
    if requests > MAX_REQUESTS:
        notices.append(f"the trace shows the lives of the first {MAX_REQUESTS:,} of {requests:,} requests")
    unkept = sum(watch.unkept_steps for watch in observer.replicas)
    if unkept:
        notices.append(f"the trace leaves out {unkept:,} engine steps at the end of the run")
    events = ",\n".join(json.dumps(event, separators=(",", ":")) for event in _events(observer))
    head = json.dumps({"title": title, "clock": "simulated, from the start of the run"})
    return f'{{"displayTimeUnit":"ms","otherData":{head},"traceEvents":[\n{events}\n]}}\n'.encode(), tuple(notices)


def _events(observer: RunObserver) -> Iterator[Event]:
    for watch in observer.replicas:
        pid = _process(watch.number)
        yield _name("process_name", pid, 0, watch.name)
        yield _name("thread_name", pid, STEP_TRACK, "engine steps")
        yield from (_step_event(run, pid) for run in watch.steps)
        yield from _beside_events(watch, pid)
        yield from _counter_events(watch, pid)
    for number, link in enumerate(observer.links):
        pid = _process(len(observer.replicas) + number)
        yield _name("process_name", pid, 0, link.name)
        yield from _beside_events(link, pid)
    yield from _request_events(observer)


def _process(replica: int) -> int:
    """Process number of a replica; viewers take 0 for the idle process."""
    return replica + 1


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _us(ticks: int) -> float:
    return ticks / TICKS_PER_US


def _slice(name: str, pid: int, tid: int, start_ticks: int, end_ticks: int, args: Event) -> Event:
    start, length = _us(start_ticks), _us(end_ticks - start_ticks)
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": length, "args": args}


def _step_event(run: StepRun, pid: int) -> Event:
    kind = "mixed" if run.prompts and run.sequences else "prefill" if run.prompts else "decode"
    args = {"steps": run.steps, "decoding": run.sequences}
    if run.prompts:
        args |= {"prompts": run.prompts, "prompt_tokens": run.prompt_tokens}
    return _slice(kind, pid, STEP_TRACK, run.start_ticks, run.end_ticks, args)


def _beside_events(watch: ReplicaWatch | LinkWatch, pid: int) -> Iterator[Event]:
    """Side activities, each kind on as many tracks as run at once."""
    tracks: dict[tuple[str, int], tuple[int, int]] = {}
    for activity in sorted(watch.beside, key=lambda one: (one.start_ticks, one.end_ticks)):
        lane = _free_lane(tracks, activity)
        tid = tracks[activity.name, lane][0] if (activity.name, lane) in tracks else STEP_TRACK + 1 + len(tracks)
        if (activity.name, lane) not in tracks:
            yield _name("thread_name", pid, tid, activity.name if lane == 0 else f"{activity.name} {lane + 1}")
        tracks[activity.name, lane] = (tid, activity.end_ticks)
        args = {"alone_us": _us(activity.alone_ticks)}
        yield _slice(activity.name, pid, tid, activity.start_ticks, activity.end_ticks, args)


def _free_lane(tracks: dict[tuple[str, int], tuple[int, int]], activity: SideActivity) -> int:
    lane = 0
    while (activity.name, lane) in tracks and tracks[activity.name, lane][1] > activity.start_ticks:
        lane += 1
    return lane


def _counter_events(watch: ReplicaWatch, pid: int) -> Iterator[Event]:
    previous: Sample | None = None
    for sample in watch.samples:
        at = {"ph": "C", "pid": pid, "tid": 0, "ts": _us(sample.ticks)}
        if previous is None or (previous.running, previous.waiting) != (sample.running, sample.waiting):
            yield {**at, "name": "requests", "args": {"running": sample.running, "waiting": sample.waiting}}
        if previous is None or previous.used_bytes != sample.used_bytes:
            yield {**at, "name": "KV bytes used", "args": {"used": sample.used_bytes}}
        if previous is not None and sample.preemptions > previous.preemptions:
            count = sample.preemptions - previous.preemptions
            yield {**at, "ph": "i", "name": "preemption", "tid": STEP_TRACK, "s": "t", "args": {"count": count}}
        previous = sample


def _request_events(observer: RunObserver) -> Iterator[Event]:
    """Lives of requests, as nested asynchronous slices: front end, queue, prompt, answer, front end."""
    if observer.result is None or observer.requests is None:
        msg = "a trace needs a finished run"
        raise InvariantViolation(msg)
    log, requests = observer.result.log, observer.requests
    for index in range(min(len(requests), MAX_REQUESTS)):
        if log.finished[index] < 0:
            continue
        at = {"cat": "request", "id": str(index), "pid": _process(observer.served_by.get(index, 0)), "tid": 0}
        life = _life(log, index)
        args = {
            "prompt_tokens": int(requests.prompt_tokens[index]),
            "output_tokens": int(requests.output_tokens[index]),
        }
        whole = f"request {index}"
        yield {**at, "ph": "b", "name": whole, "ts": _us(life[0][1]), "args": args}
        for name, start, end in life:
            yield {**at, "ph": "b", "name": name, "ts": _us(start)}
            yield {**at, "ph": "e", "name": name, "ts": _us(end)}
        yield {**at, "ph": "e", "name": whole, "ts": _us(life[-1][2])}


def _life(log: RequestLog, index: int) -> list[tuple[str, int, int]]:
    """Parts of a request's life with start and end; the front end's where it takes time."""
    sent, arrived, finished = log.sent[index], log.arrived[index], log.finished[index]
    scheduled, first = log.scheduled[index], log.first_token[index]
    parts = [
        ("front end", sent, arrived),
        ("queue", arrived, scheduled),
        ("prefill", scheduled, first),
        ("decode", first, finished),
        ("front end", finished, finished + log.egress_ticks),
    ]
    return [part for part in parts if part[0] != "front end" or part[1] < part[2]]
