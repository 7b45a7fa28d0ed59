import json
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Term:
    phase: str
    name: str
    formula: str
    value: float
    unit: str
    low: float | None
    high: float | None
    basis: str
    source: str


@dataclass(frozen=True)
class Explanation:
    title: str
    terms: tuple[Term, ...]
    notes: tuple[str, ...]


@pytest.fixture
def explained(fake_simulate):
    terms = (
        Term("memory", "weights", "parameters x bits / 8", 16.1, "GB", None, None, "datasheet", "config.json"),
        Term("decode", "attention", "bytes / (bandwidth x eff[batch])", 1.25, "ms", 1.0, 1.5, "datasheet", "sheet"),
    )
    fake_simulate.explain = lambda scenario, *, base_dir=None: Explanation("one step", terms, ("a note",))


def test_terms_show_formula_band_and_source(invoke, explained, scenario_path):
    text = invoke("explain", scenario_path).stdout
    for words in (
        "one step",
        "bytes / (bandwidth x eff[batch])",
        "1.25 s",
        "1 s - 1.5 s",
        "config.json",
        "Note: a note",
    ):
        assert words in text


def test_terms_as_json(invoke, explained, scenario_path):
    explanation = json.loads(invoke("explain", scenario_path, "--json").stdout)
    assert [term["name"] for term in explanation["terms"]] == ["weights", "attention"]
    assert explanation["terms"][0]["low"] is None
