import math
import re

import pytest

from kvsim.metrics import METRIC_BY_TAG, METRICS, read
from kvsim.report import Figure
from kvsim.scenario import Scenario
from kvsim.vllm_bench import to_vllm_bench


def test_tags_are_unique():
    assert len(METRIC_BY_TAG) == len(METRICS)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.tag)
def test_every_metric_reads_from_a_report(metric, make_report):
    reading = read(make_report(), metric)
    expected = {"str": str, "int": int, "float": float, "figure": float}[metric.kind]
    assert reading.value is None or isinstance(reading.value, expected)
    if metric.kind != "figure":
        assert reading[1:] == (None, None, None)


def test_milliseconds_scale_value_and_band(make_report):
    reading = read(make_report(), METRIC_BY_TAG["mean_ttft_ms"])
    assert reading.value == pytest.approx(105.0)
    assert (reading.low, reading.high) == pytest.approx((84.0, 126.0))
    assert reading.basis == "datasheet"


def test_unknown_stays_none(make_report):
    report = make_report(count=50, priced=False)
    assert read(report, METRIC_BY_TAG["p99_tpot_ms"]).value is None
    assert read(report, METRIC_BY_TAG["usd_per_million_output_tokens"]).value is None


def test_speed_per_user_turns_the_band_round(make_report):
    reading = read(make_report(), METRIC_BY_TAG["tokens_per_s_per_user"])
    assert reading.low < reading.value < reading.high
    assert reading.value == pytest.approx(1 / (0.02 * 0.9))


def test_speed_per_user_uses_the_mean_where_an_estimate_has_no_median(make_report):
    report = make_report()
    tpot = report.latency.tpot.model_copy(update={"median_s": Figure(value=None)})
    report = report.model_copy(update={"latency": report.latency.model_copy(update={"tpot": tpot})})
    assert read(report, METRIC_BY_TAG["tokens_per_s_per_user"]).value == pytest.approx(50.0)


def test_throughput_per_device_counts_ranks_and_replicas(make_report):
    scenario = Scenario(model="m", device="d", workload="chat", tensor_parallel_size=4, replicas=2)
    reading = read(make_report(scenario), METRIC_BY_TAG["output_throughput_per_device"])
    assert reading.value == pytest.approx(1100 / 8)


def test_time_shares_add_up_to_one(make_report):
    report = make_report()
    shares = [read(report, metric).value for metric in METRICS if metric.tag.startswith("time_share_")]
    assert math.fsum(shares) == pytest.approx(1.0)


VLLM_KEYS = {
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "duration", "completed",
    "failed", "total_input_tokens", "total_output_tokens", "max_output_tokens_per_s", "max_concurrent_requests",
    "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness", "max_concurrency",
} | {
    f"{statistic}_{name}_ms"
    for statistic in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    for name in ("ttft", "tpot", "itl", "e2el")
}  # fmt: skip


def test_vllm_bench_result_has_vllms_keys(make_report):
    result = to_vllm_bench(make_report())
    assert set(result) == VLLM_KEYS
    assert result["p50_ttft_ms"] == result["median_ttft_ms"] == pytest.approx(94.5)
    assert result["request_goodput"] is None


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ({"kind": "poisson", "request_rate": 3}, (3.0, 1.0, None)),
        ({"kind": "gamma", "request_rate": 3, "burstiness": 0.5}, (3.0, 0.5, None)),
        ({"kind": "burst"}, ("inf", None, None)),
        ({"kind": "concurrency", "max_concurrency": 8}, ("inf", None, 8)),
    ],
)
def test_vllm_bench_result_names_the_load(make_report, arrivals, expected):
    lengths = {"kind": "constant", "tokens": 10}
    workload = {"kind": "synthetic", "input_len": lengths, "output_len": lengths, "arrivals": arrivals}
    result = to_vllm_bench(make_report(Scenario(model="m", device="d", workload=workload)))
    assert (result["request_rate"], result["burstiness"], result["max_concurrency"]) == expected


def test_tags_carry_no_capital_letters():
    assert all(re.fullmatch(r"[a-z0-9_]+", metric.tag) for metric in METRICS)
