"""The example files run as they stand."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SIMULATED = {"adaptive-bursts.yaml"}
"""What no closed form answers."""
SCENARIOS = sorted(
    {path.name for path in EXAMPLES.glob("*.yaml") if not path.name.startswith(("sweep", "plan", "layer-plan"))}
    - SIMULATED
)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_examples_can_be_estimated_or_played(invoke, name):
    # The closed form has no drafts.
    command, method = ("estimate", "estimate")
    if "speculative_config" in (EXAMPLES / name).read_text():
        command, method = ("simulate", "simulation")
    result = invoke(command, EXAMPLES / name, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["method"] == method


@pytest.mark.parametrize("name", sorted(SIMULATED))
def test_examples_without_a_closed_form_can_be_simulated(invoke, name):
    result = invoke("simulate", EXAMPLES / name, "--num-prompts", 200, "--set", "bands=false", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["method"] == "simulation"
    refused = invoke("estimate", EXAMPLES / name)
    assert refused.exit_code == 2
    assert "kvsim simulate" in refused.stderr


def test_adaptive_example_compares_its_policy_with_its_levels(invoke):
    small = ("--num-prompts", 120, "--set", "bands=false", "--json")
    result = invoke("compare", EXAMPLES / "adaptive-bursts.yaml", *small)
    assert result.exit_code == 0, result.stderr
    assert [row["strategy"] for row in json.loads(result.stdout)] == ["adaptive", "static:0", "static:1", "static:2"]


def test_sweep_example_runs(invoke, tmp_path):
    result = invoke("sweep", EXAMPLES / "sweep-strategies.yaml", "-o", tmp_path / "s.csv", "--estimate", "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["ok"] == 12


def test_the_advice_for_an_adaptive_estimate_works(invoke):
    """What the refusal says to set is enough to get an answer."""
    path = EXAMPLES / "adaptive-bursts.yaml"
    refused = invoke("estimate", path)
    assert refused.exit_code == 2
    settings = ("adaptive.policy={kind: static, level: 0}", "adaptive.requantize=null")
    assert all(f"{setting}" in refused.stderr for setting in settings)
    assert invoke("estimate", path, *(word for setting in settings for word in ("--set", setting))).exit_code == 0


def test_the_example_plan_runs_on_any_model(invoke):
    plan = EXAMPLES / "layer-plan.yaml"
    for scenario in ("chat-h100.yaml", "reasoning-fp8-slo.yaml"):
        result = invoke("estimate", EXAMPLES / scenario, "--compression", plan, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["strategy"].startswith("layer_plan:relative[")


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("plan-*.yaml")))
def test_plan_examples_have_an_answer_for_every_device(invoke, name):
    few = ("-s", "native,fp8,q8_0", "--simulate", "0", "--max-devices", "1", "--num-prompts", "120", "--json")
    result = invoke("plan", EXAMPLES / name, *few)
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert all(device["runs_today"] is not None for device in answer["devices"])
