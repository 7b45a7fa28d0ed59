"""Ensembles stand for layers from the middle of a model: what a format exempts at its ends is not measured."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.quality.amid import fit_amid, outer_layers, store_amid
from kvsim.quality.ensemble_points import ensemble_points
from kvsim.quality.run import run_strategies
from kvsim.quality.store import fit_strategy, store_cache
from kvsim.tensors import KvTensors
from kvsim.tensors.ensemble import draw, preset

BITS_4BIT_NC = 4.1875
"""16.75 bits per pair of elements of a head of 128: 4-bit keys and values, with their metadata (vLLM)."""


@pytest.fixture(scope="module")
def cache() -> KvTensors:
    return draw(preset("llama-like", num_layers=4, num_tokens=256), 0)


@pytest.mark.parametrize(("name", "outer"), [("turboquant_4bit_nc", 2), ("fp8", 0), ("native", 0), ("kivi-2", 0)])
def test_outer_layers_are_what_the_format_exempts(name: str, outer: int, cache: KvTensors) -> None:
    assert outer_layers(parse_compression(name), cache) == outer


def test_no_layer_of_an_ensemble_is_exact_or_uncompressed(cache: KvTensors) -> None:
    (row,) = run_strategies(cache, ["turboquant_4bit_nc"], amid=True)
    assert row.measured is not None
    assert row.measured.bits_per_element == pytest.approx(BITS_4BIT_NC, abs=0.001)
    assert min(head.output_error for head in row.measured.heads) > 0.01
    assert (row.outer_layers, row.native_layers) == (2, 0)


def test_a_whole_cache_keeps_its_exempt_layers(cache: KvTensors) -> None:
    (row,) = run_strategies(cache, ["turboquant_4bit_nc"])
    assert row.measured is not None
    assert (row.measured.bits_per_element, row.measured.output_error, row.native_layers) == (16.0, 0.0, 4)


def test_layers_in_the_middle_are_stored_as_in_a_deeper_cache(cache: KvTensors) -> None:
    compression = parse_compression("turboquant_3bit_nc")
    deep = draw(preset("llama-like", num_layers=8, num_tokens=256), 0)
    middle = KvTensors(deep.layers[2:6], deep.rope, deep.attention_scale, deep.source)
    whole = store_cache(fit_strategy(compression), deep)
    inner = store_amid(fit_amid(compression, (), 2), middle, 2)
    assert inner.bits == whole.bits[2:6]
    for one, other in zip(inner.kv.layers, whole.kv.layers[2:6], strict=True):
        np.testing.assert_array_equal(one.keys, other.keys)


def test_the_ranking_on_ensembles_holds_turboquant_with_its_error() -> None:
    told: list[str] = []
    shares: list[float] = []
    (point,) = ensemble_points(["turboquant_4bit_nc"], told.append, progress=shares.append)
    assert point.bits_per_element == pytest.approx(BITS_4BIT_NC, abs=0.001)
    assert 0.05 < point.risk < 0.5
    assert told[0].startswith("turboquant_4bit_nc: the first and last 2 layers")
    assert shares == [0.0]
