"""What the benchmarks run, and what their results are written beside: targets and the machine's own event rate."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import simpy

from kvsim.scenario import Scenario
from kvsim.workload_catalog import load_workload

TRACE = (
    Path(__file__).resolve().parents[2].parent
    / "shared" / "data" / "traces" / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
)  # fmt: skip
TRACE_REQUESTS = 19_366
BINDING_BLOCKS = 1_000
"""KV blocks under which the conversation trace waits for seconds and preempts thousands of times; the longest request
still fits."""


def conversation() -> tuple[dict[str, Any] | str, str]:
    """The Azure conversation trace, or where it is absent the preset fitted from it with as many requests."""
    if TRACE.is_file():
        return {"kind": "trace", "format": "azure", "path": str(TRACE)}, "trace"
    return "azure-conv", "preset azure-conv: the trace itself is not beside this checkout"


def conversation_scenario(**engine: Any) -> tuple[Scenario, str]:
    """Llama-3.1-8B on one H100, the central edge alone."""
    workload, said = conversation()
    scenario = Scenario.model_validate(
        {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": workload, "bands": False, "engine": engine}
    )
    return scenario, said


def million_scenario() -> Scenario:
    """A million requests as the preset fitted from the conversation trace has them: 50 hours of it."""
    workload = load_workload("azure-conv").model_copy(update={"num_prompts": 1_000_000})
    return Scenario.model_validate(
        {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": workload, "bands": False}
    )


def timeouts(count: int) -> None:
    """Play ``count`` bare SimPy timeouts in one process."""
    env = simpy.Environment(initial_time=0)

    def ticking() -> Any:
        for _ in range(count):
            yield env.timeout(1)

    env.process(ticking())
    env.run()


def simpy_timeouts_per_s(count: int = 200_000, repeats: int = 3) -> float:
    """Best rate of bare SimPy timeouts on this machine, now."""
    best_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        timeouts(count)
        best_s = min(best_s, time.perf_counter() - start)
    return count / best_s
