"""The block manager with its prefix cache and all tiers as a state machine, against plain dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar
from unittest import mock

import simpy
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.resources import Demand, SharedDevice
from kvsim.sim.tiers import build
from kvsim.sim.tiers.build import TierBuilder
from kvsim.sim.tiers.hierarchy import KvTiers
from kvsim.sim.tiers.reload import Reload
from kvsim.sim.tiers.store import TierStore
from kvsim.tiers import Coding, TierPlan, TiersPlan

UNIT = 1000
PLAIN = Coding("none", UNIT)
HALF = Coding("half", UNIT // 2, encode_s=1e-7, decode_s=2e-7, hbm_share=0.5, lossy=True)
ON_HOST = Coding("half", UNIT // 2, encode_s=1e-7, decode_s=2e-7, on_device=False)
POOL_UNITS = 9
PREFIXES, LENGTH = 4, 6


class CheckedStore(TierStore):
    """A tier's store beside a plain list in order of use and a plain dictionary of what is on its way."""

    all: ClassVar[list[CheckedStore]] = []

    def __init__(self, capacity_units: int | None) -> None:
        super().__init__(capacity_units)
        self.order: list[int] = []
        self.coming: dict[int, bool] = {}
        self.reading: dict[int, int] = {}
        self.all.append(self)

    def reserve(self, values: Iterable[int]) -> tuple[list[int], list[int]]:
        values = list(values)
        new = [value for value in values if value not in self.order and value not in self.coming]
        gone: list[int] = []
        came: list[int] = []
        for value in new:
            if self.capacity_units is not None and len(self.order) + len(self.coming) >= self.capacity_units:
                free = [one for one in self.order if one not in self.reading]
                if not free:
                    break
                self.order.remove(free[0])
                gone.append(free[0])
            self.coming[value] = True
            came.append(value)
        accepted, victims = super().reserve(values)
        assert (accepted, victims) == (came, gone)
        assert not set(victims) & set(self.reading), "what is being read makes no way"
        return accepted, victims

    def commit(self, values: Iterable[int]) -> None:
        values = list(values)
        super().commit(values)
        for value in values:
            del self.coming[value]
            self.order.append(value)

    def begin_read(self, values: Sequence[int]) -> None:
        super().begin_read(values)
        for value in values:
            self.order.remove(value)
            self.order.append(value)
            self.reading[value] = self.reading.get(value, 0) + 1

    def end_read(self, values: Sequence[int]) -> None:
        super().end_read(values)
        for value in values:
            assert value in self.order
            self.reading[value] -= 1
            if not self.reading[value]:
                del self.reading[value]

    def check(self) -> None:
        assert self.used_units == len(self.order) + len(self.coming)
        assert self.begun == self.completed + len(self.coming), "begun = completed + in flight"
        assert self.completed == len(self.order) + self.evicted, "arrived = here + evicted"
        if self.capacity_units is not None:
            assert self.used_units <= self.peak_units <= self.capacity_units
        for value in range(PREFIXES * 100 + 100):
            assert self.has(value) == (value in self.order), "found if and only if stored and not evicted"


class Prompt:
    """One admitted prompt: the units that it shares, its own, and what it still waits for."""

    def __init__(self, hashes: list[int], pinned: list[int], own_units: int, reload: Reload) -> None:
        self.hashes, self.pinned, self.own_units, self.reload = hashes, pinned, own_units, reload
        self.loaded = not reload.segments
        self.registered = False


class TierMachine(RuleBasedStateMachine):
    """One replica or two: prompts come, load, are computed, share their blocks and go, while time passes."""

    @initialize(
        host=st.tuples(st.integers(0, 4), st.sampled_from(("on_compute", "on_evict")), st.sampled_from((PLAIN, HALF))),
        nvme=st.tuples(
            st.integers(0, 6), st.sampled_from(("on_compute", "on_evict")), st.sampled_from((PLAIN, HALF, ON_HOST))
        ),
        remote=st.tuples(st.sampled_from((None, 0, 8)), st.sampled_from(("on_compute", "on_evict"))),
        replicas=st.integers(1, 2),
        slow=st.sampled_from((1e8, 1e9)),
    )
    def begin(self, host: tuple, nvme: tuple, remote: tuple, replicas: int, slow: float) -> None:
        self.env = simpy.Environment(initial_time=0)
        far = None if remote[0] is None else remote[0] * UNIT
        plans = (
            TierPlan("host", "host", host[1], host[0] * host[2].unit_bytes, host[2]),
            TierPlan("nvme", "nvme", nvme[1], nvme[0] * nvme[2].unit_bytes, nvme[2], slow, slow / 2, 1e-6),
            TierPlan("remote", "remote", remote[1], far, PLAIN, slow, slow, 2e-6, is_shared=True),
        )
        plan = TiersPlan(plans, PLAIN, remembers=True, reload="always", link_bytes_per_s=1e9, hbm_bytes_per_s=1e10)
        CheckedStore.all.clear()
        with mock.patch.object(build, "TierStore", CheckedStore):
            builder = TierBuilder(self.env, plan, 16, None)
            self.devices = [SharedDevice(self.env) for _ in range(replicas)]
            self.tiers: list[KvTiers] = [builder.build(device) for device in self.devices]
        self.caches = [PrefixCache(UNIT) for _ in range(replicas)]
        for cache, tiers in zip(self.caches, self.tiers, strict=True):
            cache.on_evict = tiers.evicted
        self.free = [POOL_UNITS * UNIT for _ in range(replicas)]
        self.running: list[list[Prompt]] = [[] for _ in range(replicas)]
        self.computed: set[int] = set()

    def pick(self, replica: int) -> int:
        return replica % len(self.tiers)

    @rule(replica=st.integers(0, 1), prefix=st.integers(0, PREFIXES - 1), units=st.integers(1, LENGTH))
    def admit(self, replica: int, prefix: int, units: int) -> None:
        at = self.pick(replica)
        cache, tiers = self.caches[at], self.tiers[at]
        hashes = [prefix * 100 + i for i in range(units)]
        present = cache.match(hashes, units)
        reload = tiers.plan(hashes, present, units)
        found = reload.values
        assert found == hashes[present : present + len(found)], "a load continues the prefix without a gap"
        for level, values in reload.segments:
            assert all(level.store.has(value) for value in values)
        after = hashes[present + len(found) :]
        assert not after or not any(level.store.has(after[0]) for level in tiers.levels)
        pinned_bytes = cache.unused_among(hashes[:present]) * UNIT
        own = units - present
        if own * UNIT + pinned_bytes > self.free[at]:
            return
        tiers.commit(reload)
        cache.pin(hashes[:present])
        self.free[at] -= pinned_bytes + own * UNIT
        cache.evict_until(self.free[at])
        sequence = Prompt(hashes, hashes[:present], own, reload)
        self.running[at].append(sequence)
        if reload.segments:
            tiers.load(reload).callbacks.append(lambda _: setattr(sequence, "loaded", True))

    @rule(replica=st.integers(0, 1), which=st.integers(0, 20))
    def compute(self, replica: int, which: int) -> None:
        """A prompt is in: its blocks can be shared, from the first that another added they stay its own."""
        at = self.pick(replica)
        ready = [one for one in self.running[at] if one.loaded and not one.registered]
        if not ready:
            return
        sequence = ready[which % len(ready)]
        sequence.registered = True
        added = []
        for value in sequence.hashes[len(sequence.pinned) :]:
            if not self.caches[at].insert(value):
                break
            added.append(value)
        sequence.pinned = [*sequence.pinned, *added]
        sequence.own_units -= len(added)
        self.computed |= set(added)
        self.tiers[at].computed(added)

    @rule(replica=st.integers(0, 1), which=st.integers(0, 20))
    def finish(self, replica: int, which: int) -> None:
        at = self.pick(replica)
        ready = [one for one in self.running[at] if one.registered]
        if not ready:
            return
        sequence = ready[which % len(ready)]
        self.running[at].remove(sequence)
        self.free[at] += sequence.own_units * UNIT
        self.free[at] += self.caches[at].unpin(sequence.pinned) * UNIT

    @rule(replica=st.integers(0, 1), prefix=st.integers(0, PREFIXES - 1), ticks=st.sampled_from((10**5, 10**7, 10**9)))
    def serve(self, replica: int, prefix: int, ticks: int) -> None:
        """A whole prompt, which pushes others out."""
        at = self.pick(replica)
        before = len(self.running[at])
        self.admit(replica, prefix, LENGTH)
        if len(self.running[at]) == before:
            return
        sequence = self.running[at][-1]
        while not sequence.loaded:
            self.env.step()
        self.compute(replica, [one for one in self.running[at] if one.loaded and not one.registered].index(sequence))
        self.env.run(until=self.env.now + ticks)
        self.finish(replica, [one for one in self.running[at] if one.registered].index(sequence))

    @rule(ticks=st.sampled_from((1, 500_000, 1_000_000, 7_000_000, 10**9)))
    def wait(self, ticks: int) -> None:
        self.env.run(until=self.env.now + ticks)

    @rule(replica=st.integers(0, 1), ticks=st.integers(1, 10**6))
    def step(self, replica: int, ticks: int) -> None:
        """A step beside the copies, after the write-backs that it must wait for."""
        at = self.pick(replica)
        tiers, device = self.tiers[at], self.devices[at]
        waited = list(tiers.write_backs)

        def start() -> object:
            assert all(event.callbacks is None for event in waited), "the step came after the write-backs"
            return device.start(ticks, Demand(hbm=1.0), "step")

        done = tiers.after_write_backs(start) if waited else start().done  # type: ignore[arg-type, attr-defined]
        ended: list[int] = []
        done.callbacks.append(lambda _: ended.append(1))
        while not ended:
            self.env.step()

    @precondition(lambda self: hasattr(self, "env"))
    @invariant()
    def nothing_is_lost(self) -> None:
        for store in CheckedStore.all:
            store.check()
            assert set(store.order) | set(store.coming) <= self.computed, "only what was computed is stored"
        for at, cache in enumerate(self.caches):
            own = sum(one.own_units for one in self.running[at])
            assert self.free[at] >= 0
            assert self.free[at] + (own + cache.pinned_units) * UNIT == POOL_UNITS * UNIT, "free + used = all"
            assert cache.evictable_bytes <= self.free[at]
            for one in self.running[at]:
                assert cache.match(one.pinned, LENGTH) == len(one.pinned), "pinned units are never forgotten"

    def teardown(self) -> None:
        if not hasattr(self, "env"):
            return
        self.env.run()
        for sequence in (one for running in self.running for one in running):
            assert sequence.loaded, "every load ends"
        for tiers in self.tiers:
            assert not any(tiers.unfinished().values())
        for store in CheckedStore.all:
            store.check()
            assert not store.reading
            assert not store.coming


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
