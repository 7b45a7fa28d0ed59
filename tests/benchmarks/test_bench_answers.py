"""How fast an analytic estimate, a sweep of them and the command line's help are. Absolute speed is never asserted."""

from __future__ import annotations

import subprocess
import sys

import pytest
from bench_cases import simpy_timeouts_per_s

from kvsim.batch import sweep
from kvsim.compression import parse_compression
from kvsim.scenario import Scenario
from kvsim.simulate import estimate

ESTIMATES = {
    "dense": ("llama-3.1-8b", "h100-sxm", "native", 1),
    "selection and quantisation": ("llama-3.1-8b", "h100-sxm", "snapkv+kivi-2", 1),
    "mixture of experts": ("deepseek-v3", "h200-sxm", "fp8", 8),
    "hybrid": ("gemma-3-12b", "h100-sxm", "turboquant_4bit_nc", 1),
}
SWEEP_POINTS, SWEEP_WORKERS = 2_000, 4
SWEEP_STRATEGIES = (
    "native", "fp8", "int4_per_token_head", "kivi-2", "turboquant_4bit_nc", "snapkv", "h2o", "quest", "streaming_llm",
    "pyramidkv",
)  # fmt: skip


def against_simpy(seconds: float) -> dict[str, float]:
    """Seconds as bare SimPy timeouts of the same machine and moment."""
    bare = simpy_timeouts_per_s()
    return {"simpy_timeouts_per_s": round(bare), "simpy_timeouts_long": round(seconds * bare, 1)}


@pytest.mark.parametrize("kind", ESTIMATES)
def test_one_estimate(benchmark, kind):
    model, device, strategy, ranks = ESTIMATES[kind]
    scenario = Scenario(
        model=model, device=device, workload="azure-conv", compression=parse_compression(strategy),
        tensor_parallel_size=ranks,
    )  # fmt: skip
    report = benchmark.pedantic(estimate, args=(scenario,), rounds=30, warmup_rounds=3, iterations=5)
    assert report.method == "estimate"
    median_s = benchmark.stats.stats.median
    benchmark.extra_info.update(median_ms=round(median_s * 1e3, 3), target_ms=5, **against_simpy(median_s))


def test_a_sweep_of_estimates(benchmark):
    """2,000 distinct points over four processes, their start included; the target is 10,000 in 10 s."""
    strategies = [parse_compression(name) for name in SWEEP_STRATEGIES]
    scenarios = [
        Scenario.model_validate(
            {
                "model": ("llama-3.1-8b", "qwen3-8b")[index % 2],
                "device": ("h100-sxm", "h200-sxm")[index // 2 % 2],
                "workload": "azure-conv",
                "compression": strategies[index // 4 % len(strategies)],
                "engine": {"max_num_seqs": 32 + index // 40},
            }
        )
        for index in range(SWEEP_POINTS)
    ]

    def run() -> int:
        return len(sweep(scenarios, method="estimate", workers=SWEEP_WORKERS).filter(status="ok"))

    done = benchmark.pedantic(run, rounds=1)
    assert done == SWEEP_POINTS
    seconds = benchmark.stats.stats.min
    benchmark.extra_info.update(
        seconds_per_10000_points=round(seconds / SWEEP_POINTS * 10_000, 2),
        target_s=10,
        workers=SWEEP_WORKERS,
        **against_simpy(seconds / SWEEP_POINTS),
    )


def test_help(benchmark):
    """``kvsim --help`` in a process of its own."""
    command = [sys.executable, "-m", "kvsim", "--help"]
    benchmark.pedantic(
        subprocess.run, args=(command,), kwargs={"check": True, "capture_output": True}, rounds=5, warmup_rounds=1
    )
    median_s = benchmark.stats.stats.median
    benchmark.extra_info.update(median_s=round(median_s, 3), target_s=0.3, **against_simpy(median_s))
