"""The network between two pools of replicas: transfers share the ports of both their ends, in exact integer time.

Every replica has one port of its own to the fabric, whose middle is never short. Transfers at once divide ports by
max-min fairness, as activities divide a device (:mod:`kvsim.sim.resources`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import simpy

from kvsim.sim.resources import SHARE_UNITS, SPEED_UNITS, ActivityEnd, Demand, SharedDevice
from kvsim.units import TICKS_PER_SECOND


@dataclass(frozen=True, slots=True)
class Flow(Demand):
    """A transfer from one replica's port to another's; it takes a share of each while it runs alone."""

    sender: int = 0
    receiver: int = 0
    send_units: int = SHARE_UNITS
    receive_units: int = SHARE_UNITS


class Fabric(SharedDevice):
    """Ports of the senders and of the receivers, each kind with one rate in bytes/s."""

    def __init__(self, env: simpy.Environment, send_bytes_per_s: float, receive_bytes_per_s: float) -> None:
        super().__init__(env)
        self.bytes_per_s = min(send_bytes_per_s, receive_bytes_per_s)
        """Rate of a transfer that is alone."""
        self._send_units = round(self.bytes_per_s / send_bytes_per_s * SHARE_UNITS)
        self._receive_units = round(self.bytes_per_s / receive_bytes_per_s * SHARE_UNITS)

    def move(self, size_bytes: int, sender: int, receiver: int) -> ActivityEnd:
        """Start a transfer now; the event fires when its last byte has arrived."""
        ticks = round(size_bytes / self.bytes_per_s * TICKS_PER_SECOND)
        flow = Flow(sender=sender, receiver=receiver, send_units=self._send_units, receive_units=self._receive_units)
        return self.start(ticks, flow, "transfer").done

    def fair_speeds(self, demands: Sequence[Demand]) -> list[int]:
        """Max-min fair speeds over the ports, by progressive filling."""
        flows = cast("Sequence[Flow]", demands)
        speeds = [SPEED_UNITS] * len(flows)
        ends = [((0, flow.sender, flow.send_units), (1, flow.receiver, flow.receive_units)) for flow in flows]
        spare: defaultdict[tuple[int, int], int] = defaultdict(lambda: SHARE_UNITS * SPEED_UNITS)
        rising = set(range(len(flows)))
        while rising:
            load: defaultdict[tuple[int, int], int] = defaultdict(int)
            for position in rising:
                for side, place, units in ends[position]:
                    load[side, place] += units
            level, full = min((spare[port] // units, port) for port, units in load.items())
            if level >= SPEED_UNITS:
                break
            held = [i for i in rising if any((side, place) == full for side, place, _ in ends[i])]
            for position in held:
                speeds[position] = level
                for side, place, units in ends[position]:
                    spare[side, place] -= units * level
            rising.difference_update(held)
        return speeds
