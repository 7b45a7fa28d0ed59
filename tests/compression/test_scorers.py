"""Scorers by name, as wrappers take them."""

from __future__ import annotations

import pytest

from kvsim.compression.selection.scorers import SCORERS, named_scorer, scorer_class
from kvsim.errors import InvalidSpec, UnknownName


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_goes_by_its_published_names(name: str) -> None:
    scorer = SCORERS[name]
    assert name in scorer.names
    assert scorer_class(name.upper().replace("_", "-") + "Press") is scorer
    assert all(scorer_class(alias) is scorer for alias in scorer.aliases)
    assert named_scorer(name, compression_ratio=0.75).budget(400) == 100


def test_unknown_scorers_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UnknownName, match=r"unknown scorer 'snapk'; did you mean 'snapkv'\?"):
        scorer_class("snapk")


def test_a_scorer_that_cannot_have_the_budget_says_so() -> None:
    with pytest.raises(InvalidSpec, match="scorer 'snapkv': budget_tokens 3 is smaller than window_size 64"):
        named_scorer("snapkv", budget_tokens=3)
