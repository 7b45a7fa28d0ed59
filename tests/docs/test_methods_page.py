"""The generated tables of all methods."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kvsim.compression import ENCODINGS, REDUCTIONS

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT / "tools")
        yield importlib.import_module("write_methods")


def test_the_page_is_what_the_tool_writes(tool):
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(text) == text, "run python tools/write_methods.py"


def test_every_named_part_has_a_line_in_its_family(tool):
    text = tool.PAGE.read_text(encoding="utf-8")
    for part in (*ENCODINGS, *REDUCTIONS):
        if part.family != "baseline":
            assert f"### {part.family.capitalize()}\n" in text
            assert all(f"| `{name}` | " in text for name in part.names)
