"""kvsim's dashboard. Start it with ``kvsim dashboard``, or ``streamlit run`` on this file."""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st
from kvsim_dashboard.answers import Answer, ask, known_answer
from kvsim_dashboard.form import LINK_KEYS, read_choices
from kvsim_dashboard.link import ignored_parameters
from kvsim_dashboard.page import show_answer
from kvsim_dashboard.plain_text import literal
from kvsim_dashboard.question import Question, build_question
from streamlit.delta_generator import DeltaGenerator

from kvsim.errors import KvsimError

LINK_READ = "link_was_read"


def main() -> None:
    """Draw the page once; Streamlit calls this again after every change."""
    st.set_page_config(page_title="kvsim", layout="wide")
    written = _link_of_first_run()
    st.title("kvsim", anchor=False)
    st.markdown("What a KV-cache compression costs, and what it saves, on this device under this load.")
    notices = st.container()
    _ask_and_show()
    _show_link_notices(written, notices)


def _ask_and_show() -> None:
    """Form, question, answer; what the user can mend is said in kvsim's own words."""
    choices = read_choices()
    if choices is None:
        st.info("Upload a trace in the form, or choose another workload.", icon=":material/upload_file:")
        return
    try:
        question = build_question(choices)
        answer = _answer(question)
    except KvsimError as error:
        st.error(literal(str(error)), icon=":material/error:")
        return
    show_answer(question, answer)


def _answer(question: Question) -> Answer:
    """Estimate at once; simulate when asked, and keep showing that until a choice changes."""
    words, button = st.columns([3, 1], vertical_alignment="center")
    simulated = known_answer(question, "simulation")
    asked = button.button(
        "Simulate", type="primary", disabled=simulated is not None, width="stretch", icon=":material/play_arrow:",
        help="Play the workload request by request, under every strategy.",
    )  # fmt: skip
    if asked:
        bar = st.progress(0.0, "Simulating")
        ask(question, "simulation", _progress_on(bar))
        st.rerun()
    if simulated is not None:
        words.markdown(":green-badge[simulation] Every request was played. Bands are the edges of the estimates.")
        return simulated
    words.markdown(
        ":blue-badge[estimate] Closed form for the mean request in a steady state, without a queue. **Simulate** plays "
        "every request, for percentiles and queueing."
    )
    return ask(question, "estimate")


def _progress_on(bar: DeltaGenerator) -> Callable[[float], None]:
    """Move ``bar`` when the share done reaches the next percent."""
    shown = -1

    def advance(share: float) -> None:
        nonlocal shown
        percent = int(100 * min(1.0, max(0.0, share)))
        if percent > shown:
            shown = percent
            bar.progress(percent, f"Simulating, {percent} %")

    return advance


def _link_of_first_run() -> dict[str, list[str]]:
    """Parameters of the address that opened the page, before any widget is drawn; empty on later runs."""
    if LINK_READ in st.session_state:
        return {}
    st.session_state[LINK_READ] = True
    return {name: st.query_params.get_all(name) for name in st.query_params}


def _show_link_notices(written: dict[str, list[str]], notices: DeltaGenerator) -> None:
    """Say which parameters were not followed; a widget that was not drawn has nothing to say."""
    undrawn = [name for name in LINK_KEYS if name not in st.session_state]
    effective = {name: st.session_state[name] for name in LINK_KEYS if name not in undrawn}
    drawn = {name: values for name, values in written.items() if name not in undrawn}
    for sentence in ignored_parameters(drawn, effective):
        notices.warning(f"The link: {literal(sentence)}", icon=":material/link_off:")


main()
