"""The example files run as they stand."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCENARIOS = sorted(path.name for path in EXAMPLES.glob("*.yaml") if not path.name.startswith("sweep"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_examples_can_be_estimated_or_played(invoke, name):
    # The closed form has no drafts.
    command, method = ("estimate", "estimate")
    if "speculative_config" in (EXAMPLES / name).read_text():
        command, method = ("simulate", "simulation")
    result = invoke(command, EXAMPLES / name, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["method"] == method


def test_sweep_example_runs(invoke, tmp_path):
    result = invoke("sweep", EXAMPLES / "sweep-strategies.yaml", "-o", tmp_path / "s.csv", "--estimate", "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["ok"] == 12
