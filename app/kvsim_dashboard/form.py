"""The form: what to ask, every choice held in the page's address so that the link can be shared."""

from __future__ import annotations

from typing import Final, get_args

import streamlit as st

from kvsim.compression import STRATEGIES, describe_strategy
from kvsim.device_catalog import list_devices, load_device
from kvsim.metrics import METRIC_BY_TAG
from kvsim.model_catalog import list_models
from kvsim.specs.workload import SyntheticWorkload, TraceFormat
from kvsim.workload_catalog import list_workloads, load_workload
from kvsim_dashboard.plain_text import literal
from kvsim_dashboard.question import MAX_UPLOAD_MIB, Choices, TraceUpload
from kvsim_dashboard.verdict import CRITERIA

TRACE_FILE: Final = "upload a trace"
"""The workload choice that stands for an uploaded file."""
DEFAULT_STRATEGIES: Final = (
    "native", "fp8", "int8_per_token_head", "kivi-4", "turboquant_4bit_nc", "snapkv", "streaming_llm", "quest",
)  # fmt: skip
LINK_KEYS: Final = (
    "model", "device", "workload", "strategies", "tensor_parallel_size", "max_num_seqs", "request_rate",
    "max_concurrency", "ttft_ms", "tpot_ms", "judge_by", "bands",
)  # fmt: skip
"""Keys of all bound widgets: the parameters of a share link."""
FORMAT_LABELS: Final = {
    "azure": "Azure LLM inference trace (CSV)",
    "mooncake": "Mooncake (JSONL with prefix hashes)",
    "columns": "Plain CSV, JSONL or Parquet with named columns",
    "burstgpt": "BurstGPT (CSV)",
    "vllm_bench": "vLLM bench result (JSON)",
    "sharegpt": "ShareGPT lengths (JSON)",
}
AS_WORKLOAD: Final = "auto"
"""Placeholder of a field that may stay empty."""


def read_choices() -> Choices | None:
    """Draw the form in the sidebar and take its values; None while a chosen upload is missing."""
    with st.sidebar:
        model, device = _what_and_where()
        workload, trace = _workload()
        strategies = _strategies()
        rate, concurrency = _load()
        ttft_ms, tpot_ms = _objectives()
        ranks, sequences = _engine()
    if workload == TRACE_FILE and trace is None:
        return None
    return Choices(
        model=model, device=device, workload=workload, strategies=strategies, tensor_parallel_size=ranks,
        max_num_seqs=sequences, request_rate=rate, max_concurrency=concurrency, ttft_ms=ttft_ms, tpot_ms=tpot_ms,
        trace=trace,
    )  # fmt: skip


def read_criterion() -> str:
    """Draw the choice of the metric that ranks strategies, and give its tag."""
    # A bound widget writes its labels into the address, so the labels themselves are the options.
    tags = {METRIC_BY_TAG[tag].header: tag for tag in CRITERIA}
    header = st.selectbox(
        "Judge by", tuple(tags), key="judge_by", bind="query-params",
        help="The metric that decides which strategy comes first.",
    )  # fmt: skip
    return tags[header]


def read_show_bands() -> bool:
    """Draw the choice of showing what each figure rests on."""
    return st.toggle(
        "Bands and basis", value=True, key="bands", bind="query-params",
        help="Below each figure: the range between the optimistic and the pessimistic edge of the estimates, and what "
        "the figure rests on.",
    )  # fmt: skip


def _what_and_where() -> tuple[str, str]:
    models, devices = list_models(), list_devices()
    model = st.selectbox(
        "Model", models, index=models.index("llama-3.1-8b"), key="model", bind="query-params",
        help="Presets of kvsim. Any other Hugging Face config.json runs with the command line.",
    )  # fmt: skip
    device = st.selectbox(
        "Device", devices, index=devices.index("h100-sxm"), key="device", bind="query-params",
        help="Datasheet figures with their sources; kvsim list devices tells more.",
    )  # fmt: skip
    st.caption(literal(load_device(device).spec.title))
    return model, device


def _workload() -> tuple[str, TraceUpload | None]:
    names = (*list_workloads(), TRACE_FILE)
    workload = st.selectbox(
        "Workload", names, index=names.index("chat"), key="workload", bind="query-params",
        help="Request lengths fitted from public traces, or a trace of your own.",
    )  # fmt: skip
    if workload == TRACE_FILE:
        return workload, _trace()
    spec = load_workload(workload)
    if isinstance(spec, SyntheticWorkload):
        rate = getattr(spec.arrivals, "request_rate", None)
        load = f" at {rate:g} req/s" if rate is not None else ""
        st.caption(f"Preset: {spec.num_prompts:,} requests, {spec.arrivals.kind} arrivals{load}")
    return workload, None


def _trace() -> TraceUpload | None:
    trace_format = st.selectbox(
        "Trace format", get_args(TraceFormat), key="trace_format", format_func=lambda name: FORMAT_LABELS[name]
    )
    upload = st.file_uploader(
        "Trace file", type=["csv", "jsonl", "json", "parquet", "gz"], key="trace_file",
        max_upload_size=MAX_UPLOAD_MIB, help="Read for lengths and times, on this server only; not kept after the run.",
    )  # fmt: skip
    names = ["", "", ""]
    if trace_format == "columns":
        names = [
            st.text_input("Timestamp column [s]", key="timestamp_column", placeholder="none: give a request rate"),
            st.text_input("Prompt tokens column", key="prompt_tokens_column", placeholder="prompt_tokens"),
            st.text_input("Output tokens column", key="output_tokens_column", placeholder="output_tokens"),
        ]
    if upload is None:
        return None
    return TraceUpload(upload.name, trace_format, upload.getvalue(), *(name.strip() for name in names))


def _strategies() -> tuple[str, ...]:
    chosen = st.multiselect(
        "Strategies", STRATEGIES, default=list(DEFAULT_STRATEGIES), key="strategies", bind="query-params",
        help="Token selection, KV encoding, or both joined by +. Keep native in: the others are compared with it.",
    )  # fmt: skip
    if chosen:
        with st.expander("What the chosen strategies do"):
            st.markdown("\n".join(f"- **{literal(name)}**: {literal(describe_strategy(name))}" for name in chosen))
    return tuple(chosen)


def _load() -> tuple[float | None, int | None]:
    rate = st.number_input(
        "Request rate [req/s]", min_value=0.001, max_value=100_000.0, value=None, step=1.0, format="%g",
        key="request_rate", bind="query-params", placeholder=AS_WORKLOAD,
        help="Poisson arrivals at this rate; empty keeps the workload's own.",
    )  # fmt: skip
    concurrency = st.number_input(
        "Concurrency", min_value=1, max_value=100_000, value=None, step=1, key="max_concurrency", bind="query-params",
        placeholder=AS_WORKLOAD,
        help="Closed loop: so many clients, each sending its next request when one ends.",
    )  # fmt: skip
    return rate, concurrency


def _objectives() -> tuple[float | None, float | None]:
    ttft_ms = st.number_input(
        "SLO TTFT [ms]", min_value=0.001, max_value=3.6e6, value=None, step=100.0, format="%g", key="ttft_ms",
        bind="query-params", placeholder="none", help="Longest acceptable time to first token.",
    )  # fmt: skip
    tpot_ms = st.number_input(
        "SLO TPOT [ms]", min_value=0.001, max_value=3.6e6, value=None, step=10.0, format="%g", key="tpot_ms",
        bind="query-params", placeholder="none", help="Longest acceptable time per output token after the first.",
    )  # fmt: skip
    return ttft_ms, tpot_ms


def _engine() -> tuple[int, int]:
    left, right = st.columns(2, vertical_alignment="bottom")
    ranks = left.number_input(
        "Tensor parallel size", min_value=1, max_value=1024, value=1, step=1, key="tensor_parallel_size",
        bind="query-params", help="Devices that share one copy of the model (vLLM's tensor_parallel_size).",
    )  # fmt: skip
    sequences = right.number_input(
        "Max num seqs", min_value=1, max_value=65_536, value=256, step=1, key="max_num_seqs", bind="query-params",
        help="Most sequences that run at once (vLLM's max_num_seqs).",
    )  # fmt: skip
    return ranks, sequences
