"""KV offload to host memory, as vLLM's native offloading does it: computed blocks are copied out, hits are copied back.

Copies run beside the engine's steps and share the host link and the device's memory bandwidth with them. Blocks are
handled in the prefix cache's units; the least recently used ones make way.
Source: vLLM blog, "KV offloading connector", 2026-01-08 (asynchronous DMA of large contiguous blocks).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from kvsim.sim.resources import Demand, SharedDevice
from kvsim.units import TICKS_PER_SECOND


@dataclass(frozen=True)
class HostTierLimits:
    """Size and speed of the host tier of one replica, per tensor-parallel rank."""

    capacity_bytes: int
    link_bytes_per_s: float
    """One direction of the host link, efficiency applied."""
    hbm_bytes_per_s: float
    """Peak memory bandwidth of the device: what a copy takes of it while it runs alone."""


class HostTier:
    """Units of KV in host memory, and the copies under way."""

    def __init__(self, device: SharedDevice, limits: HostTierLimits, unit_bytes: int) -> None:
        self._device = device
        self._limits = limits
        self._unit_bytes = unit_bytes
        self._capacity_units = limits.capacity_bytes // unit_bytes
        self._units: OrderedDict[int, None] = OrderedDict()
        self._leaving: set[int] = set()
        self.copies = 0
        """Copies under way."""
        self.stored_bytes = 0
        self.loaded_bytes = 0

    def match(self, hashes: Sequence[int], start: int, max_units: int) -> int:
        """How many units from ``start`` on are present without a gap, at most up to ``max_units`` in all."""
        count = 0
        for value in hashes[start:max_units]:
            if value not in self._units:
                break
            count += 1
        return count

    def store(self, values: Sequence[int]) -> None:
        """Copy newly computed units out; they can be found once the copy has ended."""
        new = [value for value in values if value not in self._units and value not in self._leaving]
        if not new or not self._capacity_units:
            return
        self._leaving.update(new)
        self.stored_bytes += len(new) * self._unit_bytes
        done = self._copy(len(new), outward=True)
        done.callbacks.append(lambda _: self._stored(new))

    def load(self, values: Sequence[int]) -> simpy.Event:
        """Copy present units back; the event fires when they are on the device."""
        for value in values:
            self._units.move_to_end(value)
        self.loaded_bytes += len(values) * self._unit_bytes
        return self._copy(len(values), outward=False)

    def _copy(self, units: int, *, outward: bool) -> simpy.Event:
        rate = self._limits.link_bytes_per_s
        ticks = max(1, round(units * self._unit_bytes / rate * TICKS_PER_SECOND))
        hbm = min(1.0, rate / self._limits.hbm_bytes_per_s)
        demand = Demand(hbm=hbm, host_link_out=1.0) if outward else Demand(hbm=hbm, host_link_in=1.0)
        self.copies += 1
        done = self._device.start(ticks, demand, "store" if outward else "load").done
        done.callbacks.append(lambda _: self._ended())
        return done

    def _ended(self) -> None:
        self.copies -= 1

    def _stored(self, values: Sequence[int]) -> None:
        for value in values:
            self._leaving.discard(value)
            self._units[value] = None
        while len(self._units) > self._capacity_units:
            self._units.popitem(last=False)
