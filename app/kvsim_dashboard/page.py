"""The page below the form: verdict, table, charts, one strategy in detail, provenance, downloads."""

from __future__ import annotations

from typing import Final

import streamlit as st

from kvsim.metrics import METRIC_BY_TAG
from kvsim.rendering.cells import UNKNOWN, basis_cell, failures, shared_notes
from kvsim.report import Report
from kvsim_dashboard import charts, exports, tables
from kvsim_dashboard.answers import Answer
from kvsim_dashboard.chart_style import Chart
from kvsim_dashboard.form import read_criterion, read_show_bands
from kvsim_dashboard.limit_section import show_limit
from kvsim_dashboard.plain_text import literal
from kvsim_dashboard.question import Question
from kvsim_dashboard.verdict import CRITERIA, give_verdict

PARETO_X: Final = ("tokens_per_s_per_user", "mean_tpot_ms", "p99_tpot_ms", "mean_ttft_ms", "p99_ttft_ms")
PARETO_Y: Final = ("output_throughput_per_device", *(tag for tag in CRITERIA if tag != "output_throughput_per_device"))
CHART_CONFIG: Final = {"displayModeBar": False}


def show_answer(question: Question, answer: Answer) -> None:
    """Draw everything that an answer says."""
    if all(row.report is None for row in answer):
        _refusal(answer)
        return
    _verdict(answer)
    _comparison(answer)
    if any(row.report is None for row in answer):
        st.warning(_reasons(answer), icon=":material/block:")
    _charts(answer)
    _detail(answer)
    show_limit(question.scenario.model, question.scenario.device)
    _foot(question, answer)


def _refusal(answer: Answer) -> None:
    """Nothing can run: one reason where all share it, else each its own."""
    reasons = {reason for _, reason in failures(answer)}
    st.error(literal(reasons.pop()) if len(reasons) == 1 else _reasons(answer), icon=":material/error:")


def _reasons(answer: Answer) -> str:
    """Strategies that cannot run, as a Markdown list."""
    lines = [f"- **{literal(name)}**: {literal(reason)}" for name, reason in failures(answer)]
    return "\n".join(["These strategies cannot run:", *lines])


def _verdict(answer: Answer) -> None:
    title, criterion = st.columns([3, 1], vertical_alignment="bottom")
    title.subheader("Verdict", anchor=False)
    with criterion:
        verdict = give_verdict(answer, read_criterion())
    st.markdown(verdict.sentence)
    if verdict.cards:
        for column, card in zip(st.columns(len(verdict.cards)), verdict.cards, strict=True):
            with column.container(border=True, height="stretch", gap="xxsmall"):
                # A metric cuts a long label short; a caption wraps.
                st.caption(literal(card.label), help=card.doc)
                st.metric(
                    card.label, card.value, delta=card.native, delta_color="off", delta_arrow="off",
                    label_visibility="collapsed",
                )  # fmt: skip


def _comparison(answer: Answer) -> None:
    title, switch = st.columns([3, 1], vertical_alignment="bottom")
    title.subheader("Strategies side by side", anchor=False)
    with switch:
        show_bands = read_show_bands()
    st.table(
        tables.comparison_table(answer, show_bands=show_bands), hide_index=True, border="horizontal",
        alt="One row per strategy: memory, latency, throughput, cost, energy and quality",
    )  # fmt: skip
    if missing := [metric.header for metric in tables.unknown_to_all(answer)]:
        st.caption(f"Unknown for every strategy: {literal(', '.join(missing))}.")


def _charts(answer: Answer) -> None:
    is_estimate = any(row.report is not None and row.report.method == "estimate" for row in answer)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Speed against throughput", anchor=False)
        _pareto(answer, PARETO_X[1] if is_estimate else PARETO_X[0])
    with right:
        st.subheader("Memory", anchor=False)
        st.caption("The KV pool keeps its size; what changes is how many tokens, or sequences, fit into it.")
        _draw(charts.memory_chart(answer), "memory")
    st.subheader("Four effects, apart", anchor=False)
    st.caption(
        "Capacity: sequences that fit. Prefill tax: what the compression adds to a prompt's time. Decode gain: one "
        "step at the same batch and context. Queueing: native's wait over this strategy's."
    )
    _draw(charts.effects_chart(answer), "effects")
    st.subheader("Busy time in prefill and decode", anchor=False)
    _draw(charts.time_chart(answer), "time")


def _pareto(answer: Answer, default_x: str) -> None:
    across, up = st.columns(2)
    x_tag = across.selectbox(
        "Across", PARETO_X, index=PARETO_X.index(default_x), key=f"pareto_x_{default_x}", format_func=_header
    )
    y_tag = up.selectbox("Up", PARETO_Y, key="pareto_y", format_func=_header)
    _draw(charts.pareto_chart(answer, x_tag, y_tag), "pareto")


def _header(tag: str) -> str:
    return METRIC_BY_TAG[tag].header


def _draw(chart: Chart, key: str) -> None:
    st.plotly_chart(chart.figure, key=f"{key}_chart", config=CHART_CONFIG, alt=chart.alt)


def _detail(answer: Answer) -> None:
    st.subheader("One strategy in detail", anchor=False)
    reports = {row.strategy: row.report for row in answer if row.report is not None}
    name = st.selectbox("Strategy", tuple(reports), key="detail", label_visibility="collapsed")
    report = reports[name]
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown(f"**Memory waterfall of one device**, {report.kv.capacity_tokens:,} tokens fit")
        _draw(charts.memory_waterfall(report), "waterfall")
        st.table(tables.memory_table(report), hide_index=True, border="horizontal")
    with right:
        st.markdown(f"**Latency**, {report.latency.ttft.count:,} requests" if report.method == "simulation" else
                    "**Latency**, the mean request; percentiles need a simulation")  # fmt: skip
        st.table(tables.latency_table(report), hide_index=True, border="horizontal")
        st.markdown(f"**Busy engine time**, bottleneck: {literal(report.bottleneck)}")
        st.table(tables.time_table(report), hide_index=True, border="horizontal")
        _quality(report)


def _quality(report: Report) -> None:
    st.markdown(f"**Quality**: {report.quality.status}")
    for warning in report.quality.warnings:
        st.warning(literal(warning), icon=":material/psychology:")
    if report.quality.notes:
        st.table(tables.quality_table(report), hide_index=True, border="horizontal")
        st.caption("Scores of the publication's model and task, not of yours. ~: read between two published sizes.")


def _foot(question: Question, answer: Answer) -> None:
    with st.expander("Every metric"):
        st.dataframe(tables.metric_table(answer), hide_index=True, height=420, alt="Every metric of every strategy")
    with st.expander("Where the numbers come from"):
        _provenance(answer)
    name = f"kvsim-{question.scenario.fingerprint()[:12]}"
    files = (
        ("Metrics (CSV)", exports.metrics_csv(answer), f"{name}.csv", "text/csv"),
        ("Scenario (YAML)", exports.scenario_yaml(question), f"{name}.yaml", "application/yaml"),
        ("Reports (JSON)", exports.reports_json(answer), f"{name}.json", "application/json"),
    )
    with st.container(horizontal=True):
        for label, data, file_name, mime in files:
            st.download_button(label, data, file_name, mime, on_click="ignore", icon=":material/download:")
    st.caption(
        "The address of this page holds every choice of the form; copy it to share them. An uploaded trace is not part "
        "of it."
    )


def _provenance(answer: Answer) -> None:
    report = next(row.report for row in answer if row.report is not None)
    provenance = report.provenance
    price = report.cost.price
    priced = UNKNOWN
    if price is not None:
        priced = (
            f"{price.usd_per_device_hour:g} USD per device-hour, {price.provider} {price.commitment}, "
            f"{price.as_of} ({price.source})"
        )
    facts = {
        "kvsim": provenance.kvsim_version,
        "Method": report.method,
        "Calibration": provenance.calibration,
        "Device": provenance.device,
        "Model": f"{provenance.model}: {provenance.model_source}",
        "Workload": provenance.workload_source,
        "Price": priced,
    }
    st.table({"": list(facts), "Source": [literal(fact) for fact in facts.values()]}, hide_index=True)
    lines = [
        f"- **{literal(row.strategy)}**, busy time priced as: {literal(basis_cell(row.report).text)}"
        for row in answer
        if row.report is not None
    ]
    st.markdown("\n".join([*lines, *(f"- {literal(note)}" for note in shared_notes(answer))]))
