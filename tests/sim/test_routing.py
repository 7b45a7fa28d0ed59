"""Routing over replicas: laws of the three rules, and SGLang's thresholds."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from sim_cases import MS, build_case, cases, deploy, shared_tables, table, talk_tables
from test_coalescing import QUICK, assert_same

from kvsim.requests import UNSCHEDULED
from kvsim.sim.prefix_cache import PrefixCache
from kvsim.sim.routing import Router
from kvsim.sim.run import RunResult, run_requests
from kvsim.specs.routing import RouterThresholds

ROUTINGS = ("round_robin", "least_loaded", "prefix_aware")


@dataclass
class Stub:
    load: int
    cache: PrefixCache | None = None
    waiting: deque[int] = field(default_factory=deque)


def stub(load: int, *units: int) -> Stub:
    cache = PrefixCache(1)
    for unit in units:
        cache.insert(unit)
    return Stub(load, cache)


def choose(replicas: list[Stub], own: tuple[int, ...], **thresholds: float) -> int:
    return Router("prefix_aware", RouterThresholds(**thresholds), [own], [10.0]).choose(0, replicas)


def test_the_longest_cached_prefix_wins() -> None:
    assert choose([stub(0, 1, 2, 3), stub(5, 1, 2, 3, 4), stub(0, 9)], tuple(range(1, 11))) == 1


def test_a_hole_ends_a_prefix() -> None:
    assert choose([stub(3, 1, 2, 3, 4), stub(0, 1, 3, 4, 5, 6, 7)], tuple(range(1, 11))) == 0


def test_equal_prefixes_go_to_the_less_loaded_then_to_the_first() -> None:
    prompt = tuple(range(1, 11))
    assert choose([stub(2, *prompt), stub(1, *prompt), stub(1, *prompt)], prompt) == 1


def test_a_prefix_at_the_threshold_is_too_short() -> None:
    """SGLang compares with >: 3 of 10 units are not above 0.3."""
    prompt = tuple(range(1, 11))
    assert choose([stub(1, 1, 2, 3), stub(0)], prompt) == 1
    assert choose([stub(1, 1, 2, 3, 4), stub(0)], prompt) == 0
    assert choose([stub(1, 1, 2, 3), stub(0)], prompt, cache_threshold=0.2) == 0


def test_load_decides_only_where_it_differs_by_both_thresholds() -> None:
    prompt = tuple(range(1, 11))
    limits = {"balance_abs_threshold": 4, "balance_rel_threshold": 2.0}
    assert choose([stub(4, *prompt), stub(0)], prompt, **limits) == 0
    assert choose([stub(5, *prompt), stub(0)], prompt, **limits) == 1
    assert choose([stub(12, *prompt), stub(6)], prompt, **limits) == 0
    assert choose([stub(13, *prompt), stub(6)], prompt, **limits) == 1


def test_what_nobody_knows_goes_to_the_least_loaded_then_to_the_emptiest_cache() -> None:
    assert choose([stub(1), stub(0, 7, 8), stub(0, 7)], tuple(range(1, 11))) == 2


@given(case=cases())
@settings(QUICK, max_examples=40)
def test_with_one_replica_every_routing_is_the_same(case) -> None:
    deployment = case.deployment.__class__(**{**vars(case.deployment), "replicas": 1})
    runs = [
        run_requests(deployment, case.requests, case.plan, case.max_model_len, routing=routing) for routing in ROUTINGS
    ]
    for other in runs[1:]:
        assert_same(runs[0], other)


@given(case=cases(tables=st.one_of(shared_tables(), talk_tables()), strategies=st.just("native")))
@settings(QUICK, max_examples=40)
def test_coalesced_equals_per_step_where_the_router_reads_caches(case) -> None:
    def play(*, coalesce: bool) -> RunResult:
        limits = RouterThresholds(cache_threshold=0.05, balance_abs_threshold=2)
        return run_requests(
            case.deployment, case.requests, case.plan, case.max_model_len, routing="prefix_aware", thresholds=limits,
            coalesce=coalesce,
        )  # fmt: skip

    assert_same(play(coalesce=True), play(coalesce=False))


def cached(deployment, requests, routing: str) -> int:
    case = build_case(deployment, requests, spare_blocks=2000, routing=routing)
    result = case.play()
    assert all(finished >= 0 for finished in result.log.finished)
    return sum(record.cached_prompt_tokens for record in result.records)


def sessions(count: int, turns: int):
    """Conversations one after another in time, whose turns alternate so that a round robin splits each of them."""
    parents, arrivals, prompts, outputs, heads, tails = [], [], [], [], [], []
    for session in range(count):
        for turn in range(turns):
            parents.append(len(prompts) - 1 if turn else -1)
            arrivals.append(UNSCHEDULED if turn else session * 5000 * MS)
            prompts.append(64 * (turn + 1) + 32 * turn)
            outputs.append(32)
            ids = tuple(session * 1000 + i for i in range((prompts[-1] + 31) // 16))
            heads.append(ids[: prompts[-1] // 16])
            tails.append(ids[prompts[-1] // 16 :])
    return table(
        arrivals, prompts, outputs, parents=parents, delays=[MS] * len(prompts), hashes=tuple(heads),
        output_hashes=tuple(tails),
    )  # fmt: skip


def test_sessions_one_at_a_time_hit_more_by_prefix_than_in_turn() -> None:
    """Where nothing else runs, the replica of the last turn has all of the conversation, and no other has more."""
    deployment = deploy(replicas=2, max_num_batched_tokens=512)
    requests = sessions(6, 4)
    hits = {routing: cached(deployment, requests, routing) for routing in ROUTINGS}
    # Whole blocks of all that was said before, whose very last token has no KV.
    before = [prompt - 64 for prompt in requests.prompt_tokens.tolist() if prompt > 64]
    possible = sum((tokens - 1) // 16 * 16 for tokens in before)
    assert hits["prefix_aware"] == possible
    assert hits["prefix_aware"] > hits["round_robin"]
