"""What drawing a token costs, and whose sampling parameters apply."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cost_cases import step_model
from hypothesis import given
from hypothesis import strategies as st

from kvsim.catalog import resolve
from kvsim.closed_form import decode_split
from kvsim.cost.priors import Edge
from kvsim.data_files import preset_dir
from kvsim.documents import validate
from kvsim.errors import InvalidSpec
from kvsim.model_catalog import list_models, load_model
from kvsim.ops import Component
from kvsim.scenario import Scenario
from kvsim.specs.engine import SamplingSpec

GREEDY, DRAWN, NUCLEUS = {"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}


def seconds(sampled, model: str = "mistral-nemo-12b", device: str = "h100-sxm", edge: Edge = Edge.CENTRAL, **engine):
    return step_model(deployed(model, device, **engine), edge).sampling_seconds(sampled)


def deployed(model: str = "mistral-nemo-12b", device: str = "h100-sxm", **engine: object):
    return resolve(Scenario.model_validate({"model": model, "device": device, "workload": "chat", "engine": engine}))


@pytest.mark.parametrize("device", ["h100-sxm", "b200-sxm", "rtx-4090"])
def test_sorting_costs_more_than_drawing_and_drawing_more_than_taking_the_largest(device: str):
    for sampled in (1, 64, 256):
        greedy, drawn, nucleus = (seconds(sampled, device=device, sampling=one) for one in (GREEDY, DRAWN, NUCLEUS))
        assert 0 < greedy < drawn < nucleus
        spared = seconds(sampled, device=device, sampling=NUCLEUS, use_flashinfer_sampler=True)
        assert spared == pytest.approx(drawn)


@pytest.mark.parametrize(("sampled", "vocabulary", "measured_ms"), [(128, 131_072, 2.318), (56, 32_768, 0.393)])
def test_the_sort_is_what_vllm_measured(sampled: int, vocabulary: int, measured_ms: float):
    """PyTorch columns of vLLM PRs 33538 and 40376."""
    sort_s = seconds(sampled, sampling=NUCLEUS) - seconds(sampled, sampling=DRAWN)
    launch_s = seconds(1, sampling=NUCLEUS) - seconds(1, sampling=DRAWN)
    per_token_s = (sort_s - launch_s) / (sampled - 1) / load_model("mistral-nemo-12b").vocab_size
    predicted_s = launch_s + per_token_s * (sampled * vocabulary - load_model("mistral-nemo-12b").vocab_size)
    assert 1e3 * predicted_s == pytest.approx(measured_ms, rel=0.06)


@pytest.mark.parametrize(("sequences", "measured_us"), [(1, 25.0), (112, 92.8), (208, 230.2)])
def test_greedy_sampling_on_rtx_4090_is_of_the_measured_size(sequences: int, measured_us: float):
    """LLMServingSim's layer profile of vLLM 0.19, Llama-3.1-8B: small ones are found in the L2."""
    predicted = 1e6 * seconds(sequences, model="llama-3.1-8b", device="rtx-4090", sampling=GREEDY)
    assert measured_us / 1.25 <= predicted <= 2.2 * measured_us


@given(sampled=st.integers(1, 1024), edge=st.sampled_from(list(Edge)))
def test_sampling_is_linear_and_counts_as_overhead(sampled: int, edge: Edge):
    one, two, many = (seconds(n, edge=edge, sampling=NUCLEUS) for n in (1, 2, sampled))
    assert many == pytest.approx(one + (sampled - 1) * (two - one))
    assert seconds(0, sampling=NUCLEUS) == 0.0
    assert seconds(np.array([0.0, 1.0]), edge=edge, sampling=NUCLEUS).tolist() == [0.0, one]


def test_sampling_is_all_that_differs_in_a_step():
    splits = [decode_split(step_model(deployed(sampling=one)), 64, 1000, 0) for one in (GREEDY, NUCLEUS)]
    apart = seconds(64, sampling=NUCLEUS) - seconds(64, sampling=GREEDY)
    assert splits[1][Component.OVERHEAD] - splits[0][Component.OVERHEAD] == pytest.approx(apart)
    same = set(Component) - {Component.OVERHEAD}
    assert {part: splits[0][part] for part in same} == {part: splits[1][part] for part in same}


def test_the_models_own_parameters_apply_where_the_scenario_states_none():
    assert deployed("qwen2.5-7b").sampling == SamplingSpec(temperature=0.7, top_p=0.8, top_k=20)
    assert deployed("qwen2.5-7b", sampling={"top_p": 1.0}).sampling == SamplingSpec(
        temperature=0.7, top_p=1.0, top_k=20
    )
    assert deployed("qwen2.5-7b", sampling=GREEDY).sampling.is_greedy
    assert deployed("mistral-nemo-12b").sampling == SamplingSpec()
    assert SamplingSpec().is_greedy
    assert not SamplingSpec(temperature=0.0, top_p=0.5).truncates
    assert SamplingSpec(temperature=1.0, top_k=40).truncates
    assert not SamplingSpec(temperature=1.0, top_k=-1).truncates


def test_presets_that_state_sampling_say_where_from():
    stated = 0
    for name in list_models():
        document = json.loads((preset_dir("models") / f"{name}.json").read_text())
        assert (load_model(name).generation is None) == ("generation" not in document)
        if "generation" in document:
            stated += 1
            assert "generation_config.json" in document["generation"]["source"]
    assert stated >= 5


@pytest.mark.parametrize("device", ["apple-m4-max", "mi300x"])
def test_a_fit_of_whole_engines_has_plain_sampling_in_it(device: str):
    deployment = deployed("qwen3-8b", device, sampling=DRAWN)
    assert deployment.engine_fit is not None
    assert step_model(deployment).sampling_seconds(8) == 0.0


def test_llamacpp_draws_on_the_host():
    assert seconds(8, kind="llamacpp", sampling=NUCLEUS) == 0.0


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -2), ("min_p", 0.1)]
)
def test_impossible_parameters_are_refused_by_name(field: str, value: float):
    document = {
        "model": "llama-3.1-8b",
        "device": "h100-sxm",
        "workload": "chat",
        "engine": {"sampling": {field: value}},
    }
    with pytest.raises(InvalidSpec, match=rf"engine\.sampling\.{field}"):
        validate(Scenario, document, "scenario.yaml")
