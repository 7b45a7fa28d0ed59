"""Equal scenarios give equal bytes, and strategies see the same requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sim_cases import Case, build_case, deploy, table

from kvsim.prepare import prepare
from kvsim.requests import RequestTable
from kvsim.scenario import Scenario
from kvsim.simulate import compare, estimate, simulate

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENT = {
    "model": "llama-3.1-8b", "device": "h100-sxm", "compression": "snapkv:0.5+fp8", "replicas": 2, "seed": 11,
    "routing": "least_loaded", "slo": {"ttft_s": 0.5},
    "workload": {
        "kind": "synthetic", "num_prompts": 120, "shared_prefix_tokens": 64, "num_shared_prefixes": 3,
        "input_len": {"kind": "lognormal", "median_tokens": 600, "sigma": 0.7, "max_tokens": 4000},
        "output_len": {"kind": "lognormal", "median_tokens": 90, "sigma": 0.6, "max_tokens": 700},
        "arrivals": {"kind": "gamma", "request_rate": 20.0, "burstiness": 0.5},
        "conversations": {"turns": {"kind": "uniform", "min_tokens": 1, "max_tokens": 4}, "think_time_s": 1.0},
    },
}  # fmt: skip
PROGRAM = """
import sys
from kvsim.scenario import Scenario
from kvsim.simulate import simulate
sys.stdout.write(simulate(Scenario.model_validate_json(sys.stdin.read())).model_dump_json())
"""


def report_json(hash_seed: str, document: dict[str, object]) -> str:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(document), capture_output=True, text=True, check=True,
        cwd=CHECKOUT, env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    return run.stdout


def test_fresh_processes_write_the_same_bytes() -> None:
    """String hashes differ between the processes, reports do not."""
    first, second = (report_json(seed, DOCUMENT) for seed in ("1", "4242"))
    assert first == second
    assert json.loads(first)["counts"]["completed"] == 120


def test_another_seed_is_another_run() -> None:
    one, other = (simulate(Scenario.model_validate({**DOCUMENT, "seed": s, "bands": False})) for s in (1, 2))
    assert one.duration_s.value != other.duration_s.value


def test_strategies_see_the_same_requests() -> None:
    """Common random numbers: what differs between rows of a comparison is the strategy."""
    tables = [
        prepare(Scenario.model_validate({**DOCUMENT, "compression": strategy})).requests
        for strategy in ("native", "fp8", "kivi-2", "streaming_llm:512")
    ]
    for other in tables[1:]:
        for field in ("arrival_ticks", "prompt_tokens", "output_tokens", "delay_ticks", "parent"):
            np.testing.assert_array_equal(getattr(tables[0], field), getattr(other, field))
        assert tables[0].prefix_hashes == other.prefix_hashes


def test_a_comparison_is_its_rows_alone() -> None:
    """Order and company change nothing: a row equals the strategy simulated by itself."""
    scenario = Scenario.model_validate({**DOCUMENT, "bands": False})
    together = compare(scenario, ["fp8", "native", "snapkv:0.5"])
    reverse = compare(scenario, ["snapkv:0.5", "native", "fp8"])
    assert [row.report for row in together] == [row.report for row in reversed(reverse)]
    alone = simulate(scenario.model_copy(update={"compression": together[1].report.scenario.compression}))
    assert alone.latency == together[1].report.latency


def test_progress_changes_nothing() -> None:
    seen: list[float] = []
    scenario = Scenario.model_validate(DOCUMENT)
    assert simulate(scenario, progress=seen.append) == simulate(scenario)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_native_beside_native_has_no_effect() -> None:
    """Nothing removed and nothing encoded is the baseline exactly."""
    scenario = Scenario.model_validate({**DOCUMENT, "compression": "native", "bands": False})
    report = simulate(scenario)
    assert report.effects.prefill_tax.value == report.effects.decode_gain.value == 1.0
    assert report.effects.capacity_gain.value == report.kv.fold == 1.0


def test_a_ratio_of_zero_is_the_baseline() -> None:
    """snapkv:0.0 keeps every token: each request's every tick equals native's."""
    requests = table([0, 0, 10**11], [500, 900, 40], [70, 30, 90])
    runs = [build_case(deploy(strategy=s), requests).play() for s in ("native", "snapkv:0.0", "h2o:0.0")]
    for other in runs[1:]:
        for mine, native in zip(other.log.finished, runs[0].log.finished, strict=True):
            assert mine == pytest.approx(native, rel=1e-6)


def permuted(requests: RequestTable, order: list[int]) -> RequestTable:
    return table(*([getattr(requests, f)[order].tolist() for f in ("arrival_ticks", "prompt_tokens", "output_tokens")]))


def test_round_robin_replicas_are_independent_engines() -> None:
    """Every second request alone on one replica gives the ticks of two replicas."""
    rng = np.random.default_rng(5)
    requests = table(
        np.sort(rng.integers(0, 10**12, 30)).tolist(), rng.integers(1, 800, 30).tolist(),
        rng.integers(1, 90, 30).tolist(),
    )  # fmt: skip
    both: Case = build_case(deploy(replicas=2, max_num_seqs=4), requests, spare_blocks=20)
    together = both.play().log
    for replica in (0, 1):
        mine = list(range(replica, 30, 2))
        alone = build_case(deploy(max_num_seqs=4), permuted(requests, mine))
        one = Case(alone.deployment, alone.requests, both.plan, both.max_model_len).play().log
        assert one.finished == [together.finished[i] for i in mine]
        assert one.first_token == [together.first_token[i] for i in mine]


def test_an_estimate_needs_no_clock_and_repeats() -> None:
    scenario = Scenario.model_validate({**DOCUMENT, "workload": "chat"})
    assert estimate(scenario) == estimate(scenario)
