"""Copies between the device's pool and its tiers on the clock: which links they cross, and what codes them on the way.

A copy is a chain of stages; a stage is one or more legs on shared servers (the device, the tier's own link, a host's
coder) that run at the pace of the slowest and end when all of them have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from kvsim.sim.resources import Demand, Resource, SharedDevice
from kvsim.sim.tiers.store import TierStore
from kvsim.tiers import Coding, TierPlan, TiersPlan
from kvsim.units import TICKS_PER_SECOND

IN, OUT = Resource.HOST_LINK_IN, Resource.HOST_LINK_OUT


@dataclass(eq=False)
class Level:
    """One tier as a replica's rank sees it: its plan, what it holds, and its own link."""

    plan: TierPlan
    store: TierStore
    server: SharedDevice | None
    """The tier's own link, read as IN and written as OUT; None for host memory."""


@dataclass(frozen=True, slots=True)
class Leg:
    """Part of a stage on one server."""

    server: SharedDevice
    demand: Demand
    direction: Resource | None
    """Link direction that it uses, if any."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Legs that run together for ``ticks``, after ``delay_ticks`` in which nothing is used."""

    ticks: int
    legs: tuple[Leg, ...]
    delay_ticks: int = 0


class Moment(simpy.Event):
    """An event that happens at once, as `kvsim.sim.resources.ActivityEnd` does."""

    def fire(self) -> None:
        """Process the event."""
        self._ok = True
        self._value = None
        callbacks, self.callbacks = self.callbacks, None  # type: ignore[assignment]
        for callback in callbacks:
            callback(self)


def run_stages(env: simpy.Environment, stages: Sequence[Stage], name: str) -> simpy.Event:
    """Play stages one after the other; the event happens when the last has ended."""
    if len(stages) == 1 and len(stages[0].legs) == 1 and not stages[0].delay_ticks:
        (leg,) = stages[0].legs
        return leg.server.start(stages[0].ticks, leg.demand, name).done
    done = Moment(env)

    def begin(position: int) -> None:
        if position == len(stages):
            done.fire()
            return
        stage = stages[position]
        if stage.delay_ticks:
            timeout = env.timeout(stage.delay_ticks)
            timeout.callbacks.append(lambda _: start(position))
        else:
            start(position)

    def start(position: int) -> None:
        stage = stages[position]
        ends = [leg.server.start(stage.ticks, leg.demand, name).done for leg in stage.legs]
        all_ended(env, ends).callbacks.append(lambda _: begin(position + 1))

    if stages:
        begin(0)
    else:
        env.timeout(0).callbacks.append(lambda _: done.fire())
    return done


def all_ended(env: simpy.Environment, events: Sequence[simpy.Event]) -> simpy.Event:
    """Give an event for the end of several that have not happened yet."""
    done, left = Moment(env), len(events)

    def ended(_: simpy.Event) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.fire()

    for event in events:
        event.callbacks.append(ended)
    return done


class Mover:
    """Plans copies for one replica's rank. Units of a copy go together."""

    def __init__(self, env: simpy.Environment, device: SharedDevice, plan: TiersPlan) -> None:
        self.env = env
        self._device = device
        self._plan = plan
        self._host_coder = SharedDevice(env)

    def stages(self, units: int, source: Level | None, target: Level | None) -> list[Stage]:
        """Stages of copying ``units`` from one place to another; None is the device's pool."""
        form = self._plan.plain if source is None else source.plan.coding
        wanted = self._plan.plain if target is None else target.plan.coding
        on_device, unread = source is None, source
        stages: list[Stage] = []

        def place(*, device: bool) -> None:
            """Bring the bytes, as they are, to where the next coder runs."""
            nonlocal on_device, unread
            if on_device != device or (unread is not None and unread.server is not None):
                stages.append(self._hop(units * form.unit_bytes, unread, None, on_device, device))
            on_device, unread = device, None

        if form != wanted:
            if not form.is_plain:
                place(device=form.on_device)
                stages.append(self._code(form, units * form.decode_s))
            if not wanted.is_plain:
                form = self._plan.plain
                place(device=wanted.on_device)
                stages.append(self._code(wanted, units * wanted.encode_s))
            form = wanted
        ends_on_device = target is None
        has_link = target is not None and target.server is not None
        if on_device != ends_on_device or has_link or (unread is not None and unread.server is not None):
            stages.append(self._hop(units * form.unit_bytes, unread, target, on_device, ends_on_device))
        return stages

    def copy(self, units: int, source: Level | None, target: Level | None) -> tuple[simpy.Event, int]:
        """Start a copy: (its end, the ticks that it would take alone)."""
        stages = self.stages(units, source, target)
        name = "load" if target is None else "store"
        return run_stages(self.env, stages, name), sum(stage.delay_ticks + stage.ticks for stage in stages)

    def estimate(self, units: int, source: Level) -> tuple[float, float]:
        """Ticks of a load if the copies under way stay as they are: (whole, part on the host link)."""
        whole = crossing = 0.0
        for stage in self.stages(units, source, None):
            others = max((leg.server.num_using(leg.direction) for leg in stage.legs if leg.direction), default=0)
            ticks = stage.ticks * (1.0 + others)
            whole += stage.delay_ticks + ticks
            if any(leg.server is self._device and leg.direction for leg in stage.legs):
                crossing += ticks
        return whole, crossing

    def _hop(
        self, size_bytes: int, source: Level | None, target: Level | None, from_device: bool, to_device: bool
    ) -> Stage:
        """One stage over the source's link, the host link where the device is entered or left, the target's link."""
        rates: list[tuple[SharedDevice, float, Resource]] = []
        delay_s = 0.0
        if source is not None and source.server is not None and source.plan.read_bytes_per_s is not None:
            rates.append((source.server, source.plan.read_bytes_per_s, IN))
            delay_s += source.plan.latency_s
        if from_device != to_device:
            rates.append((self._device, self._plan.link_bytes_per_s, IN if to_device else OUT))
        if target is not None and target.server is not None and target.plan.write_bytes_per_s is not None:
            rates.append((target.server, target.plan.write_bytes_per_s, OUT))
            delay_s += target.plan.latency_s
        slowest = min(rate for _, rate, _ in rates)
        ticks = max(1, round(size_bytes / slowest * TICKS_PER_SECOND))
        legs = tuple(Leg(server, self._demand(server, slowest, rate, way), way) for server, rate, way in rates)
        return Stage(ticks, legs, round(delay_s * TICKS_PER_SECOND))

    def _demand(self, server: SharedDevice, slowest: float, rate: float, direction: Resource) -> Demand:
        hbm = min(1.0, slowest / self._plan.hbm_bytes_per_s) if server is self._device else 0.0
        share = slowest / rate
        return Demand(hbm=hbm, host_link_in=share) if direction is IN else Demand(hbm=hbm, host_link_out=share)

    def _code(self, coding: Coding, seconds: float) -> Stage:
        """Coding takes the multiprocessors whole, and the memory bandwidth that its bytes need."""
        ticks = max(1, round(seconds * TICKS_PER_SECOND))
        if coding.on_device:
            return Stage(ticks, (Leg(self._device, Demand(hbm=coding.hbm_share, compute=1.0), None),))
        return Stage(ticks, (Leg(self._host_coder, Demand(compute=1.0), None),))
