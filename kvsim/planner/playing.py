"""Simulating the points that the screen leaves: the same requests for all, in processes where that is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvsim.errors import KvsimError
from kvsim.report import Report
from kvsim.scenario import Scenario
from kvsim.simulate import simulate
from kvsim.workers import worker_pool

WORTH_SPAWNING_S = 6.0
"""Expected seconds of simulation in this process from which others are started; a start takes one to two seconds."""
Tick = Callable[[int], None]


def play(
    scenarios: Sequence[Scenario], base_dir: Path | None, workers: int, tick: Tick
) -> tuple[Report | KvsimError, ...]:
    """Simulate scenarios, each seeing the same requests; a scenario that cannot run gives its error.

    The order of results is that of ``scenarios``, whatever the number of workers.
    """
    if not scenarios:
        return ()
    started = time.perf_counter()
    found = [play_one(scenarios[0], base_dir)]
    tick(1)
    rest = scenarios[1:]
    if workers > 1 and len(rest) * (time.perf_counter() - started) > WORTH_SPAWNING_S:
        with worker_pool(min(workers, len(rest))) as pool:
            for report in pool.map(partial(play_one, base_dir=base_dir), rest):
                found.append(report)
                tick(1)
        return tuple(found)
    for scenario in rest:
        found.append(play_one(scenario, base_dir))
        tick(1)
    return tuple(found)


def play_one(scenario: Scenario, base_dir: Path | None) -> Report | KvsimError:
    """Simulate one scenario."""
    try:
        return simulate(scenario, base_dir=base_dir)
    except KvsimError as error:
        return error
