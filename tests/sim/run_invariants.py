"""Laws that every run obeys, checked from what it left behind and from the outside, not by run.py's own checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from sim_cases import Case, busy_ticks, gap_counts

from kvsim.sim import replica as replica_module
from kvsim.sim.batch import SequenceState
from kvsim.sim.run import RunResult
from kvsim.sim.scheduling import Chunk, Scheduler, SchedulerParts, build_scheduler
from kvsim.sim.speculative_batch import SpeculativeBatch
from kvsim.specs.engine import EngineSpec


class Audited(Scheduler):
    """Put before any engine's scheduler, counts every byte again before each step."""

    audits = 0

    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        # A sequence that is compacted aside is in no list; a prompt that comes back from a tier is paid for ahead.
        if seats_taken == len(self.leaving) and (self.sharing is None or self.sharing.tiers is None):
            self.audit()
        return super().schedule(now_ticks, seats_taken, start_ticks)

    def audit(self) -> None:
        held = sum(self._own_bytes(sequence) for sequence in self.batch.active.values())
        held += sum(held_bytes or 0 for _, _, held_bytes in self.leaving)
        for prompt in self.prefilling:
            held += self.prompt_bytes(prompt, prompt.done) - self._shared(prompt)
        if self.sharing is not None:
            held += self._pinned_bytes()
            assert self.sharing.cache.evictable_bytes <= self.free
        assert self.free >= 0
        assert held + self.free == self.limits.pool_bytes
        self.audits += 1

    def _own_bytes(self, sequence: SequenceState) -> int:
        if isinstance(self.batch, SpeculativeBatch):
            return self.batch.growing_bytes(sequence) + sequence.held
        steps, size = self.batch.counter - sequence.joined, self.limits.block_size
        if sequence.profile is not None:
            return sequence.profile.resident_bytes(steps, size) - self._shared(sequence)
        (_, block_bytes), *others = self.limits.prefill_growths
        assert not others
        blocks = -(-(sequence.target + steps) // size)
        return blocks * block_bytes + self.limits.fixed_bytes - self._shared(sequence)

    def _pinned_bytes(self) -> int:
        cache = self.sharing.cache
        return cache.pinned_units * cache.unit_bytes

    def _shared(self, sequence: SequenceState) -> int:
        sharing = self.sharing_of(sequence)
        return len(sequence.pinned) * sharing.cache.unit_bytes if sharing is not None else 0


@contextmanager
def audited(audit: type[Audited] = Audited) -> Iterator[list[Audited]]:
    """Let runs use audited schedulers, and list them."""
    ledger: list[Audited] = []

    def build(spec: EngineSpec, parts: SchedulerParts) -> Scheduler:
        scheduler = build_scheduler(spec, parts)
        scheduler.__class__ = type("Audited", (audit, type(scheduler)), {})
        ledger.append(scheduler)  # type: ignore[arg-type]
        return scheduler

    with mock.patch.object(replica_module, "build_scheduler", build):
        yield ledger


def check_schedulers(schedulers: list[Audited]) -> None:
    """At the end every byte is back and nobody uses a cached unit."""
    for scheduler in schedulers:
        scheduler.audit()
        assert scheduler.free == scheduler.limits.pool_bytes
        assert not scheduler.waiting
        assert not scheduler.prefilling
        assert not scheduler.batch.active
        assert scheduler.sharing is None or scheduler._pinned_bytes() == 0


def check_run(case: Case, result: RunResult, *, in_order: bool = True) -> None:
    """All laws of one run; ``in_order``: the engine promises to start requests as they come."""
    _lives(case, result)
    _gaps(case, result)
    _prompts(case, result)
    _limits(case, result)
    engine = case.deployment.engine
    if engine.compression_stream == "inline" and not engine.all_kv_tiers:
        _work_conserving(case, result)
    if case.deployment.replicas == 1 and in_order:
        _first_come_first_served(case, result)


def _lives(case: Case, result: RunResult) -> None:
    """Requests end exactly once, and their lives run forward."""
    log = result.log
    for index, fits in enumerate(case.admitted):
        assert log.rejected[index] is not bool(fits)
        assert 0 <= log.sent[index] <= log.arrived[index] <= result.end_ticks
        if fits:
            assert log.arrived[index] <= log.scheduled[index] < log.first_token[index] <= log.finished[index]
            assert log.finished[index] <= result.end_ticks
        else:
            assert (log.scheduled[index], log.first_token[index], log.finished[index]) == (-1, -1, -1)
        parent = case.requests.parent[index]
        if parent >= 0 and not log.rejected[parent]:
            assert log.sent[index] == log.finished[parent] + log.egress_ticks + case.requests.delay_ticks[index]


def _gaps(case: Case, result: RunResult) -> None:
    """Little's law of the decode stage, to the tick: gaps between tokens are the time between first and last token."""
    gaps = gap_counts(result)
    log, admitted = result.log, np.flatnonzero(case.admitted)
    assert gaps.total() == sum(int(case.requests.output_tokens[i]) - 1 for i in admitted)
    assert sum(ticks * count for ticks, count in gaps.items()) == sum(
        log.finished[i] - log.first_token[i] for i in admitted
    )
    assert all(ticks > 0 for ticks in gaps)


def _prompts(case: Case, result: RunResult) -> None:
    """Every prompt token is computed or cached, once more for each time it was thrown away."""
    records, requests = result.records, case.requests
    wanted = int(requests.prompt_tokens[case.admitted].sum())
    processed = sum(record.prefilled_tokens for record in records)
    cached = sum(record.cached_prompt_tokens for record in records)
    recomputed = sum(record.recomputed_tokens for record in records)
    preemptions = sum(record.preemptions for record in records)
    completed = sum(step[2] for record in records for step in record.prompts)
    if case.deployment.engine.compression_stream == "side":
        return
    # A preempted answer's newest token has no KV yet: it is computed with the prompt instead of in a decode step.
    resumed = sum(len(record.gaps) for record in records)
    assert completed == int(case.admitted.sum()) + resumed
    assert resumed <= preemptions
    # What a preempted sequence finds again in the pool is not computed again.
    assert recomputed == 0 or preemptions > 0
    if requests.prefix_hashes is None or not case.deployment.prefix_caching:
        assert cached == 0
        assert processed == wanted + recomputed + resumed
    else:
        assert processed <= wanted - cached + recomputed + resumed
    assert cached <= wanted


def _limits(case: Case, result: RunResult) -> None:
    engine = case.deployment.engine
    for record in result.records:
        assert 0 <= record.min_free_bytes <= result.pool_bytes
        assert record.max_running <= engine.max_num_seqs
        assert all(size <= engine.max_num_seqs for _, size, _, _ in record.runs)
        for size, tokens, ending, attention, compression in record.prompts:
            assert 0 < tokens <= engine.max_num_batched_tokens - size
            assert 0 <= ending <= engine.max_num_seqs - size
            assert attention >= 0
            assert compression >= 0


def _work_conserving(case: Case, result: RunResult) -> None:
    """A replica is busy for exactly as long as it has a request that it can serve."""
    busy = busy_ticks(result)
    for replica, members in enumerate(members_by_replica(case, result)):
        assert busy[replica] == _union_ticks([(result.log.arrived[i], result.log.finished[i]) for i in members])


def members_by_replica(case: Case, result: RunResult) -> list[list[int]]:
    """Completed requests of each replica, where they are known without asking the simulator; else none."""
    replicas, arrived = case.deployment.replicas, result.log.arrived
    order = sorted(range(len(case.requests)), key=lambda i: (arrived[i], i))
    tied = case.is_dynamic and len(set(arrived)) < len(arrived)
    if replicas > 1 and (case.routing != "round_robin" or tied):
        return []
    return [[i for i in order[replica::replicas] if case.admitted[i]] for replica in range(replicas)]


def _union_ticks(spans: list[tuple[int, int]]) -> int:
    total, until = 0, -1
    for start, end in sorted(spans):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def _first_come_first_served(case: Case, result: RunResult) -> None:
    log = result.log
    # Simultaneous releases may queue in either order.
    order = sorted(np.flatnonzero(case.admitted).tolist(), key=lambda i: (log.arrived[i], log.scheduled[i]))
    admitted_at = [log.scheduled[i] for i in order]
    assert admitted_at == sorted(admitted_at)
