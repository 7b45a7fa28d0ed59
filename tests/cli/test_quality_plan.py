"""``kvsim quality plan``, and plan files wherever a command takes a strategy."""

from __future__ import annotations

import json

import pytest

from kvsim.compression.plan_file import PlanFile, load_plan, write_plan
from kvsim.tensors.ensemble import draw, parse_ensemble
from kvsim.tensors.files import write_kv

SMALL = "retrieval(num_layers=3,num_tokens=256,num_needles=2,num_queries=4)"


def test_a_plan_is_made_shown_and_kept(invoke, tmp_path):
    out = tmp_path / "plan.yaml"
    result = invoke("quality", "plan", "--ensemble", SMALL, "-c", "streaming_llm,h2o", "--sequences", "1", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "PolyKV-style" in result.stderr
    assert "on held-out sequences" in result.stdout
    plan = load_plan(out)
    assert len(plan.selections) == 3
    assert plan.evidence["held_out_harm"] > 0
    assert all(f"{entry} " in result.stdout for entry in plan.selections)


def test_a_plan_that_does_not_beat_one_policy_says_so(invoke):
    # One candidate at one size in all layers is the uniform policy itself.
    result = invoke("quality", "plan", "--ensemble", SMALL, "-c", "keydiff", "--sequences", "1", "--keep", "0.015625")
    assert result.exit_code == 0, result.stderr
    assert "no better than keydiff:0.984375 in every layer" in result.stderr


def test_json_has_the_figures_and_a_name_that_parses(invoke):
    flags = ("-c", "turboquant_mse:2,turboquant_mse:4", "--bits", "3.5", "--sequences", "1", "--json")
    result = invoke("quality", "plan", "--ensemble", SMALL, *flags)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["strategy"].startswith("layer_encodings[")
    assert document["calibration_harm"] <= document["best_uniform_calibration_harm"]
    again = invoke("quality", "run", "--ensemble", SMALL, "-s", document["strategy"], "--json")
    assert json.loads(again.stdout)["strategies"][0]["reason"] is None


def test_files_are_calibrated_on_and_tested(invoke, tmp_path):
    spec, seed = parse_ensemble(SMALL)
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for index, path in enumerate(paths):
        write_kv(draw(spec, seed, sequence=index), path)
    result = invoke("quality", "plan", "--kv", paths[0], "--test", paths[1], "-c", "h2o", "--keep", "0.5", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["held_out_harm"] is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "give one of --ensemble"),
        (("--ensemble", SMALL, "--by", "kl"), "--by kl asks a model"),
        (("--ensemble", SMALL, "--test", "x.safetensors"), "--test goes with --kv"),
        (("--ensemble", SMALL, "--keep", "0.3"), "whole 64ths"),
        (("--ensemble", SMALL, "--keep", "0.5", "--bits", "4"), "give one of --keep"),
        (("--ensemble", SMALL, "-c", "fp8"), "token selections go with --keep"),
        (("--ensemble", SMALL, "-o", "plan.txt"), ".yaml"),
    ],
)
def test_wrong_flags_say_what_goes(invoke, flags, message):
    result = invoke("quality", "plan", *flags)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_stands_wherever_a_strategy_does(invoke, tmp_path):
    path = tmp_path / "plan.yaml"
    write_plan(path, PlanFile(name="x", source="by hand", depth="relative", selections=("snapkv:0.25", "h2o:0.75")))
    name = "layer_plan:relative[snapkv:0.25;h2o:0.75]"
    scenario = ("--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat")
    one = invoke("estimate", *scenario, "--compression", path, "--json")
    assert one.exit_code == 0, one.stderr
    assert json.loads(one.stdout)["strategy"] == name
    other = invoke("estimate", *scenario, "--compression", name, "--json")
    assert one.stdout == other.stdout
    several = invoke("compare", *scenario, "-s", f"native,{path}+fp8", "--estimate", "--json")
    assert f"{name}+fp8" in several.stdout
    ran = invoke("quality", "run", "--ensemble", SMALL, "-s", path, "--json")
    assert json.loads(ran.stdout)["strategies"][0]["strategy"] == name


def test_a_scenario_file_opens_no_plan(invoke, tmp_path):
    path = tmp_path / "scenario.yaml"
    path.write_text("model: llama-3.1-8b\ndevice: h100-sxm\nworkload: chat\ncompression: plan.yaml\n")
    result = invoke("estimate", path)
    assert result.exit_code == 2
    assert "opened only where a command names it" in result.stderr
