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
    header, *rows = ([cell.strip() for cell in line.split("|")] for line in body.splitlines() if "`" in line)
    (minicache,) = (dict(zip(header, row, strict=True)) for row in rows if row[1] == "`minicache`")
    kinds = {f"`{name}`": minicache[f"`{name}`"] for name in ("streaming_llm", "snapkv", "h2o", "tova", "quest")}
    assert list(kinds.values()) == ["yes", "2", "2", "2", "yes"]
    assert "| `cla-2` | priced |" in body
    for number in range(1, len(tool.RULES) + 1):
        assert f"\n{number}. " in body
