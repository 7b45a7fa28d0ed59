"""Scenarios with two pools, from their keys to the report."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kvsim.documents import validate
from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError, UnknownName
from kvsim.report import Report
from kvsim.scenario import Scenario
from kvsim.scenario_file import build_scenario, load_scenario
from kvsim.simulate import compare, estimate, explain, simulate

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "disaggregated-h100.yaml"
BASE: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "device": "h100-sxm",
    "workload": {
        "kind": "synthetic", "num_prompts": 40, "input_len": {"kind": "constant", "tokens": 1000},
        "output_len": {"kind": "constant", "tokens": 50}, "arrivals": {"kind": "constant", "request_rate": 4.0},
    },
}  # fmt: skip


def scenario(split: dict[str, Any] | None = None, **changes: Any) -> Scenario:
    document = {**BASE, **changes, "disaggregation": {"link": "infiniband-ndr-400", **(split or {})}}
    return build_scenario(document, [], "here", require_units=False)


@cache
def plain() -> Report:
    return simulate(scenario())


def test_both_pools_and_the_transfers_are_reported() -> None:
    report = plain()
    section = report.disaggregation
    prefill, decode = section.pools
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert section.transfer.transfers == report.counts.completed == 40
    assert section.transfer.bytes_per_transfer == 63 * 16 * 131072
    assert 0 < section.transfer.exposed_mean_s.low < section.transfer.exposed_mean_s.high
    assert section.transfer.exposed_mean_s.value == pytest.approx(
        section.transfer.room_wait_mean_s.value + section.transfer.transfer_mean_s.value
    )
    assert prefill.utilization.value < decode.utilization.value
    assert sum(terms.size_bytes for terms in prefill.memory) == pytest.approx(80 * 2**30)
    assert report.cost.usd_per_hour.value == prefill.usd_per_hour.value + decode.usd_per_hour.value
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_first_gap_holds_the_exposed_transfer() -> None:
    slow = simulate(scenario({"link": {"bandwidth": 1e9, "latency_s": 0.01}}, bands=False))
    free = simulate(scenario({"link": {"bandwidth": 1e30}}, bands=False))
    assert slow.latency.ttft.mean_s == free.latency.ttft.mean_s
    moved_s = 0.01 + 63 * 16 * 131072 / 1e9
    assert slow.disaggregation.transfer.transfer_mean_s.value == pytest.approx(moved_s)
    assert free.disaggregation.transfer.transfer_mean_s.value == 0
    assert slow.latency.e2el.mean_s.value - free.latency.e2el.mean_s.value == pytest.approx(moved_s, rel=0.2)


def test_prompts_pay_for_their_pool() -> None:
    report = simulate(scenario({"prefill": {"replicas": 3}}, bands=False))
    cost = report.cost
    bill = cost.usd_per_hour.value * report.duration_s.value / 3600
    assert cost.usd_per_million_input_tokens.value * 40 * 1000 / 1e6 == pytest.approx(bill * 3 / 4)
    assert cost.usd_per_million_output_tokens.value * 40 * 50 / 1e6 == pytest.approx(bill / 4)


def test_pools_of_different_devices_and_sizes() -> None:
    one = scenario(
        {"prefill": {"device": "h200-sxm", "tensor_parallel_size": 2}, "decode": {"replicas": 2}}, bands=False
    )
    report = simulate(one)
    prefill, decode = report.disaggregation.pools
    assert (prefill.device, prefill.tensor_parallel_size, decode.device) == ("h200-sxm", 2, "h100-sxm")
    assert one.num_devices == 4
    assert report.provenance.device == "h200-sxm (prefill) and h100-sxm (decode)"
    assert prefill.num_blocks > decode.num_blocks
    assert report.latency.ttft.mean_s.value < plain().latency.ttft.mean_s.value


def test_ports_per_node_share_what_ports_per_device_have_each() -> None:
    per_device, per_node = (
        simulate(scenario({"ports": ports, "link": {"bandwidth": 1e9}}, tensor_parallel_size=2, bands=False))
        for ports in ("device", "node")
    )
    ratio = (
        per_node.disaggregation.transfer.transfer_mean_s.value
        / per_device.disaggregation.transfer.transfer_mean_s.value
    )
    assert ratio == pytest.approx(2)


def test_a_pool_s_engine_keeps_what_it_does_not_set() -> None:
    one = scenario({"decode": {"engine": {"max_num_seqs": 7}}}, engine={"max_num_batched_tokens": 512})
    merged = one.disaggregation.decode.merged(one.engine)
    assert (merged.max_num_seqs, merged.max_num_batched_tokens) == (7, 512)
    again = Scenario.model_validate_json(one.model_dump_json())
    assert again.disaggregation.decode.merged(again.engine) == merged
    assert again.fingerprint() == one.fingerprint()


def test_kv_in_transit_can_be_encoded_and_that_is_named() -> None:
    report = simulate(scenario({"transfer_compression": "fp8"}, bands=False))
    transfer = report.disaggregation.transfer
    assert transfer.is_lossy
    assert transfer.encoding == "fp8"
    assert transfer.wire_bytes * 2 == plain().disaggregation.transfer.wire_bytes
    assert any("loses precision" in note for note in report.provenance.notes)
    assert report.quality == simulate(scenario(compression="fp8", bands=False)).quality
    given = simulate(
        scenario({"transfer_compression": {"encoding": "fp8", "coder_bytes_per_s": 1e9}}, bands=False)
    ).disaggregation.transfer
    assert given.exposed_mean_s.value > 2 * 63 * 16 * 131072 / 1e9
    exact = {"encoding": "lossless", "coder_bytes_per_s": 1e11}
    report = simulate(scenario({"transfer_compression": exact}, bands=False))
    assert any("KV bytes of lossless depend on the data" in note for note in report.provenance.notes)
    assert report.disaggregation.transfer.is_lossy is False
    assert not any("loses precision" in note for note in report.provenance.notes)
    assert scenario({"transfer_compression": "none"}).disaggregation.transfer_compression is None


@pytest.mark.parametrize("mode", ["after_prefill", "layerwise"])
def test_the_estimate_agrees_where_nobody_queues(mode: str) -> None:
    workload = {**BASE["workload"], "arrivals": {"kind": "constant", "request_rate": 0.5}}
    split = {"transfer": mode, "link": {"bandwidth": 2e9, "latency_s": 0.003}}
    played, closed = (answer(scenario(split, workload=workload, bands=False)) for answer in (simulate, estimate))
    for name in ("ttft", "tpot", "e2el"):
        value = getattr(played.latency, name).mean_s.value
        assert getattr(closed.latency, name).mean_s.value == pytest.approx(value, rel=0.01), name
    section = closed.disaggregation.transfer
    assert section.exposed_mean_s.value == pytest.approx(played.disaggregation.transfer.exposed_mean_s.value, rel=0.01)
    assert section.room_wait_mean_s.value is None


def test_the_estimate_knows_which_pool_is_the_narrow_one() -> None:
    workload = {**BASE["workload"], "arrivals": {"kind": "constant", "request_rate": 1000.0}}
    narrow = estimate(scenario(workload=workload, bands=False))
    wide = estimate(scenario({"prefill": {"replicas": 2}}, workload=workload, bands=False))
    assert narrow.disaggregation.pools[0].utilization.value == pytest.approx(1.0)
    ratio = wide.throughput.request_throughput.value / narrow.throughput.request_throughput.value
    assert ratio == pytest.approx(2.0, rel=0.01)
    link = estimate(scenario({"link": {"bandwidth": 1e8}}, workload=workload, bands=False))
    assert link.throughput.request_throughput.value == pytest.approx(1e8 / (63 * 16 * 131072), rel=0.01)


def test_explain_shows_the_way_between_the_pools() -> None:
    terms = [term for term in explain(scenario({"transfer_compression": "fp8"})).terms if term.phase == "transfer"]
    assert [term.name for term in terms] == ["KV of one prompt", "set-up", "moving", "coding"]
    assert all(term.source for term in terms)


def test_strategies_compare_over_two_pools() -> None:
    rows = compare(scenario(bands=False), ["native", "fp8", "snapkv:0.5"])
    moved = [row.report.disaggregation.transfer.wire_bytes for row in rows]
    assert moved[0] > moved[1]
    assert moved[0] > moved[2]


DRAFTS = {"method": "ngram", "num_speculative_tokens": 1, "acceptance_rate": 0.5}
REFUSED = [
    ({}, {"replicas": 2}, InvalidSpec, "disaggregation.prefill.replicas"),
    ({"link": "infiniband"}, {}, UnknownName, "disaggregation.link: unknown link 'infiniband'"),
    ({"decode": {"engine": {"block_size": 32}}}, {}, IncompatibleScenario, "blocks of 16 tokens"),
    ({"prefill": {"engine": {"kv_offloading_size": 2**34}}}, {}, IncompatibleScenario, "prefill.engine.kv_offloading"),
    ({}, {"engine": {"compression_stream": "side"}}, IncompatibleScenario, "compression_stream: side"),
    ({}, {"engine": {"kind": "llamacpp"}}, IncompatibleScenario, "handing KV over is modelled for vllm"),
    ({}, {"engine": {"scheduling_policy": "priority"}}, IncompatibleScenario, "scheduling_policy: not modelled"),
    ({}, {"engine": {"speculative_config": DRAFTS}}, IncompatibleScenario, "speculative_config: not modelled"),
    ({}, {"pipeline_parallel_size": 2}, IncompatibleScenario, "pipeline stages"),
    ({"decode": {"engine": {"request_overhead_s": 0.1}}}, {}, IncompatibleScenario, "one front end"),
    ({"prefill": {"device": "h1000"}}, {}, UnknownName, "disaggregation.prefill"),
    ({"transfer_compression": "fp8"}, {"compression": "fp8"}, IncompatibleScenario, "is stored as fp8"),
    ({"transfer_compression": "snapkv"}, {}, InvalidSpec, "is not an encoding"),
    ({"transfer_compression": "cla-2"}, {}, IncompatibleScenario, "'cla-2' is an architecture"),
    ({"transfer_compression": "kivi-2"}, {}, IncompatibleScenario, "newest tokens native"),
    ({"transfer_compression": "lossless"}, {}, IncompatibleScenario, "coder_bytes_per_s: no prior .* codes lossless"),
    ({"transfer_compression": "fp8"}, {"compression": "cachegen"}, IncompatibleScenario, "cachegen is decoded as a wh"),
]


@pytest.mark.parametrize(("split", "changes", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_with_its_reason(split, changes, error: type[KvsimError], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(scenario(split, **changes))


def test_a_link_in_a_file_needs_units() -> None:
    with pytest.raises(InvalidSpec, match="has no unit"):
        validate(Scenario, {**BASE, "disaggregation": {"link": {"bandwidth": 5}}}, "x.yaml", require_units=True)


def test_the_reading_of_the_example_holds() -> None:
    """What docs/serving-disaggregation.md says of two devices both ways."""

    def played(*changes: str) -> Report:
        return simulate(load_scenario(EXAMPLE, ["bands=false", *changes]))

    split, layered = played(), played("disaggregation.transfer=layerwise")
    whole = played("disaggregation=null", "replicas=2")
    assert split.latency.itl.p99_s.value * 5 < whole.latency.itl.p99_s.value
    assert split.latency.ttft.mean_s.value > whole.latency.ttft.mean_s.value
    assert split.throughput.slo_attainment.value > whole.throughput.slo_attainment.value
    exposed = [one.disaggregation.transfer.exposed_mean_s.value for one in (split, layered)]
    assert exposed[1] * 20 < exposed[0]
    busy = ["workload.arrivals.request_rate=18"]
    split, whole = played(*busy), played(*busy, "disaggregation=null", "replicas=2")
    assert 0.8 < split.disaggregation.pools[0].utilization.value < 0.95
    assert split.latency.ttft.mean_s.value > 1 > whole.latency.ttft.p99_s.value
    assert whole.latency.tpot.mean_s.value > 0.02 > split.latency.tpot.p99_s.value
