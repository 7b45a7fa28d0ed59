"""The page's section on the Shannon limit: measured on request, and remembered."""

from __future__ import annotations

from typing import Final

import streamlit as st

from kvsim.errors import KvsimError
from kvsim.limit import LimitAnswer, find_limit, token_id_tier
from kvsim.limit.source import DEFAULT_ENSEMBLE, from_ensemble
from kvsim.rendering.limit import token_id_sentence
from kvsim_dashboard.limit_chart import outside, rate_distortion_chart
from kvsim_dashboard.plain_text import literal
from kvsim_dashboard.tables import Table

MEASURE: Final = "measure_limit"
CONTEXT_TOKENS: Final = 8192
CHART_CONFIG: Final = {"displayModeBar": False}


@st.cache_data(show_spinner="Measuring every encoding on the ensemble, about a minute", max_entries=8)
def _measured(ensemble: str) -> LimitAnswer:
    """Measure the ensemble once for all sessions; it is a frozen value."""
    source = from_ensemble(ensemble)
    return find_limit(source.caches, source.samples)


def show_limit(model: str, device: str) -> None:
    """Draw the section; nothing is measured before someone asks."""
    st.subheader("Distance to the Shannon limit", anchor=False)
    words, button = st.columns([3, 1], vertical_alignment="center")
    words.caption(
        f"Every encoding, run on the seeded ensemble {literal(DEFAULT_ENSEMBLE)}: made-up KV with stated statistics, "
        "not a model's. An error of K and V is not a score."
    )
    if button.button("Measure", icon=":material/straighten:", width="stretch", key=f"{MEASURE}_button"):
        st.session_state[MEASURE] = True
    if not st.session_state.get(MEASURE):
        return
    answer = _measured(DEFAULT_ENSEMBLE)
    chart = rate_distortion_chart(answer)
    st.plotly_chart(chart.figure, key="limit_chart", config=CHART_CONFIG, alt=chart.alt)
    if left_out := outside(answer):
        names = ", ".join(f"{point.strategy} ({point.bits_per_value:.3g} bits)" for point in left_out)
        st.caption(f"Beyond the axes, or lossless: {literal(names)}.")
    with st.expander("Bits, errors and gaps", expanded=False):
        st.table(limit_table(answer), hide_index=True, border="horizontal")
        for note in answer.notes:
            st.caption(literal(note))
        if answer.not_measured:
            lines = [f"- {literal(one.strategy)}: {literal(one.reason)}" for one in answer.not_measured]
            st.markdown("\n".join(["Without a point:", *lines]))
    _token_ids(model, device)


def limit_table(answer: LimitAnswer) -> Table:
    """One row per encoding, most bits first."""
    points = answer.points

    def shown(gap: float | None) -> str:
        return "-" if gap is None else f"{gap:+.2f}"

    return {
        "Encoding": [literal(point.strategy) for point in points],
        "Family": [point.family for point in points],
        "Bits per value": [f"{point.bits_per_value:.3g}" for point in points],
        "Error of K": [f"{point.key_relative_mse:.3g}" for point in points],
        "Error of V": ["-" if (v := point.value_relative_mse) is None else f"{v:.3g}" for point in points],
        "Bits above 4^-R": [shown(point.gap_isotropic_bits) for point in points],
        "above head covariance": [shown(point.gap_head_bits) for point in points],
        "above layer covariance": [shown(point.gap_layer_bits) for point in points],
        "Judged by": [point.applies for point in points],
    }


def _token_ids(model: str, device: str) -> None:
    """The tier that is no point of the plot, for the model and device of the form where they fit together alone."""
    try:
        tier = token_id_tier(model, device, CONTEXT_TOKENS)
    except KvsimError as error:
        st.caption(f"Token ids and recompute, for {literal(model)} on one {literal(device)}: {literal(str(error))}")
        return
    st.info(literal(token_id_sentence(tier)), icon=":material/replay:")
