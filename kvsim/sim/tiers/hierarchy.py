"""The tiers of one replica: what is found where, what is copied down and up, and what is loaded for a prompt.

Stores follow each tier's policy: as blocks are computed, or when the tier above evicts them. The device's own evictions
are written back before its next step, so nobody writes into a block that is still being copied (SGLang HiCache's
``write_back``). A block that a nearer tier has already is not stored again below it on eviction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import simpy

from kvsim.sim.resources import Activity
from kvsim.sim.tiers.moves import Level, Moment, Mover, all_ended
from kvsim.sim.tiers.reload import PrefillEstimate, Reload, Segment, best_cut
from kvsim.sim.tiers.tally import ReloadTally, TierTally
from kvsim.specs.tier import KvReload


class KvTiers:
    """Tiers of one replica's rank, nearest first."""

    def __init__(
        self,
        mover: Mover,
        levels: Sequence[Level],
        unit_tokens: int,
        *,
        prefill: PrefillEstimate | None = None,
        reload: KvReload = "always",
        remembers: bool = False,
    ) -> None:
        self._mover = mover
        self.levels = tuple(levels)
        self._unit_tokens = unit_tokens
        self._prefill = prefill
        self._reload = reload
        self._known: set[int] | None = set() if remembers else None
        self.tallies = [TierTally() for _ in levels]
        self.reloads = ReloadTally()
        self.copies = 0
        """Copies under way."""
        self.is_planned_ahead = False
        """Whether units are announced before the step that computes them."""
        self._announced: list[int] = []
        self.write_backs: list[simpy.Event] = []
        """Copies of evicted blocks that the next step waits for."""
        policies = [level.plan.store for level in self.levels]
        self.writes_back = "on_evict" in policies
        self.is_shared = any(level.plan.is_shared for level in self.levels)
        self._on_compute = [index for index, policy in enumerate(policies) if policy == "on_compute"]
        self._on_evict = [index for index, policy in enumerate(policies) if policy == "on_evict"]

    def unfinished(self) -> dict[str, int]:
        """What must be zero once nothing runs: copies, units on their way or being read, and room overdrawn."""
        stores = [level.store for level in self.levels]
        return {
            "copies between tiers": self.copies + len(self.write_backs),
            "units on their way to a tier": sum(store.arriving_units for store in stores),
            "units being read in a tier": sum(store.read_units for store in stores),
            "units lost on their way to a tier": sum(store.begun - store.completed for store in stores),
            "units beyond a tier's size": sum(
                max(0, store.peak_units - store.capacity_units) for store in stores if store.capacity_units is not None
            ),
        }

    # --- finding ----------------------------------------------------------------------------------------------------

    def plan(
        self,
        hashes: Sequence[int],
        present: int,
        max_units: int,
        target_tokens: int = 0,
        sequences: int = 0,
        waiting: int = 0,
    ) -> Reload:
        """What to load for a prompt whose first ``present`` units are on the device, at most ``max_units`` in all.

        ``sequences`` decode meanwhile and ``waiting`` prompts wait behind it; both are for the choice by cost.
        """
        found = self._find(hashes[present:max_units])
        looked = max(0, min(len(hashes), max_units))
        chosen, against_load, against_compute = "", 0.0, 0.0
        segments = tuple(found)
        context = present * self._unit_tokens
        if segments and self._reload != "always" and self._prefill is not None:
            delayed = 1 + sequences + waiting if self._reload == "by_total_cost" else 1
            choice = best_cut(
                self._mover, self._prefill, segments, self._unit_tokens, context, target_tokens, sequences, delayed
            )
            segments, chosen = choice.segments, choice.name
            against_load, against_compute = choice.against_load_ticks, choice.against_compute_ticks
        loaded = present + sum(len(values) for _, values in segments)
        known: tuple[int, ...] = ()
        if self._known is not None:
            known = tuple(value for value in hashes[loaded:max_units] if value in self._known)
        return Reload(
            segments, looked, present, known, loaded * self._unit_tokens, chosen, against_load, against_compute
        )

    def _find(self, values: Iterable[int]) -> list[Segment]:
        """The nearest tier of each unit, until one is found nowhere."""
        segments: list[Segment] = []
        last: Level | None = None
        for value in values:
            level = next((one for one in self.levels if one.store.has(value)), None)
            if level is None:
                break
            if level is not last:
                segments.append((level, []))
                last = level
            segments[-1][1].append(value)
        return segments

    # --- loading ----------------------------------------------------------------------------------------------------

    def commit(self, reload: Reload) -> None:
        """Count a prompt's look-up, and hold what it will load until it is loaded."""
        tally = self.reloads
        tally.looked_units += reload.looked_units
        tally.device_units += reload.device_units
        if reload.chosen:
            tally.chosen[reload.chosen] += 1
            tally.against_load_ticks += reload.against_load_ticks
            tally.against_compute_ticks += reload.against_compute_ticks
        if reload.known:
            tally.recomputed_units += len(reload.known)
            if self._prefill is not None:
                tokens = len(reload.known) * self._unit_tokens
                tally.recompute_ticks += self._prefill.ticks(tokens, reload.context_tokens, 0)
        for level, values in reload.segments:
            level.store.begin_read(values)

    def load(self, reload: Reload) -> simpy.Event:
        """Copy committed units to the device; the event happens when all of them are there."""
        wanted: dict[int, list[int]] = {}
        for level, values in reload.segments:
            wanted.setdefault(self.levels.index(level), []).extend(values)
        ends = [self._load_from(index, values) for index, values in wanted.items()]
        return ends[0] if len(ends) == 1 else all_ended(self._mover.env, ends)

    def _load_from(self, index: int, values: list[int]) -> simpy.Event:
        level, tally = self.levels[index], self.tallies[index]
        began = int(self._mover.env.now)
        done, ticks = self._mover.copy(len(values), level, None)
        tally.loads += 1
        tally.hit_units += len(values)
        tally.loaded_bytes += len(values) * level.plan.coding.unit_bytes
        tally.link_ticks += ticks
        promoted = self._promote(index, values)

        def ended() -> None:
            tally.wait_ticks += int(self._mover.env.now) - began
            level.store.end_read(values)
            for upper, kept in promoted:
                upper.store.commit(kept)

        return self._watch(done, ended)

    def _promote(self, index: int, values: list[int]) -> list[tuple[Level, list[int]]]:
        """Keep what passes through host memory there too, where it lies in the same form: it costs room alone."""
        source = self.levels[index]
        kept: list[tuple[Level, list[int]]] = []
        for above in range(index):
            upper = self.levels[above]
            if source.server is None or upper.server is not None or upper.plan.coding != source.plan.coding:
                continue
            accepted, victims = upper.store.reserve(values)
            if accepted:
                kept.append((upper, accepted))
                self._count_stored(above, len(accepted))
                self.tallies[above].promoted_units += len(accepted)
            self._demote(above, victims)
        return kept

    # --- storing ----------------------------------------------------------------------------------------------------

    def computed(self, values: Sequence[int]) -> None:
        """Newly computed units can be shared: copy them to every tier that stores on compute."""
        if self._known is not None:
            self._known.update(values)
        if self.is_planned_ahead:
            self._announced += values
        else:
            self._store(values)

    def compute_with(self, step: simpy.Event) -> None:
        """The units announced since the last step are there once ``step`` has ended."""
        if self._announced:
            values, self._announced = self._announced, []
            step.callbacks.append(lambda _: self._store(values))

    def _store(self, values: Sequence[int]) -> None:
        coming: dict[int, tuple[int, simpy.Event]] = {}
        for index in self._on_compute:
            level = self.levels[index]
            accepted, victims = level.store.reserve(values)
            for (above, arrived), units in self._ways(index, accepted, coming).items():
                if above is None:
                    done = self._copy(None, index, units)
                    if level.server is None:
                        coming |= dict.fromkeys(units, (index, done))
                else:
                    self._relay(above, arrived, index, units)
            self._demote(index, victims)

    def _ways(
        self, index: int, values: Sequence[int], coming: Mapping[int, tuple[int, simpy.Event]]
    ) -> dict[tuple[int | None, simpy.Event | None], list[int]]:
        """Where to copy units from, and when: host memory that has them, or will, in the same form; else the device."""
        coding = self.levels[index].plan.coding
        hosts = [one for one in range(index) if self._is_host(one) and self.levels[one].plan.coding == coding]
        ways: dict[tuple[int | None, simpy.Event | None], list[int]] = {}
        for value in values:
            above = next((one for one in hosts if self.levels[one].store.has(value)), None)
            way: tuple[int | None, simpy.Event | None] = (above, None)
            if above is None and value in coming and coming[value][0] in hosts:
                way = coming[value]
            ways.setdefault(way, []).append(value)
        return ways

    def _is_host(self, index: int) -> bool:
        return self.levels[index].server is None

    def _relay(self, above: int, arrived: simpy.Event | None, index: int, values: list[int]) -> None:
        """Write through from host memory, once the units are there: the host link is crossed only once."""
        source = self.levels[above].store

        def begin(_: simpy.Event | None = None) -> None:
            self.copies -= 1
            source.begin_read(values)
            done = self._copy(self.levels[above], index, values)
            done.callbacks.append(lambda _: source.end_read(values))

        self.copies += 1
        if arrived is None:
            begin()
        else:
            arrived.callbacks.append(begin)

    def evicted(self, values: Sequence[int]) -> None:
        """The device forgets units: write them back to the first tier that takes them, before the next step."""
        if not self._on_evict:
            return
        index = self._on_evict[0]
        new = [value for value in values if not any(one.store.knows(value) for one in self.levels[: index + 1])]
        accepted, victims = self.levels[index].store.reserve(new)
        if accepted:
            done = self._copy(None, index, accepted)
            self.write_backs.append(done)
            done.callbacks.append(self.write_backs.remove)
        self._demote(index, victims)

    def after_write_backs(self, start: Callable[[], Activity]) -> simpy.Event:
        """Start a step once the blocks that were evicted for it are copied; give the step's end."""
        done = Moment(self._mover.env)

        def begin(_: simpy.Event) -> None:
            start().done.callbacks.append(lambda _: done.fire())

        all_ended(self._mover.env, self.write_backs).callbacks.append(begin)
        return done

    def _demote(self, index: int, victims: Sequence[int]) -> None:
        """Hand units that made way to the next tier down that takes them."""
        below = next((one for one in self._on_evict if one > index), None)
        if below is None or not victims:
            return
        accepted, more = self.levels[below].store.reserve(victims)
        if accepted:
            self.tallies[below].demoted_units += len(accepted)
            self._copy(self.levels[index], below, accepted)
        self._demote(below, more)

    def _copy(self, source: Level | None, index: int, values: list[int]) -> simpy.Event:
        level = self.levels[index]
        done, ticks = self._mover.copy(len(values), source, level)
        self.tallies[index].link_ticks += ticks
        self._count_stored(index, len(values))
        return self._watch(done, lambda: level.store.commit(values))

    def _count_stored(self, index: int, units: int) -> None:
        tally, plan = self.tallies[index], self.levels[index].plan
        tally.stored_units += units
        tally.stored_bytes += units * plan.coding.unit_bytes

    def _watch(self, done: simpy.Event, ended: Callable[[], None]) -> simpy.Event:
        """Count a copy as under way until it has ended."""
        self.copies += 1

        def settle(_: simpy.Event) -> None:
            self.copies -= 1
            ended()

        done.callbacks.append(settle)
        return done
