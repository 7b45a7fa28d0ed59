"""Entries with log-weights, and heads that hold different numbers of tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.errors import InvalidSpec
from kvsim.tensors import LayerKv, attend


@pytest.fixture
def layer() -> LayerKv:
    rng = np.random.default_rng(5)
    keys, values = rng.standard_normal((2, 2, 12, 8)).astype(np.float32)
    queries = rng.standard_normal((4, 3, 8)).astype(np.float32)
    return LayerKv(keys, values, np.tile(np.arange(12), (2, 1)), queries, queries[:, :0])


def test_an_entry_of_log_weight_ln_2_is_as_two(layer: LayerKv) -> None:
    twice = layer.take(np.tile([0, 1, 1, 2], (2, 1)))
    once = layer.take(np.tile([0, 1, 2], (2, 1)))
    weighted = replace(once, log_weights=np.tile(np.log([1, 2, 1]), (2, 1)).astype(np.float32))
    assert attend(weighted, 0.3).outputs == pytest.approx(attend(twice, 0.3).outputs, abs=1e-6)


def test_heads_hold_what_they_keep(layer: LayerKv) -> None:
    is_kept = np.zeros((2, 12), dtype=bool)
    is_kept[0, [2, 5, 11]] = is_kept[1, [0, 1, 7, 10, 11]] = True
    ragged = layer.take_ragged(is_kept)
    assert ragged.positions[0].tolist() == [2, 2, 2, 5, 11]
    assert ragged.positions[1].tolist() == [0, 1, 7, 10, 11]
    assert ragged.is_seen.sum(axis=1).tolist() == [3, 5]
    assert ragged.seen_share == 0.8
    mask = np.repeat(is_kept, 2, axis=0)[:, None, :].repeat(3, axis=1)
    assert attend(ragged, 0.3).outputs == pytest.approx(attend(layer, 0.3, mask).outputs, abs=1e-6)
    assert attend(layer.hidden_where(~is_kept), 0.3).outputs == pytest.approx(attend(ragged, 0.3).outputs, abs=1e-6)


def test_equal_counts_need_no_weights(layer: LayerKv) -> None:
    is_kept = np.tile(np.arange(12) % 3 == 0, (2, 1))
    assert layer.take_ragged(is_kept).log_weights is None


def test_a_head_keeps_something(layer: LayerKv) -> None:
    is_kept = np.ones((2, 12), dtype=bool)
    is_kept[1] = False
    with pytest.raises(InvalidSpec, match="KV head 1 would keep no token"):
        layer.take_ragged(is_kept)


def test_log_weights_fit(layer: LayerKv) -> None:
    with pytest.raises(InvalidSpec, match="log_weights"):
        replace(layer, log_weights=np.zeros((2, 11), dtype=np.float32))
