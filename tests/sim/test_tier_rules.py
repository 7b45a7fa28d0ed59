"""Tiers that cannot be priced or make no sense are refused with the field, and what they did is in the report."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from kvsim.batch.rows import columns
from kvsim.catalog import resolve
from kvsim.compression import parse_compression
from kvsim.cost.priors import Edge
from kvsim.errors import IncompatibleScenario, InvalidSpec, ScenarioError, UnknownName
from kvsim.metrics import METRIC_BY_TAG, read
from kvsim.pool import block_bytes
from kvsim.rendering.terminal import report_view
from kvsim.report import Report
from kvsim.scenario import Scenario
from kvsim.simulate import estimate, simulate
from kvsim.specs.engine import EngineSpec
from kvsim.tiers import Coding, plan_tiers
from kvsim.units import GIBI

HOST = {"kind": "host", "size": 4 * GIBI}
NVME = {"kind": "nvme", "size": 90 * GIBI, "read_bandwidth": 7e9, "write_bandwidth": 5e9, "latency_s": 1e-4}
RECOMPUTE = {"kind": "recompute"}
CHAT: dict[str, Any] = {
    "kind": "synthetic",
    "num_prompts": 160,
    "input_len": {"kind": "uniform", "min_tokens": 200, "max_tokens": 1200},
    "output_len": {"kind": "uniform", "min_tokens": 20, "max_tokens": 200},
    "arrivals": {"kind": "poisson", "request_rate": 4.0},
    "conversations": {"turns": {"kind": "constant", "tokens": 6}, "think_time_s": 20.0},
}


def scenario(*tiers: dict[str, Any], device: str = "h100-sxm", compression: str = "native", **engine: Any) -> Scenario:
    options = {"num_gpu_blocks_override": 1500, "max_model_len": 12000, **engine}
    return Scenario(
        model="llama-3.1-8b",
        device=device,
        workload=CHAT,
        compression=compression,
        engine=EngineSpec.model_validate({**options, "kv_tiers": tiers}),
        bands=False,
    )


def coded(name: str, **more: Any) -> dict[str, Any]:
    return {**HOST, "encoding": name, **more}


FAR = {"kind": "remote", "link": "roce-4000"}
A100 = {"device": "a100-sxm-80gb"}
REFUSED = [
    ([HOST], {"kv_offloading_size": GIBI}, InvalidSpec, r"kv_offloading_size: it is short for one host tier"),
    ([RECOMPUTE, HOST], {}, InvalidSpec, r"kv_tiers\[0\]: recompute has every block.*put it last"),
    ([HOST], {"device": "apple-m4"}, IncompatibleScenario, r"engine\.kv_tiers: apple-m4 has no figure for a host"),
    ([coded("kvct")], {}, UnknownName, r"kv_tiers\[0\]\.encoding: unknown encoding of a tier 'kvct'.*kvtc"),
    ([coded("snapkv")], {}, InvalidSpec, r"kv_tiers\[0\]\.encoding: 'snapkv' drops or selects"),
    ([coded("mla")], {}, InvalidSpec, r"kv_tiers\[0\]\.encoding: 'mla' is an architecture"),
    ([coded("xkv")], {}, InvalidSpec, r"'xkv' stores tokens by what the whole prompt holds, and blocks are coded one"),
    ([HOST, FAR], {}, UnknownName, r"kv_tiers\[1\]\.link: unknown link 'roce-4000'.*roce-400"),
    ([coded("cachegen")], {}, IncompatibleScenario, r"kv_tiers\[0\]\.encode_rate: no published figure"),
    ([coded("kvtc")], A100, IncompatibleScenario, r"encode_rate.*kvtc runs on a100"),
    ([coded("kvtc")], {"compression": "fp8"}, IncompatibleScenario, r"of a 16-bit cache.*give .*ratio"),
    ([coded("lossless", coder="host")], {}, IncompatibleScenario, r"encode_rate.*a host's processors"),
    ([coded("kivi-4+zstd")], {}, IncompatibleScenario, r"encode_rate: no published figure.*codes zstd"),
    ([coded("rans")], {}, InvalidSpec, r"native KV has none"),
    ([HOST], {"compression": "kvtc"}, IncompatibleScenario, r"compression: kvtc is decoded as a whole.*kv_tiers"),
    ([HOST], {"compression": "fp8+rans"}, IncompatibleScenario, r"compression: fp8\+rans is decoded as a whole"),
    ([coded("nvfp4", coder="host")], {}, IncompatibleScenario, r"encode_rate.*host's processors code nvfp4"),
    ([coded("nvfp4", ratio=3.0)], {}, InvalidSpec, r"ratio: the layout of nvfp4 gives it"),
    ([coded("fp8")], {"compression": "kivi-4"}, IncompatibleScenario, r"fp8 takes .*kivi-4"),
    ([{**HOST, "ratio": 2.0}], {}, InvalidSpec, r"kv_tiers\[0\]\.ratio: encoding is 'none'"),
]


@pytest.mark.parametrize(("tiers", "options", "error", "message"), REFUSED, ids=lambda value: None)
def test_what_makes_no_sense_is_refused(
    tiers: list[dict[str, Any]], options: dict[str, Any], error: type[ScenarioError], message: str
) -> None:
    for answer in (estimate, simulate):
        with pytest.raises(error, match=message):
            answer(scenario(*tiers, **options))


@pytest.mark.parametrize("broken", [{"kind": "tape"}, {"kind": "nvme", "size": 1}, {**HOST, "ratio": 0.5}])
def test_bad_fields_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="kv_tiers"):
        scenario(broken)


@pytest.mark.parametrize(
    ("encoding", "pool", "fold"),
    [("fp8", "native", 2.0), ("nvfp4", "native", 512 / 144), ("nvfp4", "fp8", 256 / 144), ("kvtc", "native", 9.0)],
)
def test_coded_bytes_follow_the_layout_or_the_published_ratio(encoding: str, pool: str, fold: float) -> None:
    deployment = resolve(scenario({**HOST, "encoding": encoding}, compression=pool))
    unit = block_bytes(deployment)
    plan = plan_tiers(deployment, unit, 16, Edge.CENTRAL)
    assert plan is not None
    coding = plan.tiers[0].coding
    assert unit / coding.unit_bytes == pytest.approx(fold, rel=1e-4)
    assert coding.lossy
    assert 0 < coding.hbm_share <= 1


@pytest.mark.parametrize("spelling", ["kvtc:8", "KVTC", "kvtc(target_ratio=8)"])
def test_a_tier_s_kvtc_is_the_strategy_however_it_is_spelled(spelling: str) -> None:
    coded, plain = (resolve(scenario({**HOST, "encoding": name})) for name in (spelling, "kvtc"))
    unit = block_bytes(plain)
    one, other = codings(coded, unit)[0], codings(plain, unit)[0]
    assert (one.unit_bytes, one.encode_s, one.decode_s) == (other.unit_bytes, other.encode_s, other.decode_s)
    group = plain.model.kv_groups[0]
    encoding = parse_compression(spelling).encoding
    priced = encoding.bytes_per_token(group, plain.model.dtype).total_bytes * len(group.layers) * 16
    assert one.unit_bytes == pytest.approx(priced, rel=1e-4)


def test_a_coded_encoding_takes_its_share_and_its_coder_s_time() -> None:
    coded, plain = (
        resolve(scenario({**HOST, "encoding": name})) for name in ("int4_per_token_head+rans", "int4_per_token_head")
    )
    unit = block_bytes(plain)
    one, other = codings(coded, unit)[0], codings(plain, unit)[0]
    rate = parse_compression("int4_per_token_head+rans").stored.rate
    assert rate is not None
    # 64 B of codes and 4 B of scale and zero point in 68.
    assert one.unit_bytes / other.unit_bytes == pytest.approx((64 * rate.value + 4) / 68, rel=1e-3)
    # DietGPU's 250 to 410 GB/s of codes on an A100, as many operations on this device.
    elements = 16 * 32 * 2 * 8 * 128
    assert coded.device.vector_flops is not None
    assert one.decode_s > elements * 30.0 / (coded.device.vector_flops.value / 2)
    assert one.decode_s > other.decode_s
    assert one.lossy


def test_a_report_says_where_bytes_depend_on_the_data() -> None:
    report = estimate(scenario({**HOST, "encoding": "int4_per_token_head+rans"}))
    assert any("depend on the data" in note and "tools/write_kv_rates.py" in note for note in report.provenance.notes)
    plain = estimate(scenario({**HOST, "encoding": "int4_per_token_head"}))
    assert not any("depend on the data" in note for note in plain.provenance.notes)


def test_kvtc_takes_its_published_time() -> None:
    """8 prompts of 8,192 tokens of Mistral-NeMo (40 layers of 8 heads of 128): 379 ms in, 267 ms out on an H100."""
    deployment = resolve(scenario({**HOST, "encoding": "kvtc"}))
    tokens, bytes_per_token = 8 * 8192, 40 * 2 * 8 * 128 * 2
    coding = codings(deployment, tokens * bytes_per_token)[0]
    assert coding.encode_s == pytest.approx(0.379, rel=0.01)
    assert coding.decode_s == pytest.approx(0.267, rel=0.01)


def test_quantising_moves_each_byte_once() -> None:
    deployment = resolve(scenario({**HOST, "encoding": "fp8"}))
    unit = block_bytes(deployment)
    coding = codings(deployment, unit)[0]
    moved_s = 1.5 * unit / deployment.device.bandwidth_bytes_per_s
    assert moved_s < coding.encode_s < 4 * moved_s


def codings(deployment: Any, unit_bytes: int) -> list[Coding]:
    plan = plan_tiers(deployment, unit_bytes, 16, Edge.CENTRAL)
    assert plan is not None
    return [tier.coding for tier in plan.tiers]


def test_edges_bracket_a_coder_s_figures() -> None:
    deployment = resolve(scenario({**HOST, "encoding": "lossless"}))
    sizes, times = [], []
    for edge in (Edge.OPTIMISTIC, Edge.CENTRAL, Edge.PESSIMISTIC):
        plan = plan_tiers(deployment, 10**6, 16, edge)
        assert plan is not None
        sizes.append(plan.tiers[0].coding.unit_bytes)
        times.append(plan.tiers[0].coding.decode_s)
    assert sizes == sorted(sizes)
    assert times == sorted(times)


def test_given_rates_are_of_the_whole_replica() -> None:
    tier = {**HOST, "encoding": "cachegen", "encode_rate": 8e9, "decode_rate": 4e9}
    one = scenario(tier)
    two = one.model_copy(update={"tensor_parallel_size": 2})
    times = []
    for each in (one, two):
        deployment = resolve(each)
        times.append(codings(deployment, block_bytes(deployment))[0].encode_s)
    assert times[0] == pytest.approx(16 * 131072 / 8e9)
    assert times[1] == pytest.approx(times[0]), "half the bytes on each rank, at half the rate"


@pytest.fixture(scope="module")
def tiered() -> Report:
    return simulate(scenario({**HOST, "encoding": "nvfp4"}, NVME, RECOMPUTE, kv_reload="by_cost"))


def test_the_report_adds_up(tiered: Report) -> None:
    use = tiered.tiers
    assert use is not None
    host, nvme = use.tiers
    assert (host.name, host.store, nvme.name, nvme.store) == ("host", "on_compute", "nvme", "on_evict")
    assert host.capacity_bytes == 4 * GIBI
    assert 0 < host.peak_bytes <= host.capacity_bytes
    assert host.hit_tokens > 0
    assert host.evicted_bytes <= host.stored_bytes
    assert nvme.stored_bytes == nvme.demoted_bytes > 0
    found = use.device_hit_tokens + host.hit_tokens + nvme.hit_tokens
    assert use.recompute_tokens is not None
    assert found + use.recompute_tokens <= use.looked_up_tokens
    assert use.device_hit_rate == use.device_hit_tokens / use.looked_up_tokens
    assert use.lossy_tokens == host.hit_tokens
    assert use.chose_load is not None
    assert use.chose_load > 0
    assert use.saved_against_compute_s is not None
    assert use.saved_against_compute_s > 0
    notes = " ".join(tiered.provenance.notes)
    assert "KV loaded from host is lossy (nvfp4)" in notes
    assert f"{use.lossy_tokens:,} prompt tokens were served from lossy reloads: host (nvfp4)" in notes


def test_json_terminal_and_columns_show_the_tiers(tiered: Report) -> None:
    use = tiered.tiers
    assert use is not None
    assert json.loads(tiered.model_dump_json())["tiers"]["tiers"][0]["hit_tokens"] == use.tiers[0].hit_tokens
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(report_view(tiered))
    text = console.export_text()
    assert "KV tiers: " in text
    assert f"{use.tiers[0].hit_tokens:,}" in text
    assert "saved against never loading" in text
    assert read(tiered, METRIC_BY_TAG["host_tier_hit_rate"]).value == use.tiers[0].hit_rate
    assert read(tiered, METRIC_BY_TAG["remote_tier_hit_rate"]).value is None
    assert {"tier_hit_rate", "lossy_tier_tokens", "saved_against_load_s"} <= {name for name, _ in columns()}


def test_without_tiers_the_section_is_absent() -> None:
    report = simulate(scenario())
    assert report.tiers is None
    assert read(report, METRIC_BY_TAG["tier_hit_rate"]).value is None


def test_a_strategy_that_evicts_stores_nothing_and_says_so() -> None:
    with_tiers, without = simulate(scenario(HOST, compression="snapkv")), simulate(scenario(compression="snapkv"))
    assert with_tiers.latency == without.latency
    assert any("nothing is offloaded to any tier" in note for note in with_tiers.provenance.notes)


def test_every_name_of_an_encoding_that_is_smaller_can_be_stored() -> None:
    for name in ("fp8", "int8_per_token_head", "kivi-2", "turboquant_4bit_nc", "mxfp4", "low_rank"):
        parse_compression(name)
        report = simulate(scenario({**HOST, "encoding": name}))
        assert report.tiers is not None
        assert report.tiers.tiers[0].stored_bytes > 0


def test_a_pipeline_holds_its_share_on_each_device() -> None:
    """Two stages of half the layers: half the bytes on each device, over two host links, in half a tier each."""
    one = scenario({**HOST, "encoding": "fp8"}, NVME)
    piped = one.model_copy(update={"pipeline_parallel_size": 2})
    found = []
    for each in (one, piped):
        deployment = resolve(each)
        plan = plan_tiers(deployment, block_bytes(deployment), 16, Edge.CENTRAL)
        assert plan is not None
        found.append(plan)
    whole, half = found
    for tier, part in zip(whole.tiers, half.tiers, strict=True):
        assert tier.capacity_bytes is not None
        assert part.capacity_bytes == tier.capacity_bytes // 2
        assert part.coding.unit_bytes == tier.coding.unit_bytes // 2
        assert part.coding.decode_s == pytest.approx(tier.coding.decode_s / 2)
    assert half.tiers[1].read_bytes_per_s == NVME["read_bandwidth"] / 2
