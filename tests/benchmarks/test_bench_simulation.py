"""Requests per second of a simulation of the 19,366-request Azure conversation trace, and its memory.

Run with ``python -m pytest tests/benchmarks --benchmark-only``. Targets stand beside the figures in ``extra_info``;
absolute speed is never asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from bench_cases import BINDING_BLOCKS, TRACE_REQUESTS, conversation_scenario, simpy_timeouts_per_s, timeouts

from kvsim.simulate import simulate

POOLS = {
    "ample pool": ({}, 100_000),
    "binding pool": ({"num_gpu_blocks_override": BINDING_BLOCKS}, 20_000),
}
PEAK_MEMORY_TARGET_BYTES = 500e6


def test_bare_simpy_timeouts(benchmark):
    count = 200_000
    benchmark.pedantic(timeouts, args=(count,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["timeouts_per_s"] = round(count / benchmark.stats.stats.min)


@pytest.mark.parametrize("pool", POOLS)
def test_conversation_trace(benchmark, pool):
    engine, target = POOLS[pool]
    scenario, workload = conversation_scenario(**engine)
    report = benchmark.pedantic(simulate, args=(scenario,), rounds=3, warmup_rounds=1)
    assert report.counts.num_prompts == TRACE_REQUESTS
    assert (report.counts.preemptions > 0) == (pool == "binding pool")
    rate = TRACE_REQUESTS / benchmark.stats.stats.min
    bare = simpy_timeouts_per_s()
    benchmark.extra_info.update(
        workload=workload,
        requests_per_s=round(rate),
        target_requests_per_s=target,
        simpy_timeouts_per_s=round(bare),
        requests_per_simpy_timeout=round(rate / bare, 4),
        preemptions=report.counts.preemptions,
        engine_steps=report.counts.engine_steps,
    )


MILLION_PROGRAM = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from bench_cases import million_scenario, simpy_timeouts_per_s
from kvsim.simulate import simulate
scenario = million_scenario()
start = time.perf_counter()
report = simulate(scenario)
seconds = time.perf_counter() - start
usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([seconds, usage, report.counts.completed, report.counts.engine_steps, simpy_timeouts_per_s()]))
"""


def test_a_million_requests(benchmark):
    """Scenario to report in a fresh process, beside bare SimPy in the same one."""
    here = __file__.rpartition("/")[0]
    found = []

    def run() -> None:
        done = subprocess.run([sys.executable, "-c", MILLION_PROGRAM, here], check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout))

    benchmark.pedantic(run, rounds=1)
    seconds, peak_bytes, completed, steps, bare = found[0]
    assert completed == 1_000_000
    benchmark.extra_info.update(
        seconds=round(seconds, 1),
        target_s=30,
        requests_per_s=round(completed / seconds),
        requests_per_simpy_timeout=round(completed / seconds / bare, 4),
        simpy_timeouts_per_s=round(bare),
        engine_steps=steps,
        peak_memory_mb=round(peak_bytes / 1e6),
        target_mb=2000,
    )


PEAK_MEMORY_PROGRAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from bench_cases import conversation_scenario
from kvsim.simulate import simulate
simulate(conversation_scenario()[0])
usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(usage * (1 if sys.platform == "darwin" else 1024))
"""


def test_peak_memory(benchmark):
    """A fresh process that simulates the trace and ends."""

    def peak_bytes() -> int:
        here = __file__.rpartition("/")[0]
        done = subprocess.run(
            [sys.executable, "-c", PEAK_MEMORY_PROGRAM, here], check=True, capture_output=True, text=True
        )
        return int(done.stdout)

    size_bytes = benchmark.pedantic(peak_bytes, rounds=1)
    benchmark.extra_info.update(peak_memory_mb=round(size_bytes / 1e6), target_mb=PEAK_MEMORY_TARGET_BYTES / 1e6)
