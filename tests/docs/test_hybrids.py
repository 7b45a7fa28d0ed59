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
    assert "| `minicache` | yes | 2 | 2 | 2 |" in body
    assert "| `cla-2` | priced |" in body
    for number in range(1, len(tool.RULES) + 1):
        assert f"\n{number}. " in body
