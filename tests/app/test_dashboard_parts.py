"""What lies between the form and the charts: links, questions, verdicts, tables, downloads, and the folder's rules."""

from __future__ import annotations

import ast
import csv
import io
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec, UnknownName
from kvsim.metrics import METRICS, read
from kvsim.report import Figure, Report
from kvsim.scenario_file import load_scenario
from kvsim.simulate import Comparison

ALLOWED_IMPORTS = {
    "compression", "device_catalog", "errors", "limit", "metrics", "model_catalog", "rendering", "report", "scenario",
    "scenario_file", "simulate", "specs", "units", "workload_catalog",
}  # fmt: skip


def choices(**changes: Any) -> Any:
    from kvsim_dashboard.question import Choices

    base = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat", "strategies": ("native", "fp8")}
    return Choices(**{**base, **changes})


def test_the_downloaded_scenario_is_the_one_that_ran(tmp_path: Path) -> None:
    from kvsim_dashboard.exports import scenario_yaml
    from kvsim_dashboard.question import build_question

    for changes in (
        {},
        {"request_rate": 5.5301, "ttft_ms": 333.3, "tpot_ms": 50.0, "tensor_parallel_size": 2},
        {"max_concurrency": 32, "max_num_seqs": 64, "workload": "agentic"},
    ):
        question = build_question(choices(**changes))
        path = tmp_path / "scenario.yaml"
        path.write_text(scenario_yaml(question), encoding="utf-8")
        assert load_scenario(path) == question.scenario


def test_the_form_changes_only_what_it_says() -> None:
    from kvsim_dashboard.question import build_question

    scenario = build_question(choices(request_rate=3.0, ttft_ms=200.0, max_num_seqs=64)).scenario
    plain = build_question(choices()).scenario
    assert scenario.workload.arrivals.request_rate == 3.0
    assert scenario.slo.ttft_s == pytest.approx(0.2)
    assert scenario.engine.max_num_seqs == 64
    assert plain.workload == "chat"
    assert plain.engine.max_num_seqs == 256
    assert not plain.slo.is_set


def test_keys_of_different_questions_differ() -> None:
    from kvsim_dashboard.question import TraceUpload, build_question

    traces = [TraceUpload("t.csv", "azure", content) for content in (b"a", b"b")]
    asked = [
        build_question(choices()),
        build_question(choices(strategies=("fp8", "native"))),
        build_question(choices(tpot_ms=50.0)),
        *(build_question(choices(trace=trace)) for trace in traces),
    ]
    keys = [question.key(method) for question in asked for method in ("estimate", "simulation")]
    assert len(set(keys)) == len(keys)
    assert keys[0] == build_question(choices()).key("estimate")


def test_an_oversized_trace_is_refused_before_it_is_written() -> None:
    from kvsim_dashboard.question import MAX_UPLOAD_MIB, TraceUpload, build_question

    trace = TraceUpload("big.csv", "azure", b"0" * (MAX_UPLOAD_MIB * 2**20 + 1))
    with pytest.raises(InvalidSpec, match=r"big\.csv: 20971521 bytes; the dashboard takes traces of at most 20 MiB"):
        build_question(choices(trace=trace))


def test_column_names_reach_only_the_format_that_has_them() -> None:
    from kvsim_dashboard.question import TraceUpload, build_question

    named = {"timestamp_column": "t", "prompt_tokens_column": "p", "output_tokens_column": ""}
    plain = build_question(choices(trace=TraceUpload("t.csv", "columns", b"x", **named)))
    azure = build_question(choices(trace=TraceUpload("t.csv", "azure", b"x", **named)))
    assert plain.scenario.workload.columns.timestamp_column == "t"
    assert plain.scenario.workload.columns.output_tokens_column == "output_tokens"
    assert azure.scenario.workload.columns is None


@given(name=st.text(max_size=300))
def test_an_upload_can_name_no_folder(name: str) -> None:
    from kvsim_dashboard.question import TraceUpload

    safe = TraceUpload(name, "azure", b"").safe_name
    assert safe not in ("", ".", "..")
    assert not set(safe) & set("/\\\0")
    assert not safe.startswith(".")
    assert len(safe) <= 110


def test_the_store_forgets_what_was_unused_for_longest() -> None:
    from kvsim_dashboard.answers import AnswerStore

    store = AnswerStore(max_answers=2)
    rows = {key: (Comparison(key, None, "no"),) for key in "abc"}
    store.put("a", rows["a"])
    store.put("b", rows["b"])
    assert store.get("a") is rows["a"]
    store.put("c", rows["c"])
    assert store.get("b") is None
    assert store.get("a") is rows["a"]
    assert store.get("c") is rows["c"]


@pytest.mark.parametrize(
    ("values", "effective", "agrees"),
    [
        (["4"], 4, True), (["4.0"], 4.0, True), (["999"], 4, False), (["x"], 4, False), ([""], None, True),
        (["x"], None, False), (["true"], True, True), (["maybe"], True, False), (["h100"], "h100-sxm", False),
        (["fp8", "native"], ["fp8", "native"], True), (["fp8", "bogus"], ["fp8"], False), ([""], [], True),
        (["l4", "a10"], "a10", True),
    ],
)  # fmt: skip
def test_a_parameter_that_was_not_followed_is_noticed(values: list[str], effective: object, agrees: bool) -> None:
    from kvsim_dashboard.link import ignored_parameters

    notices = ignored_parameters({"knob": values}, {"knob": effective})
    assert (notices == []) is agrees


@given(text=st.text(max_size=2000))
def test_a_notice_stays_short_whatever_the_link_holds(text: str) -> None:
    from kvsim_dashboard.link import ignored_parameters

    for notices in (ignored_parameters({"model": [text]}, {"model": "x"}), ignored_parameters({text: ["1"]}, {})):
        assert all(len(notice) < 700 for notice in notices)


@given(text=st.text(alphabet="ab_*`$<>[]~:#|\\", max_size=40))
def test_every_markup_character_is_escaped(text: str) -> None:
    from kvsim_dashboard.plain_text import literal

    escaped = literal(text)
    plain, rest = [], iter(escaped)
    for character in rest:
        assert character not in "_*`$<>[]~:#|"
        plain.append(next(rest) if character == "\\" else character)
    assert "".join(plain) == text


@pytest.fixture
def comparisons(make_report: Any) -> tuple[Comparison, ...]:
    return (
        Comparison("native", make_report(strategy="native"), None),
        Comparison("fp8", make_report(strategy="fp8", fold=2.0), None),
        Comparison("h2o", None, "=HYPERLINK(1)"),
    )


def test_the_csv_holds_every_metric_as_it_is(comparisons: Any) -> None:
    from kvsim_dashboard.exports import CSV_HEADER, metrics_csv

    header, *rows = csv.reader(io.StringIO(metrics_csv(comparisons)))
    assert tuple(header) == CSV_HEADER
    assert len(rows) == 2 * len(METRICS) + 1
    by_key = {(row[0], row[1]): row for row in rows}
    for metric in METRICS:
        reading = read(comparisons[1].report, metric)
        written = by_key["fp8", metric.tag][4]
        assert written == ("unknown" if reading.value is None else str(reading.value))


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum", "\tx", "\rx"])
def test_text_is_never_a_formula(text: str, comparisons: Any) -> None:
    from kvsim_dashboard.exports import guarded, metrics_csv

    assert guarded(text) == f"'{text}"
    assert guarded(-1.5) == -1.5
    assert guarded("native") == "native"
    assert "\nh2o,reason,cannot run because,,'=HYPERLINK(1)," in metrics_csv(comparisons)


def test_the_json_holds_whole_reports(comparisons: Any) -> None:
    from kvsim_dashboard.exports import reports_json

    rows = json.loads(reports_json(comparisons))
    assert Report.model_validate(rows[1]["report"]) == comparisons[1].report
    assert rows[2] == {"strategy": "h2o", "reason": "=HYPERLINK(1)", "report": None}


def with_tpot(report: Report, value: float | None, low: float | None = None, high: float | None = None) -> Report:
    figure = Figure(value=value, low=low, high=high)
    tpot = report.latency.tpot.model_copy(update={"mean_s": figure})
    return report.model_copy(update={"latency": report.latency.model_copy(update={"tpot": tpot})})


def verdict_of(make_report: Any, **tpots: tuple[float | None, ...]) -> Any:
    from kvsim_dashboard.verdict import give_verdict

    rows = [Comparison(name, with_tpot(make_report(strategy=name), *tpot), None) for name, tpot in tpots.items()]
    return give_verdict(rows, "mean_tpot_ms")


def test_the_verdict_follows_the_metrics_direction_and_says_when_bands_overlap(make_report: Any) -> None:
    clear = verdict_of(make_report, native=(0.020, 0.019, 0.021), fp8=(0.010, 0.009, 0.011))
    assert clear.best == "fp8"
    assert "bands overlap" not in clear.sentence
    assert "quality risk is **unknown**" in clear.sentence
    close = verdict_of(make_report, native=(0.020, 0.010, 0.030), fp8=(0.019, 0.009, 0.029))
    assert "bands overlap" in close.sentence


def test_a_tie_or_a_loss_leaves_native_first(make_report: Any) -> None:
    assert verdict_of(make_report, native=(0.02,), fp8=(0.02,)).best == "native"
    unseen = verdict_of(make_report, native=(0.020001,), fp8=(0.02,))
    assert unseen.best == "native", "a lead that three digits do not show is no lead"
    lost = verdict_of(make_report, native=(0.02,), fp8=(0.03,))
    assert lost.sentence.startswith("No strategy beats **native**")


def test_an_unknown_metric_ranks_nothing(make_report: Any) -> None:
    nothing = verdict_of(make_report, native=(None,), fp8=(None,))
    assert nothing.best is None
    assert not nothing.cards
    assert verdict_of(make_report, native=(None,), fp8=(0.02,)).best == "fp8"


def test_without_native_the_verdict_says_so(make_report: Any) -> None:
    alone = verdict_of(make_report, fp8=(0.02,))
    assert "Native was not compared" in alone.sentence
    assert {card.native for card in alone.cards} == {"native not compared"}


def test_a_table_cell_shows_value_band_and_basis(make_report: Any, comparisons: Any) -> None:
    from kvsim_dashboard.tables import comparison_table, unknown_to_all

    table = comparison_table(comparisons, show_bands=True)
    report = comparisons[1].report
    cell = table["Output \\[tok/s\\]"][1].replace("\u2060", "")
    low, high = (
        f"{v:,.0f}" for v in (report.throughput.output_throughput.low, report.throughput.output_throughput.high)
    )
    assert cell.startswith(f"{report.throughput.output_throughput.value:,.0f} ")
    assert f"{low}\N{EN DASH}{high}" in cell
    assert ":blue-badge[:small[datasheet]]" in cell
    assert "badge" not in comparison_table(comparisons, show_bands=False)["Output \\[tok/s\\]"][1]
    assert table["Strategy and quality"][1] == "**fp8** :small[:gray[quality unknown]]"
    assert unknown_to_all(comparisons) == []
    unpriced = [Comparison("native", make_report(priced=False), None), *comparisons[1:2]]
    cost = comparison_table(unpriced, show_bands=True)["Cost per 1M total \\[USD\\]"]
    assert cost[0] == ":gray[unknown]"
    assert [m.tag for m in unknown_to_all(unpriced[:1])] == ["usd_per_million_total_tokens"]


def test_the_server_listens_to_this_machine_only_and_says_little(app_folder: Path) -> None:
    from kvsim_dashboard.question import MAX_UPLOAD_MIB

    config = tomllib.loads((app_folder / ".streamlit" / "config.toml").read_text(encoding="utf-8"))
    assert config["server"]["address"] == "127.0.0.1"
    assert config["server"]["maxUploadSize"] == MAX_UPLOAD_MIB
    assert config["server"]["allowedHosts"]
    assert config["server"]["enableStaticServing"] is False
    assert config["browser"]["gatherUsageStats"] is False
    assert config["client"]["showErrorDetails"] == "type"


def sources(app_folder: Path) -> list[tuple[Path, ast.Module]]:
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(app_folder.rglob("*.py"))]


def test_the_application_uses_what_kvsim_offers_and_computes_nothing(app_folder: Path) -> None:
    for path, tree in sources(app_folder):
        for node in ast.walk(tree):
            modules = []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            for module in modules:
                root, _, rest = module.partition(".")
                assert root not in {"numpy", "polars", "pandas", "scipy", "statistics", "pickle"}, f"{path}: {module}"
                if root == "kvsim" and rest:
                    assert rest.partition(".")[0] in ALLOWED_IMPORTS, f"{path}: {module}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"sum", "eval", "exec"}, f"{path}:{node.lineno}"


def test_no_html_is_trusted_and_nothing_is_fetched(app_folder: Path) -> None:
    for path in app_folder.rglob("*"):
        if path.suffix in {".py", ".toml"}:
            text = path.read_text(encoding="utf-8")
            assert "unsafe_allow_html" not in text
            assert "http://" not in text
            assert "https://" not in text
            assert "page_icon" not in text, "a page icon is fetched from a font server"


def test_a_wrong_name_keeps_kvsims_words() -> None:
    from kvsim_dashboard.question import build_question

    with pytest.raises(UnknownName, match="did you mean 'chat'"):
        build_question(choices(workload="chatt", request_rate=1.0))
