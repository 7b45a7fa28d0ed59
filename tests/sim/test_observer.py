"""What an observer writes down is what the run did, and the run is the same without it."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from sim_cases import HASH_TOKENS, MS, Case, build_case, cases, deploy, table
from test_tier_laws import hosted_cases, tiered_cases

from kvsim.cost.priors import Edge
from kvsim.errors import InvariantViolation
from kvsim.rendering import openmetrics, trace_events
from kvsim.rendering.openmetrics import openmetrics_document
from kvsim.rendering.trace_events import trace_document
from kvsim.scenario import Slo
from kvsim.scenario_file import load_scenario
from kvsim.sim import observer as observing
from kvsim.sim.observer import RunObserver
from kvsim.simulate import simulate
from kvsim.summary import outcome
from kvsim.units import GIBI, TICKS_PER_SECOND

RELAXED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ANY_CASE = st.one_of(cases(), cases(stream="side"), hosted_cases(), tiered_cases())


def watch(case: Case, **options: Any) -> RunObserver:
    observer = RunObserver()
    case.play(observer=observer, **options)
    return observer


def trace(observer: RunObserver) -> list[dict[str, Any]]:
    document, _ = trace_document(observer, "test")
    events = json.loads(document, parse_float=Decimal)["traceEvents"]
    assert isinstance(events, list)
    return events


def busy_s(case: Case, observer: RunObserver) -> float:
    """Busy time as the report has it."""
    assert observer.result is not None
    return outcome(observer.result, case.requests, Slo(), Edge.CENTRAL).phases.busy_s


def metrics(observer: RunObserver) -> dict[str, Any]:
    text = openmetrics_document(observer, 'a "model"').decode()
    assert text.endswith("# EOF\n")
    return {family.name: family for family in text_string_to_metric_families(text)}


def last(family: Any, suffix: str = "", **labels: str) -> float:
    """Last sample, summed over replicas."""
    found: dict[str, float] = {}
    for sample in family.samples:
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items():
            found[sample.labels["engine"]] = sample.value
    return sum(found.values())


def chat(**options: Any) -> Case:
    """Conversations that share a prefix, over a tight pool."""
    count = 24
    hashes = tuple(tuple(range(i % 2 * 100, i % 2 * 100 + 6)) for i in range(count))
    requests = table(
        [40 * MS * i for i in range(count)], [128 + 7 * i for i in range(count)], [90] * count, hashes=hashes
    )
    assert HASH_TOKENS == 16
    return build_case(deploy(**options), requests, spare_blocks=30)


# --- the observer ---------------------------------------------------------------------------------------------------


@given(case=ANY_CASE)
@RELAXED
def test_watching_changes_nothing(case: Case) -> None:
    observer = RunObserver()
    plain, watched = case.play(), case.play(observer=observer)
    assert plain == watched == observer.result


@given(case=ANY_CASE, coalesce=st.booleans())
@RELAXED
def test_steps_cover_the_busy_time_in_order_and_nothing_is_left(case: Case, coalesce: bool) -> None:
    observer = watch(case, coalesce=coalesce)
    assert observer.result is not None
    for watched, record in zip(observer.replicas, observer.result.records, strict=True):
        clock = 0
        for run in watched.steps:
            assert clock <= run.start_ticks <= run.end_ticks
            clock = run.end_ticks
        assert sum(run.end_ticks - run.start_ticks for run in watched.steps) == watched.busy_ticks
        assert sum(run.prompt_tokens for run in watched.steps) == record.prefilled_tokens
        final = watched.samples[-1]
        assert (final.running, final.waiting, final.used_bytes) == (0, 0, 0)
        assert (final.preemptions, final.cached_tokens) == (record.preemptions, record.cached_prompt_tokens)
        assert all(0 <= sample.used_bytes <= watched.pool_bytes for sample in watched.samples)
    total = sum(watched.busy_ticks for watched in observer.replicas) / TICKS_PER_SECOND
    assert total == pytest.approx(busy_s(case, observer), rel=1e-9, abs=1e-12)


def test_the_same_steps_are_seen_coalesced_and_one_by_one() -> None:
    case = chat()
    few, many = watch(case), watch(case, coalesce=False)
    assert len(few.replicas[0].steps) < len(many.replicas[0].steps)
    assert sum(run.steps for run in few.replicas[0].steps) == sum(run.steps for run in many.replicas[0].steps)
    assert few.replicas[0].busy_ticks == many.replicas[0].busy_ticks


def test_caps_drop_detail_and_keep_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = watch(chat())
    monkeypatch.setattr(observing, "MAX_STEPS", 10)
    monkeypatch.setattr(observing, "MAX_SAMPLES", 16)
    monkeypatch.setattr(trace_events, "MAX_REQUESTS", 5)
    cut = watch(chat())
    (mine,), (full,) = cut.replicas, whole.replicas
    assert len(mine.steps) == 10
    assert len(mine.samples) <= 17
    assert mine.busy_ticks == full.busy_ticks
    assert mine.unkept_steps == sum(run.steps for run in full.steps[10:])
    assert (mine.samples[-1].running, mine.samples[-1].used_bytes) == (0, 0)
    document, notices = trace_document(cut, "cut")
    assert notices == (
        "the trace shows the lives of the first 5 of 24 requests",
        f"the trace leaves out {mine.unkept_steps:,} engine steps at the end of the run",
    )
    assert json.loads(document)


# --- trace ----------------------------------------------------------------------------------------------------------


@given(case=ANY_CASE)
@RELAXED
def test_a_trace_sums_to_the_busy_time_and_its_counters_end_at_zero(case: Case) -> None:
    observer = watch(case)
    events = trace(observer)
    steps = [event for event in events if event["ph"] == "X" and event["tid"] == trace_events.STEP_TRACK]
    assert float(sum(event["dur"] for event in steps)) / 1e6 == pytest.approx(busy_s(case, observer), rel=1e-9)
    ends: dict[tuple[int, str], dict[str, int]] = {}
    for event in events:
        if event["ph"] == "C":
            ends[event["pid"], event["name"]] = event["args"]
    assert ends
    assert not any(value for values in ends.values() for value in values.values())
    # Every life that begins ends, none overlaps on a track of its own.
    balance = Counter[tuple[str, str]]()
    for event in events:
        if event["ph"] in "be":
            balance[event["id"], event["name"]] += 1 if event["ph"] == "b" else -1
    assert not any(balance.values())
    tracks: dict[tuple[int, int], Decimal] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        key = event["pid"], event["tid"]
        # A double holds microseconds to about a picosecond.
        assert event["ts"] >= tracks.get(key, Decimal(0)) - Decimal("1e-5")
        tracks[key] = event["ts"] + event["dur"]


def test_transfers_and_compaction_stand_beside_the_steps() -> None:
    hosted = watch(chat(kv_offloading_size=GIBI))
    names = Counter(activity.name for activity in hosted.replicas[0].beside)
    assert names["store"]
    side = watch(chat(strategy="snapkv(budget_tokens=40,window_size=8)", compression_stream="side"))
    compactions = [activity for activity in side.replicas[0].beside if activity.name == "compact"]
    assert side.result is not None
    assert sum(one.alone_ticks for one in compactions) == side.result.records[0].aside_ticks
    named = {event["args"]["name"] for event in trace(side) if event["name"] == "thread_name"}
    assert {"engine steps", "compact"} <= named


def test_a_trace_needs_a_finished_run() -> None:
    with pytest.raises(InvariantViolation):
        trace_document(RunObserver(), "none")
    with pytest.raises(InvariantViolation):
        openmetrics_document(RunObserver(), "none")


def test_a_life_runs_from_the_client_to_the_client() -> None:
    observer = watch(chat(request_overhead_s=0.008))
    assert observer.result is not None
    sent_s, _, last_s = observer.result.log.client_seconds()
    mine = [event for event in trace(observer) if event["ph"] in "be" and event["id"] == "3"]
    whole = [float(event["ts"]) / 1e6 for event in mine if event["name"] == "request 3"]
    assert whole == [pytest.approx(sent_s[3]), pytest.approx(last_s[3])]
    assert [event["name"] for event in mine if event["ph"] == "b"] == [
        "request 3", "front end", "queue", "prefill", "decode", "front end",
    ]  # fmt: skip


# --- metrics --------------------------------------------------------------------------------------------------------


@given(case=ANY_CASE)
@settings(RELAXED, max_examples=60)
def test_metrics_parse_and_end_at_the_runs_totals(case: Case) -> None:
    observer = watch(case)
    assert observer.result is not None
    found = metrics(observer)
    log, records = observer.result.log, observer.result.records
    done = [index for index, ticks in enumerate(log.finished) if ticks >= 0]
    assert last(found["kvsim_request_success"], "_total", finished_reason="length") == len(done)
    assert last(found["kvsim_prompt_tokens"], "_total") == case.requests.prompt_tokens[done].sum()
    assert last(found["kvsim_generation_tokens"], "_total") == case.requests.output_tokens[done].sum()
    assert last(found["kvsim_num_preemptions"], "_total") == sum(record.preemptions for record in records)
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert last(found[f"kvsim_{gauge}"]) == 0
        assert all(sample.value >= 0 for sample in found[f"kvsim_{gauge}"].samples)
    first = found["kvsim_time_to_first_token_seconds"]
    assert last(first, "_count") == len(done)
    sent_s, first_s, last_s = log.client_seconds()
    assert last(first, "_sum") == pytest.approx((first_s - sent_s)[done].sum())
    assert last(found["kvsim_e2e_request_latency_seconds"], "_sum") == pytest.approx((last_s - sent_s)[done].sum())


@given(case=cases())
@settings(RELAXED, max_examples=60)
def test_buckets_count_the_gaps_one_by_one(case: Case) -> None:
    """Gaps of runs of steps, counted in closed form, equal those of every single step."""
    few, many = metrics(watch(case)), metrics(watch(case, coalesce=False))
    name = "kvsim_inter_token_latency_seconds"
    for one, other in zip(few[name].samples, many[name].samples, strict=True):
        assert (one.name, one.labels) == (other.name, other.labels)
        assert one.value == pytest.approx(other.value, rel=1e-12)


def test_counters_rise_and_hits_are_hits() -> None:
    observer = watch(chat(replicas=2))
    found = metrics(observer)
    for name in ("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"):
        series: dict[str, list[float]] = {}
        for sample in found[f"kvsim_{name}"].samples:
            series.setdefault(sample.labels["engine"], []).append(sample.value)
        assert sorted(series) == ["0", "1"]
        assert all(values == sorted(values) and values[-1] > 0 for values in series.values()), name
    assert observer.result is not None
    hits = sum(record.cached_prompt_tokens for record in observer.result.records)
    assert last(found["kvsim_prefix_cache_hits"], "_total") == hits > 0


def test_bounds_are_vllms() -> None:
    assert len(openmetrics.FIRST_TOKEN_BUCKETS) == 22
    assert openmetrics.TOKEN_BUCKETS[-1] == 80.0
    assert openmetrics.REQUEST_BUCKETS[0] == 0.3


# --- two pools ------------------------------------------------------------------------------------------------------


def test_both_pools_and_what_moves_between_them_are_seen() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "disaggregated-h100.yaml"
    scenario = load_scenario(example, ["bands=false", "workload.num_prompts=40"])
    observer = RunObserver()
    assert simulate(scenario, observer=observer) == simulate(scenario)
    assert observer.result is not None
    assert observer.result.transfers is not None
    (link,) = observer.links
    assert len(link.beside) == observer.result.transfers.count > 0
    names = {event["args"]["name"] for event in trace(observer) if event["name"] == "process_name"}
    assert names == {"prefill replica 0", "decode replica 1", "KV between pools"}
    for watched, record in zip(observer.replicas, observer.result.records, strict=True):
        assert sum(run.prompt_tokens for run in watched.steps) == record.prefilled_tokens
        assert (watched.samples[-1].running, watched.samples[-1].used_bytes) == (0, 0)
    assert set(observer.served_by.values()) == {0}
    assert last(metrics(observer)["kvsim_request_success"], "_total") == 40
