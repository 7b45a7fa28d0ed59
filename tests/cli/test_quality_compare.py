"""``kvsim quality compare`` on the committed tables, and what it refuses."""

from __future__ import annotations

import json

import pytest


def test_methods_are_ranked_at_every_budget(invoke) -> None:
    result = invoke("quality", "compare", "--on", "small-model", "--bits", "3,4.5", "--json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    for budget in (3.0, 4.5):
        here = [row for row in rows if row["budget_bits"] == budget]
        assert [row["rank"] for row in here] == list(range(1, len(here) + 1))
        assert all(row["bits_per_element"] <= budget + 0.01 for row in here)
        assert [row["risk"] for row in here] == sorted(row["risk"] for row in here)
        assert len({row["method"] for row in here}) == len(here) > 3


def test_what_the_figures_mean_is_said(invoke) -> None:
    result = invoke("quality", "compare", "--on", "small-model", "--bits", "4")
    assert "relative ordering only; says nothing directly about a large model" in result.stderr
    assert "nothing is extrapolated" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--bits", "none"), "--bits 'none': numbers above 0"),
        (("--bits", "32"), "at most 16"),
        (("--task", "recal"), "did you mean 'recall'"),
        (("--model", "plain-seed9"), "unknown model 'plain-seed9'"),
        (("--strategies", "fp9"), "unknown strategy 'fp9'"),
    ],
)
def test_wrong_input_is_refused(invoke, flags, message) -> None:
    result = invoke("quality", "compare", "--on", "small-model", *flags)
    assert result.exit_code == 2
    assert message in result.stderr
