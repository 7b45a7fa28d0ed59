"""Charts: pure functions whose marks are fields of the reports."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.metrics import METRIC_BY_TAG
from kvsim.scenario import Scenario, Slo
from kvsim.simulate import Comparison
from kvsim.units import GIBI

GRID_POINT = st.tuples(st.integers(0, 5).map(float), st.integers(0, 5).map(float))


@pytest.fixture
def comparisons(make_report: Any) -> tuple[Comparison, ...]:
    return (
        Comparison("native", make_report(strategy="native"), None),
        Comparison("fp8", make_report(strategy="fp8", fold=2.0), None),
        Comparison("h2o", None, "no such kernel"),
        Comparison("kivi-4", make_report(strategy="kivi-4", fold=3.0), None),
    )


def named(chart: Any, name: str) -> Any:
    return next(trace for trace in chart.figure.data if trace.name == name)


def test_pareto_points_are_the_reports_metrics(comparisons: Any) -> None:
    from kvsim_dashboard.charts import pareto_chart

    chart = pareto_chart(comparisons, "mean_tpot_ms", "output_throughput_per_device")
    for place, name in ((1, "fp8"), (3, "kivi-4")):
        report = comparisons[place].report
        point = named(chart, f"{place + 1} {name}")
        assert list(point.x) == [report.latency.tpot.mean_s.value * 1000]
        assert list(point.y) == [report.throughput.output_throughput.value]
    bands = [trace for trace in chart.figure.data if trace.name == "band"]
    tpot = comparisons[0].report.latency.tpot.mean_s
    assert [tpot.low * 1000, tpot.high * 1000] in [list(trace.x) for trace in bands]
    assert "h2o" not in chart.alt
    assert chart.alt.endswith("unbeaten: kivi-4.")


def test_a_strategy_keeps_its_symbol_in_every_chart_and_shares_it_with_no_neighbour(comparisons: Any) -> None:
    from kvsim_dashboard.charts import effects_chart, pareto_chart

    pareto = pareto_chart(comparisons, "mean_tpot_ms", "kv_max_concurrency")
    looks = {t.name[2:]: (t.marker.symbol, t.marker.color) for t in pareto.figure.data if t.mode == "markers+text"}
    assert len(set(looks.values())) == 3
    assert len({symbol for symbol, _ in looks.values()}) == 3, "colour is never the only difference"
    for trace in effects_chart(comparisons).figure.data:
        if trace.mode == "markers":
            assert (trace.marker.symbol, trace.marker.color) == looks[trace.name]


def test_symbols_differ_beyond_the_palette(make_report: Any) -> None:
    from kvsim_dashboard.chart_style import strategies_that_ran

    report = make_report()
    strategies = strategies_that_ran([Comparison(str(i), report, None) for i in range(24)])
    assert len({(s.marker["symbol"], s.marker["color"]) for s in strategies}) == 24


def test_an_unknown_figure_is_left_out_and_named(make_report: Any) -> None:
    from kvsim_dashboard.charts import effects_chart, pareto_chart

    rows = [Comparison("native", make_report(priced=False), None)]
    chart = pareto_chart(rows, "mean_tpot_ms", "usd_per_million_output_tokens")
    assert [note.text for note in chart.figure.layout.annotations] == ["unknown"]
    assert all(trace.mode == "lines" for trace in chart.figure.data)
    effects = effects_chart(rows)
    assert "unknown" in [note.text for note in effects.figure.layout.annotations], "no simulation, no queueing effect"


def test_effects_are_the_reports_effects(comparisons: Any) -> None:
    from kvsim_dashboard.charts import EFFECTS, effects_chart

    drawn = [t for t in effects_chart(comparisons).figure.data if t.mode == "markers" and t.name == "fp8"]
    effects = comparisons[1].report.effects
    assert [trace.x[0] for trace in drawn] == [getattr(effects, tag).value for tag in EFFECTS]
    assert len({trace.xaxis for trace in drawn}) == 4


def test_memory_bars_are_the_waterfalls_terms(comparisons: Any) -> None:
    from kvsim_dashboard.charts import memory_chart, memory_waterfall

    chart = memory_chart(comparisons)
    report = comparisons[1].report
    for term in report.memory:
        bar = named(chart, term.name)
        assert bar.x[1] == term.size_bytes / GIBI
        assert bar.y[1] == f"2 fp8<br>{report.kv.capacity_tokens:,} tokens"
    patterns = [bar.marker.pattern.shape for bar in chart.figure.data]
    assert len(set(patterns)) == len(patterns), "segments differ in hatching, not in colour alone"
    (fall,) = memory_waterfall(report).figure.data
    assert list(fall.y[:-1]) == [term.size_bytes / GIBI for term in report.memory]
    assert list(fall.measure) == ["relative"] * len(report.memory) + ["total"]


def test_time_bars_are_the_reports_seconds(comparisons: Any) -> None:
    from kvsim_dashboard.charts import time_chart

    bars = time_chart(comparisons).figure.data
    for part in comparisons[0].report.time_split:
        prefill, decode = (bar for bar in bars if bar.name == part.component.value)
        assert (prefill.x[0], decode.x[0]) == (part.prefill_s, part.decode_s)
        assert (prefill.showlegend, decode.showlegend) == (True, False)


def test_every_axis_has_a_title_with_its_unit_and_every_chart_a_sentence(comparisons: Any) -> None:
    from kvsim_dashboard import charts

    pareto = charts.pareto_chart(comparisons, "tokens_per_s_per_user", "output_throughput_per_device")
    assert pareto.figure.layout.xaxis.title.text == "Speed per user [tok/s/user], higher is better"
    assert pareto.figure.layout.yaxis.title.text == "Output per device [tok/s/device], higher is better"
    assert charts.memory_chart(comparisons).figure.layout.xaxis.title.text == "Memory of one device [GiB]"
    assert charts.time_chart(comparisons).figure.layout.xaxis2.title.text == "Busy engine time [s]"
    assert charts.effects_chart(comparisons).figure.layout.xaxis3.title.text == "x native"
    for draw in (charts.memory_chart, charts.time_chart, charts.effects_chart):
        assert "native, fp8, kivi-4" in draw(comparisons).alt


@pytest.mark.parametrize(
    ("x_tag", "ends"),
    [("mean_tpot_ms", (None, 16.0)), ("tokens_per_s_per_user", (1 / 0.016, None)), ("kv_fold", None)],
)
def test_ground_that_meets_the_slo_is_shaded(make_report: Any, x_tag: str, ends: Any) -> None:
    from kvsim_dashboard.charts import pareto_chart

    scenario = Scenario(model="llama-3.1-8b", device="h100-sxm", workload="chat", slo=Slo(tpot_s=0.016))
    rows = [Comparison(str(fold), make_report(scenario, fold=fold), None) for fold in (1.0, 4.0)]
    figure = pareto_chart(rows, x_tag, "output_throughput").figure
    if ends is None:
        assert not figure.layout.shapes
        return
    (shape,) = figure.layout.shapes
    x_range = figure.layout.xaxis.range
    assert shape.x0 == (x_range[0] if ends[0] is None else pytest.approx(ends[0]))
    assert shape.x1 == (x_range[1] if ends[1] is None else pytest.approx(ends[1]))


def test_no_strategy_still_gives_a_chart() -> None:
    from kvsim_dashboard import charts

    for draw in (charts.memory_chart, charts.time_chart, charts.effects_chart):
        assert "no strategy" in draw(()).alt
    assert "0 strategies" in charts.pareto_chart((), "mean_tpot_ms", "kv_fold").alt


@given(points=st.lists(GRID_POINT, max_size=8), x_lower=st.booleans(), y_lower=st.booleans())
def test_the_front_holds_exactly_the_unbeaten_points(points: Any, x_lower: bool, y_lower: bool) -> None:
    from kvsim_dashboard.charts import pareto_front

    lower, higher = METRIC_BY_TAG["mean_tpot_ms"], METRIC_BY_TAG["output_throughput"]
    front = pareto_front(points, lower if x_lower else higher, lower if y_lower else higher)
    signed = [(-x if x_lower else x, -y if y_lower else y) for x, y in points]

    def is_beaten(i: int) -> bool:
        return any(other != signed[i] and other[0] >= signed[i][0] and other[1] >= signed[i][1] for other in signed)

    assert front == [i for i in range(len(points)) if not is_beaten(i)]
