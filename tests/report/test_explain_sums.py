"""explain() leaves nothing out: its terms are the step, and the device's memory."""

from __future__ import annotations

import pytest
from report_cases import CASES, scenario

from kvsim.analysis import price_edges
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.cost.priors import Edge
from kvsim.errors import KvsimError
from kvsim.explain import explain_deployment
from kvsim.prepare import prepare
from kvsim.simulate import explain
from kvsim.specs.base import Basis

STRATEGIES = ("native", "fp8", "kivi-2", "turboquant_4bit_nc", "snapkv", "quest", "palu", "tova")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("batch", [1, 5, 300])
def test_terms_add_up_to_the_step_and_to_the_device(case, strategy, batch):
    model, device, ranks = case
    try:
        prepared = prepare(scenario(model, device, ranks, compression=strategy))
    except KvsimError as error:
        pytest.skip(str(error))
    deployment = prepared.deployment
    terms = explain_deployment(deployment, prepared.plan, 1500, 200, batch).terms
    models = price_edges(deployment, Edge).mine

    def added(phase: str, field: str = "value") -> float:
        return sum(getattr(term, field) for term in terms if term.phase == phase)

    assert added("memory") == pytest.approx(deployment.device.capacity_bytes, rel=1e-12)
    assert added("decode") == pytest.approx(
        total_seconds(decode_split(models[Edge.CENTRAL], batch, 1500, 200)), rel=1e-9
    )
    assert added("prefill") == pytest.approx(total_seconds(prefill_split(models[Edge.CENTRAL], 1500)), rel=1e-9)
    # Nothing but unpacking (a difference of two maxima) can be cheaper at the slow edge: the others' edges add up too.
    slow_s = total_seconds(decode_split(models[Edge.PESSIMISTIC], batch, 1500, 200))
    fast_s = total_seconds(decode_split(models[Edge.OPTIMISTIC], batch, 1500, 200))
    assert added("decode", "low") <= fast_s * (1 + 1e-9)
    assert added("decode", "high") >= slow_s * (1 - 1e-9)
    for term in terms:
        assert term.formula
        assert term.source
        assert term.low <= term.value <= term.high, term


def test_uncaptured_steps_add_up_too():
    one = scenario("llama-3.1-8b", "h100-sxm", engine={"cuda_graphs": False})
    prepared = prepare(one)
    terms = explain_deployment(prepared.deployment, prepared.plan, 700, 50, 3).terms
    step = price_edges(prepared.deployment, [Edge.CENTRAL]).mine[Edge.CENTRAL]
    decode = sum(term.value for term in terms if term.phase == "decode")
    assert decode == pytest.approx(total_seconds(decode_split(step, 3, 700, 50)), rel=1e-9)


def test_scores_of_each_step_are_no_fitted_kernel_s():
    prepared = prepare(scenario("llama-3.1-8b", "h100-sxm", compression="tova"))
    terms = explain_deployment(prepared.deployment, prepared.plan, 1500, 200, 8).terms
    (scores,) = (term for term in terms if term.name == "unpacking KV, scoring tokens")
    assert scores.value > 0
    assert scores.basis is Basis.LITERATURE


def test_explain_uses_the_engines_own_memory_prior():
    told = explain(scenario("llama-3.2-1b", "apple-m4-max", engine={"kind": "llamacpp"}))
    (engine,) = [term for term in told.terms if term.name == "engine"]
    assert "llama.cpp" in engine.source
