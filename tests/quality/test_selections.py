"""Token selections on tensors: which tokens each method keeps. What holds of all: test_selection_laws.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.selection.prompt_attention import heaviest_and_newest, received_attention
from kvsim.compression.selection.quest import page_extremes
from kvsim.errors import InvalidSpec
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.tensors import KvTensors, attend
from tests.quality.conftest import noise_cache


def _store(name: str, kv: KvTensors) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name)), kv)


@pytest.fixture(scope="module")
def full_queries() -> KvTensors:
    """A cache with a query for every token of the prompt."""
    kv = noise_cache(3, layers=2, tokens=96)
    rng = np.random.default_rng(4)
    queries = rng.standard_normal((4, 96, 64)).astype(np.float32)
    return replace(kv, layers=tuple(replace(layer, prompt_queries=queries) for layer in kv.layers))


@pytest.mark.parametrize("name", ["snapkv", "h2o", "pyramidkv"])
def test_methods_that_score_need_prompt_queries(name: str, noise: KvTensors) -> None:
    mute = replace(
        noise, layers=tuple(replace(layer, prompt_queries=layer.prompt_queries[:, :0]) for layer in noise.layers)
    )
    with pytest.raises(InvalidSpec, match="no prompt_queries"):
        _store(name, mute)


# --- StreamingLLM ---------------------------------------------------------------------------------------------------


def test_streaming_llm_keeps_sinks_and_window(noise: KvTensors) -> None:
    for layer in _store("streaming_llm:64", noise).kv.layers:
        assert np.array_equal(layer.positions, [[*range(4), *range(260, 320)]] * 2)


# --- scores ---------------------------------------------------------------------------------------------------------


def test_received_attention_is_the_column_sum_of_causal_attention(full_queries: KvTensors) -> None:
    layer, scale = full_queries.layers[0], full_queries.attention_scale
    received = received_attention(layer, scale)
    assert received.sum(axis=1) == pytest.approx([96, 96], rel=1e-5)
    # The last token is seen by the last query alone, the first by all.
    expected = np.zeros(2)
    for head in range(4):
        logits = scale * layer.keys[head // 2].astype(np.float64) @ layer.prompt_queries[head, -1]
        weights = np.exp(logits - logits.max())
        expected[head // 2] += 0.5 * weights[-1] / weights.sum()
    assert received[:, -1] == pytest.approx(expected, rel=1e-5)


def test_a_window_counts_its_own_queries_only(full_queries: KvTensors) -> None:
    layer, scale = full_queries.layers[0], full_queries.attention_scale
    shorter = replace(layer, prompt_queries=layer.prompt_queries[:, -8:])
    assert np.array_equal(received_attention(layer, scale, 8), received_attention(shorter, scale))
    assert received_attention(layer, scale, 8).sum(axis=1) == pytest.approx([8, 8], rel=1e-5)


def test_chunks_of_queries_add_up() -> None:
    kv = noise_cache(6, layers=1, tokens=300)
    queries = np.random.default_rng(7).standard_normal((4, 300, 64)).astype(np.float32)
    layer = replace(kv.layers[0], prompt_queries=queries)
    whole = received_attention(layer, 0.125)
    late = received_attention(layer, 0.125, 100)
    early = received_attention(
        replace(layer.take(np.tile(np.arange(200), (2, 1))), prompt_queries=queries[:, :200]), 0.125
    )
    assert whole - late == pytest.approx(np.pad(early, ((0, 0), (0, 100))), abs=1e-5)


def test_ties_keep_the_earlier_token() -> None:
    assert np.array_equal(heaviest_and_newest(np.zeros((1, 8), np.float32), 3, 2), [[0, 1, 2, 8, 9]])


# --- SnapKV, PyramidKV ----------------------------------------------------------------------------------------------


def _with_needle(kv: KvTensors, position: int) -> KvTensors:
    """The prompt's last queries look at one token of the first KV head."""
    layers = []
    for layer in kv.layers:
        keys, queries = layer.keys.copy(), layer.prompt_queries.copy()
        keys[0, position] = 2.0
        queries[: layer.group_size] += 0.5
        layers.append(replace(layer, keys=keys, prompt_queries=queries))
    return replace(kv, layers=tuple(layers))


def test_snapkv_keeps_what_the_window_looks_at_head_by_head(noise: KvTensors) -> None:
    stored = _store("snapkv:80", _with_needle(noise, 57))
    for layer in stored.kv.layers:
        assert np.array_equal(layer.positions[:, -64:], [range(256, 320)] * 2)
        assert set(range(55, 60)) <= set(layer.positions[0].tolist())


def test_pooling_brings_the_neighbours(noise: KvTensors) -> None:
    selection = parse_compression("snapkv:70").selection
    scores = np.zeros((1, 20), dtype=np.float32)
    scores[0, 9] = 1.0
    pooled = selection._pooled(scores)
    assert np.flatnonzero(pooled[0]).tolist() == [7, 8, 9, 10, 11]
    assert pooled.shape == scores.shape
    even = parse_compression("snapkv:70(kernel_size=4)").selection
    assert even._pooled(scores).shape == scores.shape


def test_pyramidkv_keeps_more_in_early_layers_and_the_same_in_all(noise: KvTensors) -> None:
    kept = [layer.num_tokens for layer in _store("pyramidkv", noise).kv.layers]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    assert sum(kept) == 6 * 160


# --- H2O ------------------------------------------------------------------------------------------------------------


def test_h2o_keeps_half_new_and_half_heavy(full_queries: KvTensors) -> None:
    kept = _store("h2o:20", full_queries).kv.layers[0]
    scores = received_attention(full_queries.layers[0], full_queries.attention_scale)
    for head in range(2):
        assert kept.positions[head, -10:].tolist() == list(range(86, 96))
        heavy = set(kept.positions[head, :10].tolist())
        assert heavy == set(np.argsort(-scores[head, :86])[:10].tolist())


# --- Quest ----------------------------------------------------------------------------------------------------------


def test_quest_bounds_no_product_from_below(noise: KvTensors) -> None:
    layer = noise.layers[3]
    low, high = page_extremes(layer.keys, 16)
    query = layer.queries[0]
    bound = np.maximum(query[:, None] * low[0], query[:, None] * high[0]).sum(axis=2)
    products = (query @ layer.keys[0].T).reshape(len(query), -1, 16).max(axis=2)
    assert (bound >= products - 1e-4).all()


def test_quest_reads_the_pages_of_the_largest_bounds(noise: KvTensors) -> None:
    stored = _store("quest:64", noise)
    assert stored.read_masks[:2] == (None, None)
    for layer, mask in zip(noise.layers[2:], stored.read_masks[2:], strict=True):
        assert mask is not None
        assert mask.shape == (4, 8, 320)
        assert (mask.sum(axis=2) == 64).all()
        pages = mask.reshape(4, 8, 20, 16)
        assert (pages.all(axis=3) == pages.any(axis=3)).all()
        low, high = page_extremes(layer.keys, 16)
        for head in range(4):
            bounds = np.maximum(
                layer.queries[head][:, None] * low[head // 2], layer.queries[head][:, None] * high[head // 2]
            ).sum(axis=2)
            for bound, read in zip(bounds, pages[head].all(axis=2), strict=True):
                assert bound[read].min() >= bound[~read].max()


def test_quest_loses_less_than_reading_the_newest(noise: KvTensors) -> None:
    stored = _store("quest:64(num_dense_layers=0)", noise)
    for layer, mask in zip(noise.layers, stored.read_masks, strict=True):
        weights = attend(layer, noise.attention_scale).weights
        newest = weights[..., -64:].sum(axis=-1).mean()
        assert np.where(mask, weights, 0).sum(axis=-1).mean() > newest


def test_a_short_last_page_reads_less() -> None:
    kv = noise_cache(8, layers=1, tokens=100)
    (mask,) = _store("quest:64(num_dense_layers=0)", kv).read_masks
    assert mask is not None
    assert set(np.unique(mask.sum(axis=2)).tolist()) <= {52, 64}
