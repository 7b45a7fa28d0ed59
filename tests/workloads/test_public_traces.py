"""The real Azure and Mooncake traces: totals, speed, and the presets fitted from them."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kvsim.data_files import preset_dir
from kvsim.errors import UnknownName
from kvsim.specs.workload import SyntheticWorkload, TraceWorkload
from kvsim.traces import read_trace
from kvsim.units import TICKS_PER_SECOND
from kvsim.workload_catalog import list_workloads, load_workload
from kvsim.workloads import build_requests

CHECKOUT = Path(__file__).resolve().parents[2]
TRACES = CHECKOUT.parent / "shared" / "data" / "traces"
CONV = TRACES / "azure2023" / "AzureLLMInferenceTrace_conv.csv"
CODE = TRACES / "azure2023" / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = TRACES / "mooncake_fast25" / "conversation_trace.jsonl.gz"
needs_traces = pytest.mark.skipif(
    not all(path.is_file() for path in (CONV, CODE, MOONCAKE)),
    reason="the public traces (shared/data/traces) are not beside this checkout",
)


@needs_traces
def test_azure_conversation_replay():
    table = build_requests(TraceWorkload(format="azure", path=str(CONV)), seed=0)
    assert len(table) == 19_366
    assert table.prompt_tokens.sum() == 22_361_870
    assert table.output_tokens.sum() == 4_088_665
    assert table.arrival_ticks[0] == 0
    # 18:15:46.6805900 to 19:14:08.4025270, exact on the picosecond clock.
    assert table.arrival_ticks[-1] == 35_017_219_370 * TICKS_PER_SECOND // 10**7
    assert table.source == "AzureLLMInferenceTrace_conv.csv (azure), 19366 requests, replayed"


@needs_traces
def test_azure_reads_fast():
    read_trace("azure", CONV)
    best_s = np.inf
    for _ in range(5):
        start_s = time.perf_counter()
        read_trace("azure", CONV)
        best_s = min(best_s, time.perf_counter() - start_s)
    assert best_s < 0.1


@needs_traces
def test_mooncake_replay_keeps_prefix_sharing():
    table = build_requests(TraceWorkload(format="mooncake", path=str(MOONCAKE)), seed=0)
    assert len(table) == 12_031
    assert table.prompt_tokens.sum() == 144_793_823
    assert table.output_tokens.sum() == 4_122_048
    assert table.arrival_ticks[-1] == 3_536_999 * TICKS_PER_SECOND // 1000
    assert [len(hashes) for hashes in table.prefix_hashes] == (table.prompt_tokens // 512).tolist()
    seen: set[int] = set()
    hits = 0
    for hashes in table.prefix_hashes:
        hits += sum(chunk in seen for chunk in hashes)
        seen.update(hashes)
    assert seen == set(range(len(seen)))
    # What an unlimited prefix cache would hit: 38 % of whole chunks.
    assert (hits, sum(map(len, table.prefix_hashes))) == (105_592, 276_491)


@needs_traces
def test_refitting_gives_the_committed_presets(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "tools")
    tool = importlib.import_module("fit_workload_presets")
    fitted = {name: tool.preset_yaml(name, preset) for name, preset in tool.fit_presets(TRACES).items()}
    committed = {path.stem: path.read_text() for path in preset_dir("workloads").glob("*.yaml")}
    assert fitted == committed


def three(tokens):
    return np.array([tokens.mean(), np.median(tokens), np.quantile(tokens, 0.9)])


def subset(name):
    """Prompt and output lengths of the trace rows that a preset names in fitted_from, selected here anew."""
    if name == "code":
        code = pl.read_csv(CODE)
        return code["ContextTokens"], code["GeneratedTokens"]
    conv = pl.read_csv(CONV)
    talk = (conv["ContextTokens"], conv["GeneratedTokens"])
    trace = read_trace("mooncake", MOONCAKE)
    prompts, outputs = trace.prompt_tokens, trace.output_tokens
    if name == "rag":
        rows = (prompts > 4096) & (prompts <= 16384)
        return prompts[rows], outputs[rows]
    if name == "summarization":
        rows = (prompts > 4096) & (outputs >= 100) & (prompts >= 10 * outputs)
        return prompts[rows], outputs[rows]
    return (talk[0], outputs[outputs >= 1000]) if name == "reasoning" else talk


SINGLE = sorted(["azure-conv", "chat", "code", "offline-batch", "phone-assistant", "rag", "reasoning", "summarization"])


@needs_traces
@pytest.mark.parametrize("name", SINGLE)
def test_presets_sample_like_their_trace(name):
    """Mean, median and p90 within 2.5 % (4 % for the 161 answers of `reasoning`) or one token, at 200,000 draws."""
    workload = load_workload(name).model_copy(update={"num_prompts": 200_000})
    table = build_requests(workload, seed=0)
    tolerance = 0.04 if name == "reasoning" else 0.025
    for drawn, real in zip((table.prompt_tokens, table.output_tokens), subset(name), strict=True):
        np.testing.assert_allclose(three(drawn), three(np.asarray(real)), rtol=tolerance, atol=1.0)


@needs_traces
def test_azure_twin_has_the_traces_rate_and_burstiness():
    twin = build_requests(load_workload("azure-conv"), seed=0)
    trace = build_requests(TraceWorkload(format="azure", path=str(CONV)), seed=0)
    assert len(twin) == len(trace)
    gaps = [np.diff(table.arrival_ticks / TICKS_PER_SECOND) for table in (twin, trace)]
    assert gaps[0].mean() == pytest.approx(gaps[1].mean(), rel=0.03)
    assert gaps[0].std() / gaps[0].mean() == pytest.approx(gaps[1].std() / gaps[1].mean(), rel=0.03)


@needs_traces
def test_long_context_chat_prompts_resemble_the_trace():
    """Independent draws per turn make whole prompts longer: 12 % in the mean, 6 % in the median, 14 % at p90."""
    prompts = read_trace("mooncake", MOONCAKE).prompt_tokens
    workload = load_workload("long-context-chat").model_copy(update={"num_prompts": 30_000})
    table = build_requests(workload, seed=0)
    np.testing.assert_allclose(three(table.prompt_tokens), three(prompts[prompts <= 65_536]), rtol=0.15)
    assert len(table) / np.count_nonzero(table.parent == -1) == pytest.approx(1.42, abs=0.08)


@pytest.mark.parametrize("name", list_workloads())
def test_every_preset_loads_says_its_origin_and_stays_within_128k(name):
    workload = load_workload(name)
    assert isinstance(workload, SyntheticWorkload)
    assert "CC-BY-4.0" in workload.fitted_from or "Apache-2.0" in workload.fitted_from
    assert load_workload(name) is workload
    for seed in range(3):
        table = build_requests(workload, seed=seed)
        assert len(table) == workload.num_prompts
        assert (table.prompt_tokens + table.output_tokens).max() <= 131_072
        assert workload.fitted_from in table.notes[0]


def test_catalogue_names_and_suggestions():
    names = list_workloads()
    assert set(SINGLE) | {"agentic", "long-context-chat"} == set(names)
    with pytest.raises(UnknownName, match="did you mean 'agentic'"):
        load_workload("agentik")
    with pytest.raises(UnknownName):
        load_workload("../models/x")
