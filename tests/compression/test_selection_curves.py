"""Token counts of each selection against a direct definition, step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.compression.base import LayerView
from kvsim.compression.selection.pyramidkv import PyramidKV
from kvsim.compression.selection.snapkv import SnapKV
from kvsim.specs.model import LayerGroup, LayerKind

PROMPTS = (1, 10, 64, 100, 300)
STEPS = 120


def _layers(count: int) -> list[LayerView]:
    group = LayerGroup(kind=LayerKind.FULL, layers=tuple(range(count)), num_kv_heads=8, k_head_dim=128, v_head_dim=128)
    return [LayerView(index, count, group) for index in range(count)]


LAYER = _layers(4)[3]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streaming_llm_keeps_sinks_and_window(prompt: int) -> None:
    selection = parse_compression("streaming_llm:80").selection
    curve = selection.resident_tokens(prompt, LAYER)
    for generated in range(STEPS):
        context = prompt + generated
        kept = {position for position in range(context) if position < 4 or position >= context - 76}
        assert curve(generated) == len(kept)
    assert selection.prefill_resident_tokens(200, LAYER) == 80


@pytest.mark.parametrize("prompt", PROMPTS)
def test_snapkv_compresses_once_and_then_grows(prompt: int) -> None:
    curve = parse_compression("snapkv:0.3").selection.resident_tokens(prompt, LAYER)
    kept = prompt if prompt <= 64 else max(64, int(prompt * 0.7))
    assert [curve(generated) for generated in range(STEPS)] == [kept + generated for generated in range(STEPS)]


@pytest.mark.parametrize("name", ["h2o:90", "tova:90"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_bounded_methods_evict_in_decode(prompt: int, name: str) -> None:
    curve = parse_compression(name).selection.resident_tokens(prompt, LAYER)
    held = min(prompt, 90)
    for generated in range(STEPS):
        assert curve(generated) == held
        held = min(held + 1, 90)


@pytest.mark.parametrize("name", ["h2o:0.75", "tova:0.75"])
def test_a_share_of_the_prompt_holds_through_decode(name: str) -> None:
    curve = parse_compression(name).selection.resident_tokens(1000, LAYER)
    assert {curve(generated) for generated in range(STEPS)} == {250}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_quest_reads_a_budget_of_what_it_holds(prompt: int) -> None:
    selection = parse_compression("quest:96").selection
    for layer in _layers(4):
        for generated in range(STEPS):
            context = prompt + generated
            assert selection.resident_tokens(prompt, layer)(generated) == context
            expected = context if layer.index < 2 else min(context, 96)
            assert selection.attended_tokens(prompt, layer)(generated) == expected
            scanned = selection.scanned_tokens(prompt, layer)
            assert (scanned is None) if layer.index < 2 else (scanned is not None and scanned(generated) == context)


@given(
    prompt=st.integers(1, 50_000),
    ratio=st.floats(0, 0.99),
    layers=st.integers(1, 80),
    beta=st.integers(1, 40),
)
def test_pyramidkv_shares_out_snapkvs_total(prompt: int, ratio: float, layers: int, beta: int) -> None:
    views = _layers(layers)
    pyramid = PyramidKV(compression_ratio=ratio, beta=beta)
    flat = SnapKV(compression_ratio=ratio)
    kept = [pyramid.resident_tokens(prompt, view)(0) for view in views]
    assert sum(kept) == sum(flat.resident_tokens(prompt, view)(0) for view in views)
    assert kept == sorted(kept, reverse=True)
    assert all(min(prompt, 64) <= tokens <= prompt for tokens in kept)


def test_pyramidkv_budgets_are_linear_with_beta_20() -> None:
    # Beside the window of 64: average 960, last 960 // 20 = 48, first 2 * 960 - 48 = 1872.
    kept = [PyramidKV(budget_tokens=1024).resident_tokens(32_768, view)(0) for view in _layers(32)]
    assert (kept[0], kept[-1]) == (64 + 1872, 64 + 48)
    steps = [before - after for before, after in pairwise(kept)]
    assert max(steps) - min(steps) <= 1


def test_pyramidkv_ranks_layers_within_their_group() -> None:
    group = LayerGroup(kind=LayerKind.FULL, layers=(5, 11, 17), num_kv_heads=8, k_head_dim=64, v_head_dim=64)
    kept = [PyramidKV(budget_tokens=264).resident_tokens(4096, LayerView(i, 18, group))(0) for i in group.layers]
    assert kept == [64 + 390, 64 + 200, 64 + 10]


def test_flags() -> None:
    def flags(name: str) -> tuple[bool, bool, str]:
        selection = parse_compression(name).selection
        return selection.evicts, selection.query_aware, selection.granularity

    assert flags("keep_all") == (False, False, "none")
    assert flags("streaming_llm") == (True, False, "none")
    assert flags("snapkv") == (True, True, "head")
    assert flags("pyramidkv") == (True, True, "head")
    assert flags("h2o") == (True, False, "head")
    assert flags("quest") == (False, False, "none")
    assert flags("tova") == (True, True, "layer")
    assert flags("chunkkv") == (True, True, "layer")
    assert flags("chunkkv(scorer=keydiff)") == (True, False, "layer")
    for name in ("knorm", "keydiff", "expected_attention", "qfilter", "lagkv", "cur", "random"):
        assert flags(name) == (True, False, "head")
