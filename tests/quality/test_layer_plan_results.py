"""The committed tables of layer plans, and what their page says of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvsim.compression import parse_compression
from kvsim.compression.plan_file import load_plan
from kvsim.quality.small_model.plan_questions import decode_question, questions
from kvsim.quality.small_model.plan_results import ALL, CALIBRATED, ORACLE, PlanRow, load_plan_results

CHECKOUT = Path(__file__).resolve().parents[2]
TOTALS = tuple(one.name for one in questions())
DEEP = ("plain-seed1", "plain-seed2", "smeared-seed1", "smeared-seed2")


@pytest.fixture(scope="module")
def page_tool() -> ModuleType:
    place = CHECKOUT / "tools" / "layer_plan_page.py"
    spec = importlib.util.spec_from_file_location("layer_plan_page", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layer_plan_page"] = module
    spec.loader.exec_module(module)
    return module


def _row(model: str, total: str, name: str) -> PlanRow:
    return next(row for row in load_plan_results().over(model, total) if row.name == name)


def test_the_page_is_what_the_tool_writes(page_tool: ModuleType) -> None:
    text = (CHECKOUT / "docs" / "layer-plans.md").read_text(encoding="utf-8")
    found = page_tool.TABLES.search(text)
    assert found is not None
    assert found[0] == f"{found[1]}\n{chr(10).join(page_tool.tables(load_plan_results()))}\n{found[2]}"


def test_every_plan_parses_and_keeps_the_total() -> None:
    for row in load_plan_results().rows:
        if row.strategy:
            assert parse_compression(row.strategy).name == row.strategy
    for total in (*TOTALS[:2],):
        share = {"keep 25 %": 0.25, "keep 50 %": 0.5}[total]
        for row in load_plan_results().rows:
            if row.question == total:
                assert row.bits_per_element == pytest.approx(16 * share, rel=1e-3)


@pytest.mark.parametrize("total", TOTALS)
def test_a_plan_by_kl_beats_the_best_uniform_policy(total: str) -> None:
    """On held-out sequences, over all models, and in each of four layers; against the oracle too."""
    for model in (ALL, *DEEP):
        row = _row(model, total, "KL")
        assert row.gain_low > 0
        assert row.oracle_low > 0


@pytest.mark.parametrize("total", TOTALS)
def test_the_gain_is_in_the_budgets(total: str) -> None:
    both, policy, budget = (_row(ALL, total, name).gain for name in ("KL", "KL, policy only", "KL, budget only"))
    assert budget > 0.8 * both
    assert policy < 0.1 * both


@pytest.mark.parametrize("total", TOTALS[:2])
def test_a_plan_by_local_deviation_is_far_from_one_by_kl(total: str) -> None:
    assert _row(ALL, total, "local").gain < 0.2 * _row(ALL, total, "KL").gain


def test_baselines_are_the_best_of_their_kind() -> None:
    for total in (*TOTALS, decode_question().name):
        rows = load_plan_results().over(ALL, total)
        uniforms = [row for row in rows if row.kind == "uniform"]
        oracle = _row(ALL, total, ORACLE)
        assert oracle.score == max(row.score for row in uniforms)
        assert _row(ALL, total, CALIBRATED).gain == 0.0


def test_the_example_is_a_plan_of_the_table() -> None:
    example = load_plan(CHECKOUT / "examples" / "layer-plan.yaml")
    exact = example.strategy.replace("layer_plan:relative", "layer_plan")
    assert _row("plain-seed1", "keep 50 %", "KL").strategy == exact
