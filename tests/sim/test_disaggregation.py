"""Two pools: what changes pools is conserved, the link's laws hold, and nothing hangs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import simpy
from disagg_cases import FREE, Split, admitted, crossing, split, splits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_invariants import Audited, audited, check_schedulers
from sim_cases import AHEAD, MS, build_case, deploy, gap_counts, shared_tables, step_model, table, talk_tables
from test_coalescing import assert_same
from test_routing import sessions

from kvsim.cost.tables import build_tables
from kvsim.sim.build import host_work_ticks
from kvsim.sim.disaggregated import Crossing
from kvsim.sim.fabric import Fabric
from kvsim.sim.run import RunResult
from kvsim.sim.scheduling import Chunk
from kvsim.units import TICKS_PER_SECOND

SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
)


class AuditedTaker(Audited):
    """Counts every byte of decode replicas; on the prefill side, KV on its way out is in no list until it is gone."""

    takes = False

    def schedule(self, now_ticks: int, seats_taken: int, start_ticks: int) -> list[Chunk]:
        self.takes = self.takes or bool(self.remote)
        if self.takes and seats_taken == len(self.leaving):
            self.audit()
        # The engine's own, past the audit of every step.
        return super(Audited, self).schedule(now_ticks, seats_taken, start_ticks)


def check_split(case: Split, result: RunResult) -> None:
    """Lives run forward, gaps add up to the tick, every prompt token is paid for, and bytes are conserved."""
    log, fits = result.log, admitted(case)
    for index, served in enumerate(fits):
        assert log.rejected[index] is not bool(served)
        if served:
            assert log.arrived[index] <= log.scheduled[index] < log.first_token[index] <= log.finished[index]
    gaps, members = gap_counts(result), np.flatnonzero(fits)
    assert gaps.total() == sum(int(case.requests.output_tokens[i]) - 1 for i in members)
    assert sum(ticks * count for ticks, count in gaps.items()) == sum(
        log.finished[i] - log.first_token[i] for i in members
    )
    transfers = result.transfers
    assert transfers.count == int((case.requests.output_tokens[fits] > 1).sum())
    assert transfers.sent_bytes == transfers.size_bytes
    assert transfers.exposed_ticks >= 0
    first = result.records[: result.prefill_replicas]
    assert sum(step[2] for record in first for step in record.prompts) == len(members)
    assert all(not record.runs for record in first)
    ends = [max((t for t in (log.finished[i], log.arrived[i]) if t >= 0), default=0) for i in range(len(fits))]
    assert result.end_ticks >= max(ends)


@given(case=splits())
@settings(SETTINGS, max_examples=250)
def test_coalesced_equals_per_step_and_nothing_is_lost(case: Split) -> None:
    with audited(AuditedTaker) as schedulers:
        coalesced, stepped = case.play(), case.play(coalesce=False)
    check_split(case, coalesced)
    assert_same(coalesced, stepped)
    assert coalesced.transfers == stepped.transfers
    check_schedulers(schedulers)


@given(case=splits(tables=st.one_of(shared_tables(), talk_tables())))
@settings(SETTINGS, max_examples=100)
def test_the_same_with_shared_prefixes(case: Split) -> None:
    coalesced, stepped = case.play(), case.play(coalesce=False)
    check_split(case, coalesced)
    assert_same(coalesced, stepped)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 120)), min_size=1, max_size=5),
    mode=st.sampled_from(("after_prefill", "layerwise")),
    strategy=st.sampled_from(("native", "fp8", "snapkv(budget_tokens=40,window_size=8)", "kivi-4(residual_length=32)")),
    pools=st.sampled_from(((1, 1), (2, 3))),
    ahead=AHEAD,
)
@settings(SETTINGS, max_examples=60)
def test_one_request_at_a_time_over_a_free_link_takes_what_one_engine_takes(
    lengths, mode, strategy, pools, ahead
) -> None:
    """Law: nobody else there, and KV moves in no time: every time equals the aggregated engine's."""
    arrivals = [i * 100_000 * MS for i in range(len(lengths))]
    requests = table(arrivals, [p for p, _ in lengths], [o for _, o in lengths])
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 8, "async_scheduling": ahead}
    one = build_case(deploy(strategy=strategy, **options), requests).play()
    way = crossing(FREE, mode=mode)
    two = split(requests, strategy=strategy, way=way, prefills=pools[0], decodes=pools[1], **options).play()
    assert one.log == two.log
    assert gap_counts(one) == gap_counts(two)


@given(case=splits(), data=st.data())
@settings(SETTINGS, max_examples=60)
def test_prompts_run_as_in_an_engine_that_makes_first_tokens_only(case: Split, data: st.DataObject) -> None:
    """Law: over a free link to a decode pool with room, the prefill pool does not know of any decoding."""
    spread = np.sort(case.requests.arrival_ticks.clip(0))
    requests = replace(
        case.requests, arrival_ticks=spread, parent=np.full_like(spread, -1), prefix_hashes=None, output_hashes=None
    )
    roomy = split(
        requests, strategy=case.prefill.deployment.compression.name, model="llama-3.1-8b", spare=(10_000, 10_000),
        prefills=data.draw(st.sampled_from((1, 2))), max_num_batched_tokens=64, max_num_seqs=64,
        async_scheduling=data.draw(AHEAD),
    )  # fmt: skip
    single = replace(requests, output_tokens=np.ones_like(requests.output_tokens))
    alone = build_case(roomy.prefill.deployment, single).play()
    result = roomy.play()
    assert result.log.first_token == alone.log.first_token
    assert result.log.scheduled == alone.log.scheduled


def test_decoding_runs_as_in_an_engine_that_receives_sequences() -> None:
    """Law: over a free link the decode pool is a plain loop: join who has arrived, fetch who is offered, step.

    As in vLLM a fetch starts at a step's start, so its sequence joins the next step, or this one where nobody decodes.
    """
    rng = np.random.default_rng(5)
    requests = table([0] * 12, rng.integers(20, 300, 12).tolist(), rng.integers(2, 60, 12).tolist())
    case = split(requests, max_num_batched_tokens=256, max_num_seqs=16, async_scheduling=False)
    log = case.play().log
    model = step_model(case.decode.deployment)
    work = host_work_ticks(model)
    steps = [step + host for step, host in zip(build_tables(model, 256, 16).step, work, strict=True)]
    price = model.sequences.token_ticks
    waiting = sorted((log.first_token[i], i) for i in range(12))
    running: dict[int, list[int]] = {}
    fetched: list[int] = []
    finished, now = {}, 0

    def join() -> None:
        for index in fetched:
            running[index] = [int(requests.prompt_tokens[index]) + 1, int(requests.output_tokens[index]) - 1]
        fetched.clear()

    while waiting or fetched or running:
        join()
        if not running and waiting[0][0] > now:
            now = waiting[0][0]
        while waiting and waiting[0][0] <= now:
            fetched.append(waiting.pop(0)[1])
        if not running:
            join()
        now += steps[len(running)] + price * sum(attended for attended, _ in running.values())
        for index in list(running):
            running[index][0] += 1
            running[index][1] -= 1
            if not running[index][1]:
                finished[index] = now
                del running[index]
    assert [finished[i] for i in range(12)] == log.finished


def first_gap(way: Crossing, prompt: int) -> tuple[int, int, int]:
    """(gap between the first two tokens, decode step, prompt's step) of a request that is alone."""
    case = split(table([0], [prompt], [3]), way=way, max_num_batched_tokens=4096)
    free = split(table([0], [prompt], [3]), max_num_batched_tokens=4096).play()
    log = case.play().log
    step = min(gap_counts(free))
    second_gap = step + step_model(case.decode.deployment).sequences.token_ticks
    return log.finished[0] - log.first_token[0] - second_gap, step, log.first_token[0]


def test_a_transfer_after_the_prompt_is_exposed_in_full() -> None:
    prompt, rate, setup = 1024, 10e9, 2 * MS
    size = 1024 * 131072
    gap, step, _ = first_gap(crossing(rate, setup_ticks=setup), prompt)
    assert gap == setup + round(size / rate * TICKS_PER_SECOND) + step


def test_layer_by_layer_only_the_last_layer_is_exposed_where_the_link_keeps_up() -> None:
    """Exposed: max(t, c + L·t - T) for a transfer of t and a computation of c = T / L per layer."""
    size, layers = 1024 * 131072, 32
    for rate in (1e12, 50e9, 10e9, 2e9):
        gap, step, prefill = first_gap(crossing(rate, mode="layerwise", layers=layers), 1024)
        last = size // layers
        before = prefill // layers + round((size - last) / rate * TICKS_PER_SECOND)
        exposed = max(prefill, before) + round(last / rate * TICKS_PER_SECOND) - prefill
        assert gap == exposed + step
        after, _, _ = first_gap(crossing(rate), 1024)
        assert gap < after


def test_transfers_share_the_ports_of_both_ends() -> None:
    env = simpy.Environment(initial_time=0)
    fabric = Fabric(env, 10.0, 10.0)
    ends = {}

    def move(name: str, size: int, sender: int, receiver: int):
        yield fabric.move(size, sender, receiver)
        ends[name] = env.now / TICKS_PER_SECOND

    # Two leave port 0 and one of them meets a third at port 1; the fourth is alone.
    for name, *route in (("a", 0, 0), ("b", 0, 1), ("c", 1, 1), ("d", 2, 2)):
        env.process(move(name, 100, *route))
    env.run()
    assert ends == {"a": 20.0, "b": 20.0, "c": 20.0, "d": 10.0}


def test_a_wide_port_serves_several_narrow_ones_at_full_rate() -> None:
    env = simpy.Environment(initial_time=0)
    fabric = Fabric(env, 10.0, 40.0)
    ends = []
    for sender in range(5):
        fabric.move(100, sender, 0).callbacks.append(lambda _: ends.append(env.now / TICKS_PER_SECOND))
    env.run()
    # Five times 10 B/s want 50 of 40 B/s.
    assert ends == [12.5] * 5


def test_a_slow_link_holds_the_prefill_side_up() -> None:
    """KV that has not left keeps its blocks, so later prompts wait for the link."""
    requests = table([0] * 6, [64] * 6, [4] * 6)
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    slow = split(requests, way=crossing(1e7), spare=(1, 10_000), **options).play()
    fast = split(requests, way=crossing(FREE), spare=(1, 10_000), **options).play()
    roomy = split(requests, way=crossing(1e7), **options).play()
    moved = round(64 * 131072 / 1e7 * TICKS_PER_SECOND)
    assert fast.log.first_token[5] < moved
    assert roomy.log.first_token[5] <= fast.log.first_token[5]
    assert slow.log.scheduled[5] >= 5 * moved


def test_a_full_decode_pool_holds_the_prefill_side_up_and_lets_go_in_order() -> None:
    requests = table([0] * 6, [64] * 6, [40] * 6)
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    case = split(requests, spare=(1, 0), **options)
    result = case.play()
    assert result.transfers.room_ticks > 0
    assert result.log.finished == sorted(result.log.finished)
    assert result.log.scheduled[5] >= result.log.finished[2]


def test_what_the_decode_side_preempts_it_computes_again() -> None:
    requests = table([0] * 4, [60] * 4, [60] * 4)
    result = split(requests, spare=(100, 9), max_num_batched_tokens=64, max_num_seqs=8).play()
    first, second = result.records
    assert second.preemptions > 0
    assert first.preemptions == 0
    assert sum(step[1] for step in second.prompts) > 0
    assert result.transfers.count == 4


def test_the_decode_side_fetches_only_what_it_lacks() -> None:
    """A second prompt that shares a prefix with one decoded before brings only the rest."""
    hashes = (tuple(range(8)), tuple(range(8)))
    requests = table([0, 10_000 * MS], [130, 130], [5, 5], hashes=hashes)
    result = split(requests, max_num_batched_tokens=256).play()
    block = 16 * 131072
    assert result.transfers.size_bytes == 9 * block + 1 * block
    unshared = split(replace(requests, prefix_hashes=None), max_num_batched_tokens=256).play()
    assert unshared.transfers.size_bytes == 18 * block


def test_compressed_kv_moves_as_encoded_bytes() -> None:
    requests = table([0], [1024], [3])
    sizes = {
        name: split(requests, strategy=name, max_num_batched_tokens=4096).play().transfers.size_bytes
        for name in ("native", "fp8", "snapkv(budget_tokens=256,window_size=64)")
    }
    assert sizes["native"] == 1024 * 131072
    assert sizes["fp8"] * 2 == sizes["native"]
    assert sizes["snapkv(budget_tokens=256,window_size=64)"] * 4 == sizes["native"]


def test_prompts_of_a_conversation_find_their_prefix_by_routing() -> None:
    """The prefill side keeps prompts, not answers: a turn finds all that the turn before it was asked."""
    requests = sessions(4, 4)
    hits = {}
    for routing in ("round_robin", "prefix_aware"):
        result = split(requests, prefills=2, routing=routing, max_num_batched_tokens=512).play()
        hits[routing] = sum(record.cached_prompt_tokens for record in result.records[:2])
    before = [prompt - 96 for prompt in requests.prompt_tokens.tolist() if prompt > 64]
    assert hits["prefix_aware"] == sum(tokens // 16 * 16 for tokens in before)
    assert hits["prefix_aware"] > hits["round_robin"]


@given(
    prompt=st.integers(1, 600),
    output=st.integers(2, 40),
    mode=st.sampled_from(("after_prefill", "layerwise")),
    rates=st.lists(st.sampled_from((1e7, 3e8, 2e9, 5e10, FREE)), min_size=2, max_size=2).map(sorted),
    setups=st.lists(st.sampled_from((0, MS, 30 * MS)), min_size=2, max_size=2).map(sorted),
    ahead=AHEAD,
)
@settings(SETTINGS, max_examples=40)
def test_a_faster_link_never_ends_a_request_later(prompt, output, mode, rates, setups, ahead) -> None:
    """Of a request that is alone; neither does a shorter set-up. Its first token does not depend on the link."""

    def log(rate: float, setup_ticks: int):
        way = crossing(rate, mode=mode, setup_ticks=setup_ticks)
        return split(table([0], [prompt], [output]), way=way, async_scheduling=ahead).play().log

    slow, fast, quick = log(rates[0], setups[1]), log(rates[1], setups[1]), log(rates[0], setups[0])
    assert fast.finished[0] <= slow.finished[0]
    assert quick.finished[0] <= slow.finished[0]
    assert slow.first_token == fast.first_token == quick.first_token
