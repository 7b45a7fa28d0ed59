"""Pipelines, data parallel ranks that share experts, and spread experts: exactness, sharing, limits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_invariants import audited, check_schedulers
from sim_cases import MS, build_case, busy_ticks, gap_counts, table

from kvsim.catalog import resolve
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.engine_memory import rank_weight_bytes, replicated_bytes
from kvsim.errors import IncompatibleScenario
from kvsim.explain import explain_deployment
from kvsim.memory import plan_memory
from kvsim.parallelism import LANE_GRAIN, Parallelism
from kvsim.pool import block_bytes
from kvsim.requests import RequestTable
from kvsim.scenario import Scenario
from kvsim.sim.lanes import Piece, deal, fill
from kvsim.sim.run import RunResult
from kvsim.simulate import estimate, simulate
from kvsim.units import TICKS_PER_SECOND

MOE, DENSE = "qwen3-30b-a3b", "llama-3.1-8b"
WAYS = (
    {"pipeline_parallel_size": 2},
    {"pipeline_parallel_size": 3, "tensor_parallel_size": 2},
    {"data_parallel_size": 4},
    {"data_parallel_size": 2, "tensor_parallel_size": 2, "enable_expert_parallel": True},
)


def deployed(model: str = MOE, *, strategy: str = "native", device: str = "h100-sxm", **fields: object) -> Deployment:
    engine = {"max_num_batched_tokens": 64, "max_num_seqs": 6, **fields.pop("engine", {})}  # type: ignore[dict-item]
    document = {
        "model": model,
        "device": device,
        "workload": "chat",
        "compression": strategy,
        "engine": engine,
        **fields,
    }
    return resolve(Scenario.model_validate(document))


def step_of(deployment: Deployment, edge: Edge = Edge.CENTRAL) -> StepModel:
    return StepModel(deployment, build_rates(deployment.device, deployment.priors, edge))


def play(deployment: Deployment, requests: RequestTable, *, spare_blocks: int = 40, coalesce: bool = True) -> RunResult:
    case = build_case(deployment, requests, spare_blocks=spare_blocks)
    with audited() as schedulers:
        result = case.play(coalesce=coalesce)
    check_schedulers(schedulers)
    return result


@st.composite
def small_tables(draw: st.DrawFn) -> RequestTable:
    count = draw(st.integers(1, 12))
    lengths = st.lists(st.integers(1, 90), min_size=count, max_size=count)
    arrivals = sorted(draw(st.lists(st.integers(0, 200), min_size=count, max_size=count)))
    return table([at * MS for at in arrivals], draw(lengths), draw(lengths))


@settings(max_examples=150, deadline=None)
@given(
    way=st.sampled_from(WAYS), requests=small_tables(), spare_blocks=st.integers(0, 30),
    strategy=st.sampled_from(("native", "fp8", "snapkv", "kivi-4")),
)  # fmt: skip
def test_lanes_coalesced_equal_lanes_step_by_step(way, requests, spare_blocks, strategy):
    deployment = deployed(strategy=strategy, **way)
    runs = [play(deployment, requests, spare_blocks=spare_blocks, coalesce=coalesce) for coalesce in (True, False)]
    logs = [(one.log.scheduled, one.log.first_token, one.log.finished, one.log.rejected) for one in runs]
    assert logs[0] == logs[1]
    assert gap_counts(runs[0]) == gap_counts(runs[1])
    for left, right in zip(runs[0].records, runs[1].records, strict=True):
        assert left.prefill == right.prefill
        assert left.decode.total == right.decode.total
    served = [i for i in range(len(requests)) if not runs[0].log.rejected[i]]
    processed = sum(record.prefilled_tokens for record in runs[0].records)
    recomputed = sum(record.recomputed_tokens + len(record.gaps) for record in runs[0].records)
    assert processed == int(requests.prompt_tokens[served].sum()) + recomputed
    # The time split adds up to the time that the engine was busy.
    spans = sorted((runs[0].log.arrived[i], runs[0].log.finished[i]) for i in served)
    until = total = 0
    for start, end in spans:
        total += max(0, end - max(start, until))
        until = max(until, end)
    assert busy_ticks(runs[0]) == [total]


@pytest.mark.parametrize("model", [MOE, DENSE])
def test_one_lane_is_the_plain_engine(model):
    plain = deployed(model)
    spelled = deployed(model, pipeline_parallel_size=1, data_parallel_size=1, enable_expert_parallel=False)
    requests = table([0, 0, 5 * MS, 9 * MS], [30, 200, 8, 60], [20, 3, 40, 9])
    results = [play(one, requests, spare_blocks=100) for one in (plain, spelled)]
    assert results[0].log == results[1].log
    assert results[0].records == results[1].records


def test_a_lone_request_through_a_pipeline_takes_all_layers_and_the_sends():
    """No stage of a pipeline is skipped: one sequence gains nothing from stages, and pays for passing through them."""
    whole, staged = (step_of(deployed(DENSE, pipeline_parallel_size=stages)) for stages in (1, 4))
    sends = staged.communication.token_seconds(1.0)
    head = staged.head_seconds(1) - whole.head_seconds(1)
    for read in (lambda step: decode_split(step, 1, 4000, 100), lambda step: prefill_split(step, 40)):
        apart = total_seconds(read(staged)) - total_seconds(read(whole))
        assert apart == pytest.approx(sends + (head if read(whole)["weights"] < 1 else 0), rel=0.5, abs=2e-5)
    alone, shared = (decode_split(step, 1, 60_000, 0)["attention"] for step in (whole, staged))
    assert shared == pytest.approx(alone, rel=1e-3)


def test_many_sequences_gain_from_stages_and_ranks():
    """Each lane carries its part of the batch, so that a turn of many is much shorter than one device's step."""
    one = total_seconds(decode_split(step_of(deployed(DENSE)), 256, 2000, 0))
    four = total_seconds(decode_split(step_of(deployed(DENSE, pipeline_parallel_size=4)), 256, 2000, 0))
    assert four < 0.6 * one
    dense_ranks = deployed(DENSE, data_parallel_size=4)
    assert (dense_ranks.replicas, dense_ranks.lanes, dense_ranks.num_devices) == (4, 1, 4)
    assert any("each rank is a replica" in note for note in dense_ranks.notes)


@pytest.mark.parametrize("expert", [False, True])
def test_ranks_hold_the_whole_model_between_them(expert):
    for tensor, data, stages in ((1, 1, 1), (2, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 4)):
        model = deployed().model
        parallel = Parallelism(tensor, stages, data, expert)
        held = rank_weight_bytes(model, parallel) * parallel.num_devices
        shared_by_data_ranks = (model.weight_bytes - model.expert_bytes) * (data - 1)
        whole_on_each = replicated_bytes(model, tensor) * (tensor - 1) * data
        assert held == pytest.approx(model.weight_bytes + shared_by_data_ranks + whole_on_each, rel=1e-9)


@given(tensor=st.sampled_from((1, 2, 4, 8)), stages=st.integers(1, 8), data=st.integers(1, 16), expert=st.booleans())
def test_more_ranks_never_hold_more_bytes_each(tensor, stages, data, expert):
    model = deployed().model
    here = rank_weight_bytes(model, Parallelism(tensor, stages, data, expert))
    for more in (Parallelism(2 * tensor, stages, data, expert), Parallelism(tensor, stages + 1, data, expert)):
        assert rank_weight_bytes(model, more) <= here * (1 + 1e-12)
    assert rank_weight_bytes(model, Parallelism(tensor, stages, data + 1, expert)) <= here * (1 + 1e-12)


def test_the_pool_of_a_stage_and_of_a_group():
    """A stage of half the layers keeps half the KV; ranks of a group have a pool each."""
    plain, staged, ranks = deployed(), deployed(pipeline_parallel_size=2), deployed(data_parallel_size=4)
    assert block_bytes(staged) * 2 == block_bytes(plain)
    assert block_bytes(ranks) == block_bytes(plain)
    blocks = {name: plan_memory(one, block_bytes(one)).num_blocks for name, one in
              (("plain", plain), ("staged", staged), ("ranks", ranks))}  # fmt: skip
    assert blocks["staged"] > 2 * blocks["plain"]
    assert blocks["ranks"] > blocks["plain"]
    assert ranks.max_running == 4 * plain.max_running
    assert ranks.step_tokens == 4 * plain.step_tokens == 2 * staged.step_tokens


@given(batch=st.integers(1, 600), lanes=st.integers(2, 16))
def test_the_context_part_is_that_of_the_fullest_lane(batch, lanes):
    parallel = Parallelism(data=lanes)
    fullest = parallel.sequences_per_lane(batch)
    charged = batch * parallel.lane_factor(batch) / (LANE_GRAIN * lanes)
    assert fullest <= charged <= fullest + batch / (LANE_GRAIN * lanes)
    assert Parallelism().lane_factor(batch) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("edge", list(Edge))
def test_prices_rise_with_tokens_and_fall_with_bandwidth(way, edge):
    deployment = deployed(**way)
    step, device = step_of(deployment, edge), deployment.device
    rows = np.arange(1.0, 3000.0)
    terms = step.token_terms(rows)
    for part in (terms.weights_s, terms.communication_s, terms.overhead_s):
        assert (np.diff(part) >= -1e-12).all()
    assert (np.diff(step.gather_seconds(rows)) >= 0).all()
    assert (np.diff(step.sampling_seconds(rows)) >= 0).all()
    for field in ("memory_bandwidth", "scale_up_link"):
        fact = getattr(device, field)
        faster = device.model_copy(update={field: fact.model_copy(update={"value": 2 * fact.value})})
        quick = step_of(replace(deployment, device=faster, calibration=None), edge)
        slow = step_of(replace(deployment, calibration=None), edge)
        for batch in (1, 7, 64):
            assert total_seconds(decode_split(quick, batch, 3000, 9)) <= total_seconds(
                decode_split(slow, batch, 3000, 9)
            )


def test_slices_of_experts_do_the_work_of_the_whole_layer():
    """FLOPs over all ranks are those of one device, whichever way the experts are shared."""
    whole = step_of(deployed())
    rows = 64
    for way in WAYS[1:]:
        deployment = deployed(**way)
        step, parallel = step_of(deployment), deployment.parallelism
        for one, part in zip(whole.gemms, step.gemms, strict=True):
            if not one.gemm.num_experts:
                continue
            done = parallel.expert_ranks * float(part.gemm.flops(rows))
            assert done == pytest.approx(parallel.data * float(one.gemm.flops(rows)), rel=0.02)


def test_pipelines_fill_micro_batches_in_order_and_ranks_get_whole_prompts():
    pieces = [Piece(100, 0, ends=True, compress_ticks=5), Piece(30, 10, ends=True), Piece(20, 0, ends=False)]
    filled = fill(pieces, 4, 60)
    assert [[piece.tokens for piece in lane] for lane in filled] == [[60], [40, 20], [10, 20]]
    assert [piece.context_tokens for lane in filled for piece in lane] == [0, 60, 10, 30, 0]
    assert [piece.compress_ticks for lane in filled for piece in lane] == [0, 5, 0, 0, 0]
    assert sum(piece.ends for lane in filled for piece in lane) == 2
    dealt = deal(pieces, 2, 8)
    assert [[piece.tokens for piece in lane] for lane in dealt] == [[100], [30, 20]]
    assert deal(pieces[:1], 8, 1) == [pieces[:1]]
    assert [len(lane) for lane in deal([Piece(90, 0, ends=True), *[Piece(1, 0, ends=True)] * 5], 2, 3)] == [3, 3]


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(1, 200), min_size=1, max_size=9), lanes=st.integers(2, 8), room=st.integers(1, 90))
def test_dealing_loses_no_token(tokens, lanes, room):
    pieces = [Piece(count, 0, ends=True) for count in tokens]
    seats = -(-len(tokens) // lanes)
    assert max(len(lane) for lane in deal(pieces, lanes, seats)) <= seats
    for dealt in (deal(pieces, lanes, seats), deal(pieces, lanes, 0), fill(pieces, lanes, room)):
        assert len(dealt) <= lanes
        assert sum(piece.tokens for lane in dealt for piece in lane) == sum(tokens)
        assert sum(piece.ends for lane in dealt for piece in lane) == len(tokens)


def test_an_exchange_grows_with_ranks_across_nodes():
    """Sixteen ranks on two nodes of eight talk over the network; their exchange is slower than eight ranks' on one."""
    near, far = (step_of(deployed(data_parallel_size=ranks, enable_expert_parallel=True)) for ranks in (8, 16))
    assert far.communication.exchange_seconds(512.0) > 2 * near.communication.exchange_seconds(512.0)
    for backend in ("deepep_low_latency", "deepep_high_throughput"):
        step = step_of(deployed(data_parallel_size=8, enable_expert_parallel=True, engine={"all2all_backend": backend}))
        assert step.communication.exchange_seconds(256.0) > step.communication.exchange_seconds(1.0) > 0


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (DENSE, {"enable_expert_parallel": True}, "enable_expert_parallel: llama-3.1-8b has no experts"),
        (DENSE, {"pipeline_parallel_size": 40}, "pipeline_parallel_size: 40 stages are more than the 32 layers"),
        (MOE, {"data_parallel_size": 256, "enable_expert_parallel": True}, "256 ranks .* more than the 128 experts"),
        (MOE, {"data_parallel_size": 2, "pipeline_parallel_size": 2}, "not modelled together"),
        (MOE, {"data_parallel_size": 2, "engine": {"kv_offloading_size": "8 GiB"}}, "engine.kv_offloading_size"),
        (MOE, {"data_parallel_size": 2, "engine": {"kv_tiers": [{"kind": "recompute"}]}}, "engine.kv_tiers"),
        (MOE, {"pipeline_parallel_size": 2, "engine": {"kind": "llamacpp"}}, "engine.kind: llamacpp"),
        (MOE, {"pipeline_parallel_size": 2, "device": "apple-m4-max"}, "needs a link between devices"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_the_reason(model, fields, message):
    with pytest.raises(IncompatibleScenario, match=message):
        deployed(model, **fields)


def test_a_turn_of_a_pipeline_takes_its_largest_stage_as_often_as_it_has_stages():
    assert Parallelism(pipeline=4).turn_stretch(32) == 1.0
    assert Parallelism(pipeline=3).turn_stretch(32) == pytest.approx(33 / 32)
    assert Parallelism(pipeline=3).stage_share(32) == pytest.approx(11 / 32)
    assert TICKS_PER_SECOND == 10**12


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 5, 30])
def test_what_is_explained_adds_up_to_the_turn(way, batch):
    deployment = deployed(**way, engine={"max_num_batched_tokens": 2048, "max_num_seqs": 32})
    plan = plan_memory(deployment, block_bytes(deployment))
    terms = explain_deployment(deployment, plan, 5000, 100, batch).terms
    step = step_of(deployment)
    for phase, split in (("decode", decode_split(step, batch, 5000, 100)), ("prefill", prefill_split(step, 5000))):
        told = sum(term.value for term in terms if term.phase == phase)
        assert told == pytest.approx(total_seconds(split), rel=1e-9)
    held = sum(term.value for term in terms if term.phase == "memory")
    assert held == pytest.approx(deployment.device.capacity_bytes, rel=1e-12)


@pytest.mark.parametrize("way", [{}, *WAYS])
def test_the_closed_form_is_near_the_simulation(way):
    arrivals = {"kind": "poisson", "request_rate": 3.0}
    lengths = {"input_len": {"kind": "constant", "tokens": 1000}, "output_len": {"kind": "constant", "tokens": 200}}
    scenario = Scenario.model_validate(
        {
            "model": MOE, "device": "h100-sxm", "bands": False, **way,
            "workload": {"kind": "synthetic", "num_prompts": 300, "arrivals": arrivals, **lengths},
        }
    )  # fmt: skip
    played, told = simulate(scenario), estimate(scenario)
    assert told.latency.tpot.mean_s.value == pytest.approx(played.latency.tpot.mean_s.value, rel=0.15)
    assert told.latency.ttft.mean_s.value == pytest.approx(played.latency.ttft.mean_s.value, rel=0.35)
    assert told.cost.usd_per_hour.value == played.cost.usd_per_hour.value
    devices = scenario.num_devices
    assert played.cost.usd_per_hour.value == pytest.approx(devices * played.cost.price.usd_per_device_hour)
