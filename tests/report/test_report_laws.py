"""What every report must satisfy, whatever was asked: sums, shares, bands, definitions, round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
from report_cases import CASES, figures, reports, scenario, workload

from kvsim.compression import STRATEGIES
from kvsim.device_catalog import load_device
from kvsim.prepare import prepare
from kvsim.report import Figure, Report
from kvsim.sim.run import run_requests
from kvsim.simulate import compare, estimate, simulate

cases = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")


@cases
def test_every_case_reports_by_both_methods(case):
    made = reports(*case)
    assert {report.method for report in made} == {"simulation", "estimate"}
    assert len({report.strategy for report in made}) > (3 if case[0] == "deepseek-v3" else len(STRATEGIES) // 2)


@cases
def test_the_memory_terms_add_up_to_the_device(case):
    capacity = load_device(case[1]).spec.capacity_bytes
    for report in reports(*case):
        assert sum(term.size_bytes for term in report.memory) == pytest.approx(capacity, rel=1e-12), report.strategy
        assert all(term.size_bytes >= -1.0 for term in report.memory), report.strategy
        pool = next(term.size_bytes for term in report.memory if term.name == "kv_pool")
        assert report.kv.num_blocks * report.kv.kv_bytes_per_token * report.kv.block_size <= pool * case[2] * 1.0001


@cases
def test_shares_of_time_and_of_basis_add_up_to_one(case):
    for report in reports(*case):
        assert sum(share.share for share in report.time_split) == pytest.approx(1.0)
        assert sum(share.share for share in report.coverage) == pytest.approx(1.0)
        busy_s = sum(share.prefill_s + share.decode_s for share in report.time_split)
        for share in report.time_split:
            assert share.share == pytest.approx((share.prefill_s + share.decode_s) / busy_s)
        by_basis = {part.basis: part.share for part in report.coverage}
        for basis, part in by_basis.items():
            assert part == pytest.approx(sum(s.share for s in report.time_split if s.basis is basis))


@cases
def test_every_band_holds_its_value_and_every_value_its_basis(case):
    for report in reports(*case):
        found = dict(figures(report))
        assert len(found) > 20
        for place, figure in found.items():
            if figure.value is None:
                assert figure.low is figure.high is figure.basis is None, (report.strategy, place)
                continue
            assert figure.basis is not None, (report.strategy, place)
            assert math.isfinite(figure.value)
            if figure.low is not None and figure.high is not None:
                assert figure.low <= figure.value <= figure.high, (report.strategy, place)


@cases
def test_a_report_survives_json(case):
    for report in reports(*case):
        assert Report.model_validate_json(report.model_dump_json()) == report


@cases
def test_capacity_figures_agree_with_each_other(case):
    for report in reports(*case):
        kv = report.kv
        assert kv.compression_ratio == pytest.approx(1 - 1 / kv.fold)
        assert report.effects.capacity_gain.value == pytest.approx(kv.fold)
        assert kv.capacity_tokens == kv.num_blocks * kv.block_size
        assert kv.max_concurrency > 0
        if report.strategy == "native":
            assert kv.fold == 1.0
            assert report.effects.prefill_tax.value == report.effects.decode_gain.value == 1.0


@cases
def test_the_bill_is_split_between_input_and_output(case):
    for report in reports(*case):
        cost, tokens = report.cost, report.throughput
        if cost.usd_per_hour.value is None:
            continue
        bill = cost.usd_per_hour.value * report.duration_s.value / 3600
        inputs = report.duration_s.value * (tokens.total_token_throughput.value - tokens.output_throughput.value)
        outputs = report.duration_s.value * tokens.output_throughput.value
        parts = (
            cost.usd_per_million_input_tokens.value * inputs + cost.usd_per_million_output_tokens.value * outputs
        ) / 1e6
        assert parts == pytest.approx(bill, rel=1e-9), report.strategy
        assert cost.usd_per_million_total_tokens.value * (inputs + outputs) / 1e6 == pytest.approx(bill, rel=1e-9)
        assert cost.tokens_per_usd.value == pytest.approx((inputs + outputs) / bill)


def unknown(figure: Figure) -> bool:
    return figure.value is None and figure.low is None and figure.high is None and figure.basis is None


def test_without_a_price_every_dollar_figure_is_unknown_and_never_zero():
    for report in reports("llama-3.2-1b", "snapdragon-8-gen-3", 1):
        cost = report.cost
        assert cost.price is None
        for name in (
            "usd_per_hour", "usd_per_million_input_tokens", "usd_per_million_output_tokens",
            "usd_per_million_total_tokens", "tokens_per_usd",
        ):  # fmt: skip
            assert unknown(getattr(cost, name)), name
        assert cost.engine_utilization is not None


def test_without_a_tdp_every_energy_figure_is_unknown_and_never_zero():
    spec = load_device("snapdragon-8-gen-3").spec
    assert spec.tdp is None
    for report in reports("llama-3.2-1b", "snapdragon-8-gen-3", 1):
        energy = report.energy
        assert unknown(energy.joules_per_output_token)
        assert unknown(energy.joules_per_total_token)
        assert unknown(energy.mean_power_w)


def test_energy_lies_between_idle_and_full_power():
    for report in reports("llama-3.1-8b", "h100-sxm", 1):
        watts = report.energy.mean_power_w
        assert 0.08 * 700 <= watts.low <= watts.value <= watts.high <= 700
        joules = watts.value * report.duration_s.value
        outputs = report.throughput.output_throughput.value * report.duration_s.value
        assert report.energy.joules_per_output_token.value == pytest.approx(joules / outputs)


def test_latency_definitions_hold_request_by_request():
    """TPOT is (e2el - ttft) / (output tokens - 1), as in vLLM bench, over requests with several tokens."""
    one = scenario("llama-3.1-8b", "h100-sxm", bands=False)
    report, prepared = simulate(one), prepare(one)
    result = run_requests(prepared.deployment, prepared.requests, prepared.plan, prepared.max_model_len)
    arrived, first, finished = result.log.client_seconds()
    outputs = prepared.requests.output_tokens
    several = outputs > 1
    assert report.latency.ttft.mean_s.value == pytest.approx((first - arrived).mean())
    assert report.latency.e2el.mean_s.value == pytest.approx((finished - arrived).mean())
    tpot = (finished - first)[several] / (outputs[several] - 1)
    assert report.latency.tpot.mean_s.value == pytest.approx(tpot.mean())
    assert report.latency.tpot.count == several.sum()
    assert report.latency.itl.count == (outputs - 1).sum()
    # ITL pools gaps: its total is the requests' decode time.
    assert report.latency.itl.mean_s.value * report.latency.itl.count == pytest.approx((finished - first).sum())
    assert report.latency.ttft.p99_s.value is None, "forty samples have no p99"


def test_goodput_counts_the_requests_that_meet_every_objective():
    base = scenario("llama-3.1-8b", "h100-sxm", bands=False, workload=workload(rate=20, num_prompts=200))
    prepared = prepare(base)
    result = run_requests(prepared.deployment, prepared.requests, prepared.plan, prepared.max_model_len)
    sent, first, _ = result.log.client_seconds()
    ttft = first - sent
    limit_s = float(np.median(ttft))
    report = simulate(base.model_copy(update={"slo": base.slo.model_copy(update={"ttft_s": limit_s})}))
    good = int((ttft <= limit_s).sum())
    assert 0 < good < 200
    assert report.throughput.slo_attainment.value == pytest.approx(good / 200)
    assert report.throughput.request_goodput.value == pytest.approx(good / report.duration_s.value)
    unset = simulate(base)
    assert unset.throughput.request_goodput.value is None
    assert unset.throughput.slo_attainment.value is None


@pytest.mark.parametrize("strategy", ["native", "fp8", "kivi-4", "snapkv", "streaming_llm", "turboquant_4bit_nc"])
@pytest.mark.parametrize(
    ("model", "device", "ranks", "rate"),
    [("llama-3.1-8b", "h100-sxm", 1, 0.2), ("llama-3.3-70b", "h100-sxm", 4, 0.1), ("gemma-3-12b", "l40s", 1, 0.05)],
)
def test_estimate_and_simulation_agree_under_light_load(strategy, model, device, ranks, rate):
    """With no queue to wait in, the closed form at the mean lengths is the simulation's mean within a tenth."""
    one = scenario(
        model, device, ranks, compression=strategy, workload=workload(rate=rate, num_prompts=300), bands=False
    )
    played, closed = simulate(one), estimate(one)
    for read in (lambda r: r.latency.ttft.mean_s.value, lambda r: r.latency.tpot.mean_s.value):
        assert read(closed) == pytest.approx(read(played), rel=0.10)
    assert closed.latency.e2el.mean_s.value == pytest.approx(played.latency.e2el.mean_s.value, rel=0.10)
    assert closed.cost.engine_utilization == pytest.approx(played.cost.engine_utilization, rel=0.15)


def test_a_saturated_estimate_completes_no_more_than_its_engine_can():
    crowded = scenario("llama-3.1-8b", "l40s", workload=workload(rate=500, num_prompts=300))
    report = estimate(crowded)
    assert report.throughput.request_throughput.value < 500
    assert report.cost.engine_utilization == pytest.approx(1.0, abs=0.01)


def test_an_estimates_busy_time_is_its_utilisation():
    for report in reports("llama-3.1-8b", "h100-sxm", 1):
        if report.method == "estimate":
            busy_s = sum(share.prefill_s + share.decode_s for share in report.time_split)
            assert busy_s / report.duration_s.value == pytest.approx(report.cost.engine_utilization)


def test_compare_fills_the_queueing_effect_of_every_strategy_that_queued():
    rows = compare(
        scenario("llama-3.1-8b", "l40s", workload=workload(rate=30, num_prompts=300), bands=False),
        ["native", "fp8", "snapkv"],
    )
    native, fp8, snapkv = (row.report for row in rows)
    assert native.effects.queueing_effect.value == pytest.approx(1.0)
    for report in (fp8, snapkv):
        waits = native.queue_delay_mean_s.value / report.queue_delay_mean_s.value
        assert report.effects.queueing_effect.value == pytest.approx(waits)
    assert simulate(fp8.scenario).effects.queueing_effect.value is None


def test_one_edge_alone_gives_figures_without_bands():
    report = estimate(scenario("llama-3.1-8b", "h100-sxm", bands=False))
    assert all(figure.low is None and figure.high is None for _, figure in figures(report))
