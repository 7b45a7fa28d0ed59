"""The generated tables of weighted atoms, and the worked example of `kvsim risk`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvsim.cli import build_app
from kvsim.quality.risk.comparators import squared_output
from kvsim.tensors.ensemble import draw, preset

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT / "tools")
        yield importlib.import_module("write_risk")


def _rows(tool, name: str) -> list[list[str]]:
    text = tool.PAGE.read_text(encoding="utf-8")
    body = re.search(rf"<!-- {name}: begin.*?-->\n(.*?)<!-- {name}: end -->", text, re.DOTALL)
    assert body is not None
    lines = [line for line in body[1].splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


CHEAP = ("weighted atoms", "count weights", "clusters only", "agnostic", "heavy hitters")


def test_measured_cells_come_out_again(tool):
    """One row, of what is quick to measure: run python tools/write_risk.py after a change of the method."""
    case, count = "retrieval, question seen", 64
    name, changes = tool.CASES[case]
    heads = list(tool.heads_of(draw(preset(name, **tool.SHAPE | changes), tool.SEED)))
    size = sum(squared_output(view) for view, _ in heads)
    written = next(row for row in _rows(tool, "ensembles") if row[:2] == [case, str(count)])
    for one in CHEAP:
        error = sum(tool.MEASURES[one](view, sample, count) for view, sample in heads)
        cell = float(written[2 + list(tool.MEASURES).index(one)])
        # The last digits of products depend on the machine's linear algebra, and cuts between near ties on them.
        assert (error / size) ** 0.5 == pytest.approx(cell, rel=0.02, abs=0.001), one


def test_all_cases_and_counts_are_there(tool):
    assert {(row[0], row[1]) for row in _rows(tool, "ensembles")[2:]} == {
        (case, f"{count:,}") for case in tool.CASES for count in tool.COUNTS
    }
    assert [row[0] for row in _rows(tool, "rates")[2:]] == [*tool.CASES, "all"]
    assert {row[1] for row in _rows(tool, "small models")[2:] if row[1].isdecimal()} == set(map(str, tool.SMALL_COUNTS))


def test_the_worked_example_comes_out_again():
    text = (CHECKOUT / "docs" / "risk.md").read_text(encoding="utf-8")
    command = re.search(r"^kvsim (risk --ensemble \S+) --budget (\S+)$", text, re.MULTILINE)
    assert command is not None
    answer = json.loads(CliRunner().invoke(build_app(), [*command[1].split(), "--budget", command[2], "--json"]).stdout)
    for head in answer["heads"]:
        name = f"L{head['layer']}H{head['kv_head']}"
        cells = next(line.split() for line in text.splitlines() if line.split()[:1] == [name])
        assert float(cells[1]) == pytest.approx(head["effective_tokens"], rel=0.01)
        assert float(cells[4]) == pytest.approx(head["effective_rank"], rel=0.01)
    for sentence in answer["verdict"]:
        assert sentence in " ".join(text.split())
