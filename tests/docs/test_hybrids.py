"""The generated tables of what composes with what."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT / "tools")
        yield importlib.import_module("write_hybrids")


def test_the_page_is_what_the_tool_writes(tool):
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(text) == text, "run python tools/write_hybrids.py"


def test_refusals_and_permissions_are_both_shown(tool):
    body = "\n".join(tool.rows())
    header, *rows = ([cell.strip() for cell in line.split("|")] for line in body.splitlines() if line.startswith("| "))
    minicache = dict(zip(header, next(row for row in rows if "`minicache`" in row[1]), strict=True))
    assert minicache["`streaming_llm`, `quest`"] == "yes"
    assert minicache["any other selection"] == "2"
    (cla,) = (row for row in rows if row[1] == "`cla-2`, `cla-3`")
    assert "priced" in cla
    for number in range(1, len(tool.RULES) + 1):
        assert f"\n{number}. " in body


def test_grouping_loses_no_pair(tool):
    outcomes = {"a": ("yes", "2"), "b": ("2", "2"), "c": ("yes", "2")}
    assert tool.alike(outcomes) == [("a", "c"), ("b",)]


def test_only_the_largest_group_is_called_all_others(tool):
    many = tuple(f"part{number}" for number in range(tool.MOST_NAMED + 1))
    assert tool.heading(many, [many, ("a",)], "selection") == "any other selection"
    assert tool.heading(many, [many], "selection") == "every selection"
    assert tool.heading(("a", "b"), [("a", "b"), ("c",)], "selection") == "`a`, `b`"
