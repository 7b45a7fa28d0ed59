"""The page as a whole, run by Streamlit's AppTest on the real engine."""

from __future__ import annotations

import json
import re
import tempfile
from typing import Any

import pytest

from kvsim.metrics import METRIC_BY_TAG
from kvsim.rendering.cells import format_number
from kvsim.scenario import Scenario
from kvsim.simulate import Comparison, compare

TWO = ["native", "fp8"]
AZURE_CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{46 + second}.0000000,{300 + 10 * second},{20 + second}\n" for second in range(10)
)


def as_shown(text: str) -> str:
    """Markdown escapes are for the browser; the reader sees the character."""
    return re.sub(r"\\(.)", r"\1", text)


def texts(elements: Any) -> list[str]:
    return [as_shown(element.value) for element in elements]


def plotted(page: Any) -> list[dict[str, Any]]:
    return [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]


def test_a_first_visit_shows_an_estimate_without_errors(open_page: Any) -> None:
    page = open_page()
    assert not page.exception
    assert not page.error
    assert not page.warning
    assert any("estimate" in text for text in texts(page.markdown))
    assert len(plotted(page)) == 5
    assert page.table[0].value["Strategy and quality"].iloc[0] == "**native** :small[:gray[baseline]]"
    assert len(page.table[0].value) == 8


def test_numbers_on_the_page_are_fields_of_the_report(open_page: Any) -> None:
    page = open_page(strategies=["fp8"], workload="offline-batch")
    scenario = Scenario(model="llama-3.1-8b", device="h100-sxm", workload="offline-batch")
    report = compare(scenario, ["fp8"], method="estimate")[0].report
    assert report is not None
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown["Mean TPOT [ms]"] == format_number(report.latency.tpot.mean_s.value * 1000)
    assert shown["Output [tok/s]"] == format_number(report.throughput.output_throughput.value)
    assert shown["Cost per 1M total [USD]"] == format_number(report.cost.usd_per_million_total_tokens.value)
    row = page.table[0].value.iloc[0]
    assert as_shown(row["KV fold \\[x\\]"]).startswith(format_number(report.kv.fold))
    pareto = plotted(page)[0]["data"]
    point = next(trace for trace in pareto if trace.get("name") == "1 fp8")
    assert point["x"] == [report.latency.tpot.mean_s.value * 1000]
    assert point["y"] == [report.throughput.output_throughput.value]


def test_simulating_shows_percentiles_until_a_choice_changes(open_page: Any) -> None:
    page = open_page(strategies=TWO, device="l4", request_rate="0.5")
    page.button[0].click().run()
    assert not page.exception
    scenario = Scenario.model_validate(
        {
            "model": "llama-3.1-8b",
            "device": "l4",
            "workload": _chat_at(0.5),
        }
    )
    report = compare(scenario, TWO)[1].report
    assert report is not None
    p99 = as_shown(page.table[0].value["P99 TTFT \\[ms\\]"].iloc[1])
    assert p99.startswith(format_number(report.latency.ttft.p99_s.value * 1000))
    page.number_input(key="max_num_seqs").set_value(64).run()
    assert "P99 TTFT \\[ms\\]" not in page.table[0].value
    page.number_input(key="max_num_seqs").set_value(256).run()
    assert "P99 TTFT \\[ms\\]" in page.table[0].value, "an answer given before comes back without a click"


def _chat_at(request_rate: float) -> dict[str, Any]:
    from kvsim.workload_catalog import load_workload

    workload = load_workload("chat").model_dump(mode="json")
    return {**workload, "arrivals": {"kind": "poisson", "request_rate": request_rate}}


def test_simulation_reports_its_progress(open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvsim_dashboard import answers

    seen: list[float] = []

    def compare_and_record(*arguments: Any, **options: Any) -> tuple[Comparison, ...]:
        if options["progress"] is not None:
            for share in (0.0, 0.5, 1.0):
                options["progress"](share)
                seen.append(share)
        return compare(*arguments, **{**options, "method": "estimate", "progress": None})

    monkeypatch.setattr(answers, "compare", compare_and_record)
    page = open_page(strategies=TWO)
    page.button[0].click().run()
    assert not page.exception
    assert seen == [0.0, 0.5, 1.0]


def test_a_share_link_fills_the_form(open_page: Any) -> None:
    page = open_page(
        model="qwen3-8b", device="mi300x", workload="rag", strategies=["native", "kivi-2"], tensor_parallel_size="2",
        max_num_seqs="64", max_concurrency="32", ttft_ms="500", tpot_ms="50.5", judge_by="P99 TTFT", bands="false",
    )  # fmt: skip
    assert not page.exception
    assert not page.warning
    assert page.selectbox(key="model").value == "qwen3-8b"
    assert page.selectbox(key="device").value == "mi300x"
    assert page.selectbox(key="workload").value == "rag"
    assert page.multiselect(key="strategies").value == ["native", "kivi-2"]
    assert page.number_input(key="tensor_parallel_size").value == 2
    assert page.number_input(key="max_num_seqs").value == 64
    assert page.number_input(key="max_concurrency").value == 32
    assert page.number_input(key="ttft_ms").value == 500
    assert page.number_input(key="tpot_ms").value == 50.5
    assert page.selectbox(key="judge_by").value == "P99 TTFT"
    assert page.toggle(key="bands").value is False


def test_an_invalid_link_falls_back_and_says_so(open_page: Any) -> None:
    page = open_page(device="<script>", max_num_seqs="-3", request_rate="fast", strategies=["fp8", "bogus"], bits="3")
    assert not page.exception
    assert page.selectbox(key="device").value == "h100-sxm"
    assert page.number_input(key="max_num_seqs").value == 256
    assert page.number_input(key="request_rate").value is None
    assert page.multiselect(key="strategies").value == ["fp8"]
    notices = " ".join(texts(page.warning))
    for word in ("'<script>'", "'-3'", "'fast'", "'fp8, bogus'", "bits: no such parameter"):
        assert word in notices
    page.run()
    assert not page.warning, "the notice is about the link, not about what is chosen later"


def test_a_strategy_that_cannot_run_is_listed_with_its_reason(open_page: Any) -> None:
    page = open_page(model="deepseek-v2-lite", strategies=["native", "kivi-4"])
    scenario = Scenario(model="deepseek-v2-lite", device="h100-sxm", workload="chat")
    reason = compare(scenario, ["kivi-4"], method="estimate")[0].reason
    assert reason is not None
    assert any(f"**kivi-4**: {reason}" in text for text in texts(page.warning))
    assert len(page.table[0].value) == 1


def test_where_nothing_fits_the_reason_is_said_once_in_the_clis_words(open_page: Any) -> None:
    page = open_page(model="llama-3.1-405b", strategies=TWO)
    scenario = Scenario(model="llama-3.1-405b", device="h100-sxm", workload="chat")
    reason = compare(scenario, TWO, method="estimate")[0].reason
    assert texts(page.error) == [reason]
    assert not page.exception
    assert not page.table


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ({"request_rate": "2", "max_concurrency": "8"}, ("request_rate 2", "max_concurrency 8", "exclude each other")),
        ({"strategies": ""}, ("strategies: none chosen",)),
        ({"max_num_seqs": "9000"}, ("engine.max_num_batched_tokens: 8192 is less than engine.max_num_seqs 9000",)),
        ({"tensor_parallel_size": "3"}, ("tensor_parallel_size: 3 does not divide the 32 attention heads",)),
    ],
)
def test_what_the_user_can_mend_is_a_message_not_a_traceback(open_page: Any, link: Any, words: tuple[str, ...]) -> None:
    page = open_page(**link)
    assert not page.exception
    assert len(page.error) == 1
    for word in words:
        assert word in texts(page.error)[0]


def test_an_uploaded_trace_is_read_and_not_kept(open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []
    made = tempfile.TemporaryDirectory

    def remember(*arguments: Any, **options: Any) -> Any:
        folder = made(*arguments, **options)
        folders.append(folder.name)
        return folder

    monkeypatch.setattr(tempfile, "TemporaryDirectory", remember)
    page = open_page(workload="upload a trace", strategies=TWO)
    assert not page.table
    page.file_uploader[0].set_value(("../my trace.csv", AZURE_CSV.encode(), "text/csv")).run()
    assert not page.exception
    assert not page.error
    assert any("my_trace.csv (azure), 10 requests, replayed" in text for text in _cells(page))
    from pathlib import Path

    ours = [folder for folder in folders if "kvsim-dashboard-" in folder]
    assert ours
    assert not any(Path(folder).exists() for folder in ours)


def _cells(page: Any) -> list[str]:
    return [as_shown(str(cell)) for table in page.table for cell in table.value.to_numpy().ravel()]


def test_a_malformed_trace_is_named_as_the_user_named_it(open_page: Any) -> None:
    page = open_page(workload="upload a trace", strategies=TWO)
    page.file_uploader[0].set_value(("lengths.csv", b"a,b\n1,2\n", "text/csv")).run()
    assert not page.exception
    (message,) = texts(page.error)
    assert message.startswith("lengths.csv:")
    assert tempfile.gettempdir() not in message


def test_every_metric_name_is_the_tables_name(open_page: Any) -> None:
    page = open_page(strategies=TWO)
    assert list(page.dataframe[0].value["Metric"]) == [metric.header for metric in METRIC_BY_TAG.values()]
    assert list(page.dataframe[0].value.columns) == ["Metric", "Unit", "Meaning", "native", "fp8"]


def test_judging_by_another_metric_changes_the_verdict(open_page: Any) -> None:
    page = open_page(strategies=["native", "fp8", "turboquant_4bit_nc"], judge_by="Sequences that fit")
    assert any(text.startswith("**turboquant_4bit_nc** comes first") for text in texts(page.markdown))
    page = open_page(strategies=["native", "fp8", "turboquant_4bit_nc"], judge_by="Mean TPOT")
    assert not any(text.startswith("**turboquant_4bit_nc** comes first") for text in texts(page.markdown))
