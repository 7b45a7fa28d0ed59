"""The shared resources of one device: concurrent activities slow one another in proportion, in exact integer time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import simpy
from simpy.events import NORMAL, EventPriority

from kvsim.errors import InvariantViolation

if TYPE_CHECKING:
    from kvsim.sim.observer import ActivityWatch

SPEED_UNITS: Final = 144_403_552_893_600
"""Units in full speed: lcm(1..32), so that halves, thirds, 5/6 or 20/21 of full speed are whole numbers of units."""

SHARE_UNITS: Final = 10**9
"""Units in a whole resource: shares count to one part in 10^9, so 0.6 + 0.4 is exactly the whole."""

END_PRIORITY: Final = EventPriority(NORMAL + 1)
"""An activity's end comes after every ordinary event of its tick, so arrivals go before step ends at equal time."""


class Resource(StrEnum):
    """What the activities of one device share; each link direction is a resource of its own."""

    HBM = "hbm"
    COMPUTE = "compute"
    HOST_LINK_IN = "host_link_in"
    HOST_LINK_OUT = "host_link_out"
    INTERCONNECT = "interconnect"


_INDEX: Final = {resource: index for index, resource in enumerate(Resource)}


@dataclass(frozen=True, slots=True)
class Demand:
    """Share in [0, 1] of each resource's capacity that an activity uses while it runs alone at full speed."""

    hbm: float = 0.0
    compute: float = 0.0
    host_link_in: float = 0.0
    host_link_out: float = 0.0
    interconnect: float = 0.0

    def __post_init__(self) -> None:
        if not (
            0.0 <= self.hbm <= 1.0
            and 0.0 <= self.compute <= 1.0
            and 0.0 <= self.host_link_in <= 1.0
            and 0.0 <= self.host_link_out <= 1.0
            and 0.0 <= self.interconnect <= 1.0
        ):
            msg = f"each share of a demand must lie between 0 and 1: {self}"
            raise InvariantViolation(msg)

    def shares(self) -> tuple[float, float, float, float, float]:
        """Give the shares in the order of `Resource`."""
        return self.hbm, self.compute, self.host_link_in, self.host_link_out, self.interconnect

    def share_units(self) -> tuple[int, ...]:
        """Give the shares in the order of `Resource`, in whole `SHARE_UNITS`."""
        return tuple(round(share * SHARE_UNITS) for share in self.shares())


def fair_speeds(demands: Sequence[Demand]) -> list[int]:
    """Divide the resources among activities that run at once: max-min fair speeds, each at most `SPEED_UNITS`.

    Progressive filling (Bertsekas and Gallager, Data Networks, 2nd ed. 1992, section 6.5.2): all speeds rise
    together until a resource is full; the activities that use it keep that speed; the others rise on.

    Activities whose shares of each resource sum to at most 1 all run at full speed. On one resource with the load
    ``L > 1`` (the sum of the shares) each of its users runs at ``1/L``: two that need all of it run at half speed,
    and a transfer that needs 5 % of HBM slows a step that needs all of it to 20/21.

    Properties: no resource is used beyond its capacity; an activity below full speed uses a full resource whose
    other users run no faster; equal demands get equal speeds; more demand never speeds up the activity itself, nor
    raises the lowest speed, nor speeds up anyone on a single resource. With several resources a third party can gain:
    A slows B, which then leaves more of another resource to C.

    Parameters
    ----------
    demands : sequence of Demand
        One per activity.

    Returns
    -------
    list of int
        Speeds in the order of `demands`, in `SPEED_UNITS`, rounded down so that capacity holds exactly.
    """
    shares = [demand.share_units() for demand in demands]
    speeds = [SPEED_UNITS] * len(demands)
    spare = [SHARE_UNITS * SPEED_UNITS] * len(_INDEX)
    rising = set(range(len(demands)))
    while rising:
        load = [sum(column) for column in zip(*(shares[i] for i in rising), strict=True)]
        level, full = min(((spare[r] // load[r], r) for r in range(len(load)) if load[r]), default=(SPEED_UNITS, 0))
        if level >= SPEED_UNITS:
            break
        held = [i for i in rising if shares[i][full]]
        for i in held:
            speeds[i] = level
            spare = [left - share * level for left, share in zip(spare, shares[i], strict=True)]
        rising.difference_update(held)
    return speeds


class ActivityEnd(simpy.Event):
    """The end of an activity; its value is the activity.

    It never enters the event queue: the device runs the callbacks when it processes its own wake-up, which saves
    one queue event per activity.
    """

    def fire(self, activity: Activity) -> None:
        """Process the event at once, as `simpy.Environment.step` would."""
        self._ok = True
        self._value = activity
        callbacks, self.callbacks = self.callbacks, None  # type: ignore[assignment]
        for callback in callbacks:
            callback(self)


@dataclass(slots=True, eq=False)
class Activity:
    """Work on a device: an engine step, a compression kernel, a transfer.

    `remaining` is the work left in ticks times `SPEED_UNITS`; `speed` is in `SPEED_UNITS`. Both belong to the device.
    """

    name: str
    demand: Demand
    alone_ticks: int
    started_ticks: int
    done: ActivityEnd
    remaining: int
    speed: int = SPEED_UNITS
    finished_ticks: int | None = None


class _WakeUp(simpy.Event):
    """A timeout of the device with the priority of ends."""

    def __init__(self, device: SharedDevice, delay_ticks: int) -> None:
        self.env = device.env
        self.callbacks = [device.on_wake_up]
        self._value = None
        self._ok = True
        device.env.schedule(self, END_PRIORITY, delay_ticks)


class SharedDevice:
    """One device whose HBM, compute, host link and interconnect are shared by concurrent activities.

    Fluid model: speeds are those of `fair_speeds` and change only when an activity starts or ends. An activity that
    runs alone ends after exactly its `alone_ticks`, for one SimPy event.

    Time is exact. Remaining work is an integer, so nothing drifts. An end is rounded up to a whole tick, and the
    activity holds its share until then. Speeds are rounded down to 1/`SPEED_UNITS` (7e-15), which matters only where
    the exact speed is no multiple of it.

    Parameters
    ----------
    env : simpy.Environment
        Its clock counts integer ticks of `kvsim.units.TICKS_PER_SECOND`.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self._active: list[Activity] = []
        self._updated_ticks: int = int(env.now)
        self._wake_up: _WakeUp | None = None
        self._wake_up_ticks = -1
        self._ending = False
        self.observer: ActivityWatch | None = None
        self._finished_busy_ticks = [0.0] * len(_INDEX)

    def fair_speeds(self, demands: Sequence[Demand]) -> list[int]:
        """Speeds of activities that run at once, in `SPEED_UNITS`."""
        return fair_speeds(demands)

    @property
    def is_idle(self) -> bool:
        """Whether no activity runs."""
        return not self._active

    @property
    def num_active(self) -> int:
        """Activities started and not yet ended."""
        return len(self._active)

    def num_using(self, resource: Resource) -> int:
        """Activities under way that use a resource."""
        index = _INDEX[resource]
        return sum(1 for activity in self._active if activity.demand.shares()[index] > 0.0)

    def start(self, alone_ticks: int, demand: Demand, name: str) -> Activity:
        """Start an activity now; it ends, and `Activity.done` fires, when its work is done.

        Parameters
        ----------
        alone_ticks : int
            Its duration when it has the device to itself, zero or more.
        demand : Demand
            What it uses of each resource meanwhile.
        name : str
            For traces and error messages.
        """
        if type(alone_ticks) is not int or alone_ticks < 0:
            msg = f"activity {name!r}: alone_ticks must be a Python int of zero or more, not {alone_ticks!r}"
            raise InvariantViolation(msg)
        env = self.env
        now = env.now
        if type(now) is not int:
            msg = f"activity {name!r}: the clock must count integer ticks, not {now!r}"
            raise InvariantViolation(msg)
        activity = Activity(name, demand, alone_ticks, now, ActivityEnd(env), alone_ticks * SPEED_UNITS)
        active = self._active
        if active:
            self._advance(now)
        else:
            self._updated_ticks = now
        active.append(activity)
        # A wake-up due at this tick, or running now, plans for everyone when it is done.
        if not self._ending and self._wake_up_ticks != now:
            self._plan(now)
        return activity

    def busy_ticks(self, resource: Resource) -> float:
        """Integrate the used share of a resource over time so far, in ticks; at most the time passed."""
        index = _INDEX[resource]
        elapsed = int(self.env.now) - self._updated_ticks
        running = 0.0
        for activity in self._active:
            left = max(0, activity.remaining - activity.speed * elapsed)
            running += activity.demand.shares()[index] * (activity.alone_ticks - left / SPEED_UNITS)
        return self._finished_busy_ticks[index] + running

    def _advance(self, now: int) -> None:
        """Do the work of the time since the last change of speeds."""
        elapsed = now - self._updated_ticks
        if elapsed:
            for activity in self._active:
                left = activity.remaining - activity.speed * elapsed
                activity.remaining = max(left, 0)
            self._updated_ticks = now

    def _plan(self, now: int) -> None:
        """Set the speeds and see to a wake-up at the earliest end."""
        active = self._active
        if len(active) == 1:
            (activity,) = active
            activity.speed = SPEED_UNITS
            delay = -(-activity.remaining // SPEED_UNITS)
        else:
            speeds = self.fair_speeds([activity.demand for activity in active])
            for activity, speed in zip(active, speeds, strict=True):
                activity.speed = speed
            delay = min(-(-activity.remaining // activity.speed) for activity in active)
        if self._wake_up is None or self._wake_up_ticks != now + delay:
            self._wake_up = _WakeUp(self, delay)
            self._wake_up_ticks = now + delay

    def on_wake_up(self, event: simpy.Event) -> None:
        """End the activities that are due; a wake-up that a later plan replaced does nothing."""
        if event is not self._wake_up:
            return
        now = self._wake_up_ticks
        self._wake_up, self._wake_up_ticks = None, -1
        self._advance(now)
        due = [activity for activity in self._active if not activity.remaining]
        self._active = [activity for activity in self._active if activity.remaining]
        for activity in due:
            activity.finished_ticks = now
            self._account(activity)
            if self.observer is not None:
                self.observer.finished(activity)
        self._ending = True
        for activity in due:
            activity.done.fire(activity)
        self._ending = False
        if self._active:
            self._plan(now)

    def _account(self, activity: Activity) -> None:
        ticks = activity.alone_ticks
        busy = self._finished_busy_ticks
        for index, share in enumerate(activity.demand.shares()):
            if share:
                busy[index] += share * ticks
