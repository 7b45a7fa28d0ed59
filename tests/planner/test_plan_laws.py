"""Laws of a plan, on small searches: what comes out is feasible, not dominated, and what estimate and simulate say."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from kvsim.compression import SELECTIONS, parse_compression
from kvsim.compression.rules import conflict
from kvsim.edge import edge_answers
from kvsim.errors import Cancelled, InfeasibleScenario, InvalidSpec, KvsimError, UnknownName
from kvsim.planner import PlanRequest, plan
from kvsim.planner.choose import front
from kvsim.planner.crossovers import winning_ranges
from kvsim.planner.feasible import refusals, strategy_refusals
from kvsim.planner.find import _scenario
from kvsim.planner.front import dominates
from kvsim.planner.quality import retained, risk
from kvsim.planner.reasons import compare_with, step_parts
from kvsim.planner.screen import Candidate, Screener
from kvsim.planner.search import search_device, standing
from kvsim.planner.settings import Layout
from kvsim.planner.strategies import PAIRED_SIZES, parts, space_of, strategy_space
from kvsim.quality.published import published_quality
from kvsim.rendering.plan import device_lines, plan_view
from kvsim.simulate import estimate, simulate
from kvsim.specs.engine import EngineSpec

DEVICES = ("h100-sxm", "mi300x", "tpu-v6e", "apple-m4-max", "snapdragon-8-gen-3")


def screen_all(request, device="h100-sxm"):
    screener = Screener(_scenario(request))
    space = space_of(request.search)
    scenario = _scenario(request).model_copy(update={"device": device})
    return screener, search_device(request, device, scenario, screener, space, lambda count: None)


def feasible(screener, search, request):
    return {
        one.candidate
        for one in search.screened
        if not list(strategy_refusals(one.candidate.strategy, request))
        and not list(refusals(one, request, screener.longest_tokens, screener.load.request_rate))
    }


# --- the screen is estimate, to the last digit ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_screen_says_what_estimate_says(make_request, device):
    model = "llama-3.2-1b" if device in DEVICES[3:] else "llama-3.1-8b"
    request = make_request(model=model, devices=[device], search={"gpu_memory_utilization": None, "max_num_seqs": None})
    screener, search = screen_all(request, device)
    assert len(search.screened) > 40
    for one in search.screened[::7]:
        report = estimate(screener.scenario(one.candidate))
        assert one.output_throughput == report.throughput.output_throughput.value
        assert one.ttft_s == report.latency.ttft.mean_s.value
        assert one.tpot_s == report.latency.tpot.mean_s.value
        assert one.usd_per_million == report.cost.usd_per_million_total_tokens.value
        assert one.usd_per_hour == report.cost.usd_per_hour.value
        assert one.joules_per_token == report.energy.joules_per_total_token.value
        assert one.utilization == report.cost.engine_utilization
        assert one.sequences_that_fit == report.kv.max_concurrency
        assert one.sequence_kv_bytes == report.kv.sequence_kv_bytes


def test_what_the_screen_refuses_estimate_refuses_with_the_same_words():
    request = PlanRequest(model="llama-3.3-70b", devices=("a10",), workload="chat")
    screener = Screener(_scenario(request))
    for strategy, ranks in (("native", 1), ("nvfp4", 1), ("fp8", 2)):
        candidate = Candidate("a10", parse_compression(strategy), Layout(ranks, 1), EngineSpec())
        with pytest.raises(KvsimError) as by_screen:
            screener.screen(candidate)
        with pytest.raises(type(by_screen.value)) as by_estimate:
            estimate(screener.scenario(candidate))
        assert str(by_screen.value) == str(by_estimate.value)


# --- the set ----------------------------------------------------------------------------------------------------------


def test_every_point_is_feasible_and_no_screened_candidate_dominates_it(make_request):
    request = make_request(slo={"tpot_s": 0.02}, budget={"usd_per_hour": 8.0}, floors={"reasoning": 0.9})
    answer = plan(request)
    screener, search = screen_all(request)
    held = feasible(screener, search, request)
    assert 0 < len(held) < len(search.screened)
    by_scenario = {screener.scenario(one.candidate): one for one in search.screened}
    rivals = [standing(one) for one in search.screened if one.candidate in held]
    for point in answer.points:
        one = by_scenario[point.scenario]
        assert one.candidate in held
        assert not any(dominates(rival, standing(one)) for rival in rivals)
        assert point.estimated.mean_tpot_s <= 0.02
        assert point.estimated.usd_per_hour <= 8.0
        for kept in point.quality:
            assert kept.share is None or kept.share >= 0.9
    assert len({(p.strategy, p.scenario) for p in answer.points}) == len(answer.points)


def test_every_feasible_candidate_is_in_the_set_equal_to_one_or_dominated(make_request):
    request = make_request()
    _, search = screen_all(request)
    groups = front(search.screened)
    inside = {index for first, rest in groups for index in (first, *rest)}
    heads = [standing(search.screened[first]) for first, _ in groups]
    for index, one in enumerate(search.screened):
        assert index in inside or any(dominates(head, standing(one)) for head in heads)


@pytest.mark.parametrize(
    ("loose", "tight"),
    [
        ({"budget": {"usd_per_hour": 12.0}}, {"budget": {"usd_per_hour": 3.0}}),
        ({"budget": {"watts": 3000}}, {"budget": {"watts": 800}}),
        ({"budget": {"device_memory": 80_000_000_000}}, {"budget": {"device_memory": 70_000_000_000}}),
        ({"budget": {"sequence_kv": 10**8}}, {"budget": {"sequence_kv": 4 * 10**7}}),
        ({"slo": {"tpot_s": 0.05}}, {"slo": {"tpot_s": 0.01}}),
        ({"floors": {"reasoning": 0.5}}, {"floors": {"reasoning": 0.97}}),
        ({"floors": {"reasoning": 0.9}}, {"floors": {"reasoning": 0.9}, "unknown_quality": "refuse"}),
        ({}, {"slo": {"ttft_s": 0.05}, "budget": {"usd_per_hour": 9.0}}),
    ],
)
def test_a_tighter_limit_leaves_a_subset(make_request, loose, tight):
    wide, narrow = make_request(**loose), make_request(**tight)
    screener, search = screen_all(wide)
    _, again = screen_all(narrow)
    assert [one.candidate for one in search.screened] == [one.candidate for one in again.screened]
    assert feasible(screener, search, narrow) <= feasible(screener, search, wide)


def test_the_same_request_gives_the_same_answer(make_request):
    request = make_request(simulate=3)
    assert plan(request).model_dump_json() == plan(request).model_dump_json()


def test_simulated_figures_are_those_of_simulate(make_request):
    answer = plan(make_request(simulate=3))
    played = [point for point in answer.points if point.simulated is not None]
    assert played
    for point in played:
        report = simulate(point.scenario)
        assert point.simulated.p99_ttft_s == report.latency.ttft.p99_s.value
        assert point.simulated.output_throughput == report.throughput.output_throughput.value
        assert point.simulated.usd_per_million_total_tokens == report.cost.usd_per_million_total_tokens.value


def test_a_point_that_misses_a_target_when_simulated_is_no_point(make_request):
    free = plan(make_request(simulate=4))
    p99 = sorted(point.simulated.p99_ttft_s for point in free.points if point.simulated)
    limit = (p99[0] + p99[-1]) / 2
    answer = plan(make_request(simulate=4, slo={"ttft_s": limit}))
    assert answer.refused_in_simulation[0].limit == "TTFT target"
    assert all(point.simulated.p99_ttft_s <= limit for point in answer.points if point.simulated)


# --- the space comes from the unions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_the_table_fits_the_terminal_and_names_every_strategy(make_request, columns):
    answer = plan(make_request())
    console = Console(width=columns, file=StringIO())
    with console.capture() as capture:
        console.print(plan_view(answer, 16, columns))
    table = capture.get().split("h100-sxm: NVIDIA")[0]
    assert max(map(len, table.splitlines())) <= columns
    words = set(table.split())
    assert {"P1", "native", "P99", "$/1M"} <= words
    assert {point.strategy for point in answer.points[:16] if len(point.strategy) < 12} <= words
    assert ("Seqs" in words) == (columns >= 150)
    assert "not run: not simulated" in table


def test_a_pick_was_simulated_where_any_point_was(make_request):
    loose = make_request(simulate=2)
    first = plan(loose).devices[0].cheapest
    slower = first.simulated.p99_ttft_s * 0.98
    tight = plan(make_request(simulate=2, slo={"ttft_s": slower}))
    for pick in (tight.devices[0].runs_today, tight.devices[0].cheapest):
        assert pick is not None
        assert pick.simulated is not None
        assert pick.simulated.p99_ttft_s <= slower


def test_every_selection_that_can_serve_is_tried_alone_and_with_fp8():
    tried = set(strategy_space().strategies)
    fp8 = parse_compression("fp8").encoding
    kinds = {one.selection.kind for one in tried}
    for selection in SELECTIONS:
        refused = any(selection.model_fields["kind"].default in reason for reason, _ in strategy_space().refused)
        assert selection.model_fields["kind"].default in kinds | {"keep_all"} or refused
    paired = {one.selection for one in tried if one.encoding == fp8}
    trained = {one.selection for one in tried}
    assert {part for part in parts("selection", PAIRED_SIZES) if part in trained} <= paired


def test_further_strategies_stand_beside_the_others_and_with_every_encoding(make_request):
    search = make_request(search={"also": ["snapkv:0.123", "knorm:0.5+fp8"]}).search
    space = space_of(search).strategies
    assert space[: len(search.strategies)] == tuple(map(parse_compression, search.strategies))
    assert {parse_compression("snapkv:0.123"), parse_compression("knorm:0.5+fp8")} <= set(space)
    alone = parse_compression("snapkv:0.123")
    encodings = {one.encoding for one in space if one.selection == alone.selection}
    for part in parts("encoding"):
        refused = conflict(alone.selection, alone.reduction, part, alone.coding) or part.is_storage_only
        assert refused or part in encodings


def test_pairs_that_are_no_strategy_are_counted_with_their_reason():
    refused = dict(strategy_space().refused)
    assert sum(refused.values()) > 100
    assert any("storage" in reason or "decoded as a whole" in reason for reason in refused)
    assert any("architecture" in reason for reason in refused)


# --- unknown is said --------------------------------------------------------------------------------------------------


def test_an_unknown_quality_is_marked_or_refused(make_request):
    allowed = plan(make_request(floors={"code": 0.5}))
    unknown = [point for point in allowed.points if point.quality[0].share is None]
    assert unknown
    assert all("quality unknown on code" in point.marks for point in unknown)
    refused = plan(make_request(floors={"code": 0.5}, unknown_quality="refuse"))
    assert all(point.quality[0].share is not None for point in refused.points)
    assert {point.strategy for point in refused.points} == {"native"}


def test_risk_is_the_small_models_and_quality_is_published():
    assert risk(parse_compression("native")).kl_nats == 0
    assert risk(parse_compression("kivi-2")).kl_nats > risk(parse_compression("fp8")).kl_nats > 0
    assert risk(parse_compression("snapkv:0.123")) is None
    assert risk(parse_compression("turboquant_3bit_nc")) is None, "all four layers of the small model are spared"
    kept = retained(parse_compression("turboquant_3bit_nc"), "reasoning")
    shares = {
        note.value / note.baseline
        for note in published_quality(parse_compression("turboquant_3bit_nc")).notes
        if note.task_class == "reasoning"
    }
    assert 62.3 / 86.3 in shares
    assert kept.share == min(shares) == kept.note.value / kept.note.baseline
    assert retained(parse_compression("native"), "code").share == 1


def test_a_device_without_price_or_tdp_misses_their_budgets():
    request = PlanRequest(
        model="llama-3.2-1b", devices=("snapdragon-8-gen-3",), workload="phone-assistant", simulate=0,
        budget={"usd_per_hour": 1.0}, search={"strategies": ["native", "q8_0"]},
    )  # fmt: skip
    with pytest.raises(InfeasibleScenario, match="unknown price"):
        plan(request)
    with pytest.raises(InfeasibleScenario, match="unknown TDP"):
        plan(request.model_copy(update={"budget": type(request.budget)(watts=5.0)}))


# --- reasons and crossovers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fp8", "int4_per_token_head", "knorm:0.9", "kivi-2", "quest"])
def test_terms_add_up_to_the_difference(make_request, strategy):
    screener, _ = screen_all(make_request(search={"strategies": ["native"]}))
    candidate = Candidate("h100-sxm", parse_compression(strategy), Layout(1, 1), EngineSpec(max_num_seqs=64))
    compared = compare_with(screener.screen(candidate), "native", screener)
    difference = compared.request_s - compared.own_request_s
    assert sum(term.saved_s for term in compared.terms) == pytest.approx(difference, rel=1e-9, abs=1e-12)
    parts_s = step_parts(screener.prices(candidate), 32, screener.load)
    assert sum(parts_s.values()) == pytest.approx(screener.prices(candidate).times(32))


def test_capacity_is_the_reason_where_only_the_smaller_cache_fits(make_request):
    request = make_request(devices=["tpu-v6e"], search={"strategies": ["native"]})
    screener, _ = screen_all(request, "tpu-v6e")
    workload = request.workload.model_copy(
        update={"arrivals": type(request.workload.arrivals)(kind="concurrency", max_concurrency=512)}
    )
    screener = Screener(_scenario(request.model_copy(update={"workload": workload})))
    candidate = Candidate("tpu-v6e", parse_compression("int4_per_token_head"), Layout(1, 1), EngineSpec())
    sentence = compare_with(screener.screen(candidate), "native", screener).decides
    assert "capacity" in sentence


@pytest.mark.parametrize(
    ("margin", "wanted"),
    [
        (lambda x: -1.0, ()),
        (lambda x: 1.0, ((1, 1000),)),
        (lambda x: x - 417, ((418, 1000),)),
        (lambda x: 417 - x, ((1, 416),)),
        (lambda x: (x - 100) * (700 - x), ((101, 699),)),
        (lambda x: -(x - 100) * (700 - x), ((1, 99), (701, 1000))),
    ],
)
def test_ranges_are_found_to_the_token(margin, wanted):
    assert winning_ranges(margin, 1, 1000) == wanted


def test_crossovers_hold_on_both_sides(make_request):
    request = make_request(search={"strategies": ["native", "fp8"]})
    answer = plan(request)
    (device,) = answer.devices
    screener, _ = screen_all(request)
    fp8 = Candidate("h100-sxm", parse_compression("fp8"), Layout(1, 1), EngineSpec(max_num_seqs=64))
    native = fp8._replace(strategy=parse_compression("native"))
    found = [one for one in device.crossovers if one.over == "batch" and one.second == "native" and one.wins]
    for crossover in found:
        first, last = crossover.wins[0]
        assert screener.prices(fp8).times(last) < screener.prices(native).times(last)
        if first > crossover.low:
            assert screener.prices(fp8).times(first - 1) >= screener.prices(native).times(first - 1) * (1 - 0.006)


def test_price_and_device_time_make_the_dollars(make_request):
    answer = plan(make_request(devices=["h100-sxm", "a100-sxm-80gb", "mi300x"]))
    best = min(answer.devices[:2], key=lambda one: one.runs_today.estimated.usd_per_million_total_tokens)
    other = next(one for one in answer.devices[:2] if one is not best)
    assert best.beside is None
    numbers = [float(word) for word in re.findall(r"([0-9.]+) x", other.beside)]
    assert numbers[0] == pytest.approx(numbers[1] * numbers[2], abs=0.02)
    prices = [one.runs_today.estimated.usd_per_hour / one.runs_today.num_devices for one in (other, best)]
    assert numbers[1] == pytest.approx(prices[0] / prices[1], abs=0.01)
    assert answer.devices[2].beside.startswith("price unknown")


# --- callers ----------------------------------------------------------------------------------------------------------


def test_progress_ends_at_one_and_a_caller_can_stop_it(make_request):
    seen = []
    plan(make_request(simulate=2), progress=lambda stage, share: seen.append((stage, share)))
    assert {stage for stage, _ in seen} == {"screening", "simulating"}
    assert all(0 <= share <= 1 for _, share in seen)
    assert seen[-1] == ("simulating", 1.0)
    with pytest.raises(Cancelled, match="screening"):
        plan(make_request(), cancelled=lambda: True)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"devices": ["h10"]}, UnknownName, "h100"),
        ({"model": "lama-3.1-8b"}, UnknownName, "llama-3.1-8b"),
        ({"search": {"tensor_parallel_size": [3]}}, InvalidSpec, "does not divide"),
        ({"search": {"max_num_seqs": [16384], "max_num_batched_tokens": [512]}}, InvalidSpec, "is less than"),
        ({"slo": {"ttft_s": 1e-6}}, InfeasibleScenario, "TTFT target"),
        ({"budget": {"usd_per_hour": 0.01}}, InfeasibleScenario, "dollars per hour"),
        ({"budget": {"device_memory": 10**9}}, InfeasibleScenario, "device memory"),
    ],
)
def test_errors_name_what_to_change(make_request, changed, error, words):
    with pytest.raises(error, match=words):
        plan(make_request(**changed))


def test_a_load_that_nothing_carries_is_infeasible(make_request):
    workload = make_request().workload.model_dump(mode="json")
    workload["arrivals"] = {"kind": "poisson", "request_rate": 5000}
    with pytest.raises(InfeasibleScenario, match="the queue grows without end"):
        plan(make_request(workload=workload))


# --- one user ---------------------------------------------------------------------------------------------------------


def test_a_computer_says_what_its_one_user_gets(make_request):
    request = make_request(model="llama-3.2-1b", devices=["apple-m4-max"])
    (device,) = plan(request).devices
    pick = device.runs_today or device.cheapest
    assert pick is not None
    assert device.alone == edge_answers(pick.scenario, (pick.strategy,))[0]
    assert "one user: " in "\n".join(device_lines(device))


def test_a_server_has_no_one_user(make_request):
    (device,) = plan(make_request(devices=["h100-sxm"])).devices
    assert device.alone is None
