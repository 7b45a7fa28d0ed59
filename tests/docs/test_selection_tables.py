"""The generated tables of what selections cost and do; measured ones are too slow to be made anew here."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT / "tools")
        yield importlib.import_module("write_selection_tables")


def test_work_of_merging_is_what_the_tool_writes(tool):
    page = (tool.METHODS / "merging.md").read_text(encoding="utf-8")
    assert "\n".join(tool.work()) in page, "run python tools/write_selection_tables.py"


@pytest.mark.parametrize(
    ("page", "name", "strategies"), [("merging.md", "errors", "merging"), ("head-budgets.md", "errors", "heads")]
)
def test_measured_tables_have_every_strategy(tool, page, name, strategies):
    text = (tool.METHODS / page).read_text(encoding="utf-8")
    (body,) = re.findall(tool.BLOCK.format(name=name).replace(".*?(", "(.*?)("), text, re.DOTALL)
    wanted = tool.HEADS if strategies == "heads" else tool.merging_strategies()
    rows = [line.split("|")[1].strip() for line in body[1].splitlines()[2:]]
    assert rows == [f"`{strategy}`" for strategy in wanted]


def test_a_full_head_counts_all_its_tokens(tool):
    cache, samples = tool.drawn("llama-like(num_tokens=64,num_prompt_queries=16)")
    layers = tool.selector_of("snapkv(compression_ratio=0.5,window_size=8)", samples).select(cache).layers
    assert [tool.tokens_per_head(layer).tolist() for layer in layers] == [[32, 32]] * cache.num_layers
