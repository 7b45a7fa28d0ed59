"""Laws of every workload: determinism, separate streams, arrival processes, closed loops and conversations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec, TraceError
from kvsim.requests import UNSCHEDULED
from kvsim.specs.workload import SyntheticWorkload, TraceWorkload
from kvsim.units import TICKS_PER_SECOND
from kvsim.workloads import build_requests

LENGTHS = {"kind": "lognormal", "median_tokens": 200, "sigma": 1.0, "max_tokens": 4000}
ARRAYS = ("arrival_ticks", "prompt_tokens", "output_tokens", "delay_ticks", "parent")


def synthetic(**changes):
    base = {"input_len": LENGTHS, "output_len": LENGTHS, "arrivals": {"kind": "poisson", "request_rate": 4.0}}
    return SyntheticWorkload.model_validate(base | changes)


def talk(**changes):
    return {"turns": {"kind": "uniform", "min_tokens": 1, "max_tokens": 6}} | changes


def same(a, b, names=ARRAYS):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


WORKLOADS = [
    synthetic(),
    synthetic(arrivals={"kind": "gamma", "request_rate": 2.0, "burstiness": 0.5}, shared_prefix_tokens=100),
    synthetic(conversations=talk(), shared_prefix_tokens=40, num_shared_prefixes=3),
    synthetic(conversations=talk(), arrivals={"kind": "concurrency", "max_concurrency": 4}),
]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_same_seed_same_requests_and_another_seed_others(workload):
    first, again, other = (build_requests(workload, seed=seed) for seed in (3, 3, 4))
    assert same(first, again)
    assert first.prefix_hashes == again.prefix_hashes
    assert first.source == again.source
    assert not same(first, other)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_table_is_whole(workload):
    table = build_requests(workload, seed=1)
    rows = np.arange(len(table))
    assert len(table) == workload.num_prompts
    assert all(getattr(table, name).shape == rows.shape for name in ARRAYS)
    assert all(getattr(table, name).dtype == np.int64 for name in ARRAYS)
    assert np.all(table.parent < rows)
    scheduled = table.arrival_ticks != UNSCHEDULED
    assert np.array_equal(table.parent == -1, scheduled)
    assert np.all(np.diff(table.arrival_ticks[scheduled]) >= 0)
    assert np.all(table.delay_ticks >= 0)
    assert np.all(table.delay_ticks[scheduled] == 0)
    assert np.all(table.prompt_tokens >= 1)
    assert np.all(table.output_tokens >= 1)


def test_streams_are_separate():
    base = build_requests(synthetic(), seed=5)
    longer = build_requests(synthetic(input_len={"kind": "uniform", "min_tokens": 1, "max_tokens": 9}), seed=5)
    assert same(base, longer, ("arrival_ticks", "output_tokens"))
    burst = build_requests(synthetic(arrivals={"kind": "burst"}), seed=5)
    assert same(base, burst, ("prompt_tokens", "output_tokens"))
    prefixed = build_requests(synthetic(shared_prefix_tokens=64, num_shared_prefixes=5), seed=5)
    assert same(base, prefixed, ("arrival_ticks", "output_tokens"))
    assert np.array_equal(prefixed.prompt_tokens, base.prompt_tokens + 64)
    turns = build_requests(synthetic(conversations=talk()), seed=5)
    assert same(base, turns, ("output_tokens",))
    slower = build_requests(synthetic(conversations=talk(think_time_s=20.0)), seed=5)
    assert same(turns, slower, ("arrival_ticks", "prompt_tokens", "parent"))
    np.testing.assert_allclose(slower.delay_ticks, 2 * turns.delay_ticks, atol=2)


def gaps_s(arrivals, count=40_000):
    table = build_requests(synthetic(arrivals=arrivals, num_prompts=count), seed=11)
    return np.diff(table.arrival_ticks, prepend=0) / TICKS_PER_SECOND


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_vllms_mean_and_variation(burstiness):
    gaps = gaps_s({"kind": "gamma", "request_rate": 5.0, "burstiness": burstiness})
    cv = burstiness**-0.5
    assert gaps.mean() == pytest.approx(0.2, rel=4 * cv / len(gaps) ** 0.5)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


def test_poisson_gaps_are_exponential():
    gaps = gaps_s({"kind": "poisson", "request_rate": 8.0})
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.02)
    for level in (0.05, 0.125, 0.5):
        assert np.mean(gaps > level) == pytest.approx(np.exp(-8 * level), abs=0.01)


def test_constant_and_burst_arrivals_are_exact():
    even = build_requests(synthetic(arrivals={"kind": "constant", "request_rate": 8.0}, num_prompts=5), seed=0)
    assert even.arrival_ticks.tolist() == [k * TICKS_PER_SECOND // 8 for k in range(5)]
    burst = build_requests(synthetic(arrivals={"kind": "burst"}, num_prompts=5), seed=0)
    assert burst.arrival_ticks.tolist() == [0] * 5


@given(count=st.integers(1, 60), clients=st.integers(1, 80))
def test_closed_loop_is_one_chain_per_client(count, clients):
    arrivals = {"kind": "concurrency", "max_concurrency": clients, "think_time_s": 1.5}
    table = build_requests(synthetic(arrivals=arrivals, num_prompts=count), seed=0)
    start = min(count, clients)
    assert table.arrival_ticks.tolist() == [0] * start + [UNSCHEDULED] * (count - start)
    assert table.parent.tolist() == [-1] * start + list(range(count - start))
    assert set(table.delay_ticks[start:].tolist()) <= {3 * TICKS_PER_SECOND // 2}


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64),
    count=st.integers(1, 80),
    shared=st.integers(0, 70),
    clients=st.none() | st.integers(1, 5),
    limit=st.none() | st.integers(500, 9000),
)
def test_conversations_grow_and_share_their_prefix(seed, count, shared, clients, limit):
    closed = {"kind": "concurrency", "max_concurrency": clients}
    workload = synthetic(
        num_prompts=count,
        shared_prefix_tokens=shared,
        conversations=talk(max_context_tokens=limit, first_input_len={"kind": "constant", "tokens": 77}),
        arrivals={"kind": "poisson", "request_rate": 1.0} if clients is None else closed,
    )
    table = build_requests(workload, seed=seed)
    first = table.prompt_tokens == shared + 77
    turn = 0
    for row in range(count):
        hashes, answer = table.prefix_hashes[row], table.output_hashes[row]
        prompt, output = int(table.prompt_tokens[row]), int(table.output_tokens[row])
        assert len(hashes) == prompt // 16
        assert len(hashes) + len(answer) == max(len(hashes), (prompt + output - 1) // 16)
        assert len(set(hashes + answer)) == len(hashes + answer)
        if row and table.parent[row] == row - 1 and not first[row]:
            turn += 1
            before = table.prefix_hashes[row - 1] + table.output_hashes[row - 1]
            assert hashes[: len(before)] == before
            assert prompt > table.prompt_tokens[row - 1] + table.output_tokens[row - 1]
            assert limit is None or prompt + output <= limit
        else:
            turn = 1
            assert first[row]
            for other in range(row):
                common = set(hashes) & set(table.prefix_hashes[other])
                assert len(common) == min(shared // 16, len(table.prefix_hashes[other]))
        assert turn <= 6


def test_conversations_keep_the_request_rate():
    workload = synthetic(num_prompts=20_000, conversations=talk(), arrivals={"kind": "poisson", "request_rate": 10.0})
    table = build_requests(workload, seed=2)
    starts = table.arrival_ticks[table.parent == -1]
    assert len(table) / (starts[-1] / TICKS_PER_SECOND) == pytest.approx(10.0, rel=0.05)
    assert len(table) / len(starts) == pytest.approx(3.5, rel=0.03)
    waits = table.delay_ticks[table.parent >= 0] / TICKS_PER_SECOND
    assert waits.mean() == pytest.approx(10.0, rel=0.04)
    assert waits.std() == pytest.approx(10.0, rel=0.06)


def test_closed_loop_clients_hold_one_session_at_a_time():
    arrivals = {"kind": "concurrency", "max_concurrency": 3, "think_time_s": 2.0}
    table = build_requests(synthetic(num_prompts=200, conversations=talk(), arrivals=arrivals), seed=2)
    assert np.count_nonzero(table.arrival_ticks == 0) == 3
    children = np.bincount(table.parent[table.parent >= 0], minlength=200)
    assert children.max() == 1
    assert np.count_nonzero(children == 0) == 3


def test_shared_prefixes_are_chosen_evenly_and_hash_alike():
    workload = synthetic(num_prompts=4000, shared_prefix_tokens=100, num_shared_prefixes=4)
    table = build_requests(workload, seed=0)
    kinds = {hashes: table.prefix_hashes.count(hashes) for hashes in set(table.prefix_hashes)}
    assert len(kinds) == 4
    assert all(len(hashes) == 100 // 16 for hashes in kinds)
    assert len(set().union(*kinds)) == 4 * (100 // 16)
    assert all(900 < count < 1100 for count in kinds.values())
    assert build_requests(synthetic(), seed=0).prefix_hashes is None


@pytest.mark.parametrize(
    ("lengths", "mean", "lowest", "highest"),
    [
        ({"kind": "constant", "tokens": 7}, 7, 7, 7),
        ({"kind": "uniform", "min_tokens": 1, "max_tokens": 9}, 5, 1, 9),
        ({"kind": "quantiles", "quantiles": [[0, 10], [0.5, 20], [1, 60]]}, 27.5, 10, 60),
        ({"kind": "lognormal", "median_tokens": 100, "sigma": 0.5, "max_tokens": 10**6}, 100 * np.exp(0.125), 5, 2000),
    ],
)
def test_length_distributions(lengths, mean, lowest, highest):
    table = build_requests(synthetic(num_prompts=50_000, input_len=lengths), seed=0)
    assert table.prompt_tokens.mean() == pytest.approx(mean, rel=0.02)
    assert table.prompt_tokens.min() >= lowest
    assert table.prompt_tokens.max() <= highest


def test_lognormal_clips_without_overflow():
    wide = {"kind": "lognormal", "median_tokens": 100, "sigma": 1e6, "min_tokens": 3, "max_tokens": 50}
    table = build_requests(synthetic(input_len=wide), seed=0)
    assert set(table.prompt_tokens.tolist()) == {3, 50}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": {"kind": "poisson", "request_rate": 1e-9}}, "clock holds at most"),
        ({"arrivals": {"kind": "constant", "request_rate": 5e-324}}, "clock holds at most"),
        ({"arrivals": {"kind": "concurrency", "max_concurrency": 1, "think_time_s": 1e9}}, "think times reach"),
        ({"conversations": talk(think_time_s=1e8)}, "think times reach"),
        ({"num_prompts": 10**9}, "num_prompts: 1000000000 is not allowed"),
        ({"input_len": {"kind": "constant", "tokens": 2**40}}, "input_len: 1099511627776 is not allowed"),
        ({"shared_prefix_tokens": 2**40}, "shared_prefix_tokens: 1099511627776 is not allowed"),
    ],
)
def test_sizes_beyond_the_clock_or_table_are_refused(changes, words):
    with pytest.raises(InvalidSpec, match=words):
        build_requests(synthetic(**changes), seed=0)


def test_negative_seed_is_refused():
    with pytest.raises(InvalidSpec, match="seed: -1"):
        build_requests(synthetic(), seed=-1)


MOONCAKE = [
    {"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [90, 91, 92]},
    {"timestamp": 3000, "input_length": 1536, "output_length": 6, "hash_ids": [90, 95, 91]},
    {"timestamp": 6000, "input_length": 500, "output_length": 7, "hash_ids": [90]},
]


@pytest.fixture
def trace_dir(tmp_path):
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    (tmp_path / "c.csv").write_text("prompt_tokens,output_tokens\n5,6\n7,8\n9,10\n")
    return tmp_path


def traced(trace_dir, **changes):
    workload = TraceWorkload.model_validate({"format": "mooncake", "path": "m.jsonl"} | changes)
    return build_requests(workload, seed=0, base_dir=trace_dir)


def test_replay_starts_at_zero_and_speeds_up(trace_dir):
    assert traced(trace_dir).arrival_ticks.tolist() == [0, TICKS_PER_SECOND, 4 * TICKS_PER_SECOND]
    fast = traced(trace_dir, arrivals={"kind": "replay", "speedup": 8.0})
    assert fast.arrival_ticks.tolist() == [0, TICKS_PER_SECOND // 8, TICKS_PER_SECOND // 2]
    assert fast.source == "m.jsonl (mooncake), 3 requests, replayed at 8x speed"


def test_mooncake_hashes_are_dense_whole_prefixes(trace_dir):
    table = traced(trace_dir)
    # Row 0 fills two chunks of 512; row 1's id 91 follows another chunk, so it is another prefix; row 2 fills none.
    assert table.prefix_hashes == ((0, 1), (0, 2, 3), ())
    assert table.hash_block_tokens == 512
    assert table.output_hashes is None


def test_max_requests_takes_the_first(trace_dir):
    table = traced(trace_dir, max_requests=2)
    assert table.prompt_tokens.tolist() == [1100, 1536]
    assert len(table.prefix_hashes) == 2
    assert table.source == "m.jsonl (mooncake), first 2 of 3 requests, replayed"
    assert len(traced(trace_dir, max_requests=99)) == 3


def test_trace_lengths_under_generated_arrivals(trace_dir):
    table = traced(trace_dir, arrivals={"kind": "concurrency", "max_concurrency": 1})
    assert table.parent.tolist() == [-1, 0, 1]
    assert table.prompt_tokens.tolist() == [1100, 1536, 500]
    assert table.source == "m.jsonl (mooncake), 3 requests, concurrency arrivals, seed 0"
    assert str(trace_dir) not in table.source


def test_replay_without_times_says_what_to_do(trace_dir):
    with pytest.raises(TraceError, match=r"replay needs times.*poisson.*timestamp_column"):
        traced(trace_dir, format="columns", path="c.csv")
    table = traced(trace_dir, format="columns", path="c.csv", arrivals={"kind": "burst"})
    assert table.prompt_tokens.tolist() == [5, 7, 9]


def test_replay_beyond_the_clock_is_refused(trace_dir):
    with pytest.raises(InvalidSpec, match="clock holds at most"):
        traced(trace_dir, arrivals={"kind": "replay", "speedup": 1e-9})
