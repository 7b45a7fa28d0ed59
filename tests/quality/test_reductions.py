"""Algorithms of reductions: which channels go, how layers are merged, which layer reads which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.compression.reduction.minicache import MiniCache
from kvsim.compression.reduction.shared_layers import KvSharer, layer_distances, most_dissimilar_sources
from kvsim.compression.reduction.think import ThinK, channel_scores
from kvsim.errors import InvalidSpec
from kvsim.quality.store import fit_strategy, store_cache
from kvsim.tensors import KvTensors, LayerKv


def _store(name: str, kv: KvTensors, samples: tuple[KvTensors, ...] = ()) -> KvTensors:
    return store_cache(fit_strategy(parse_compression(name), samples), kv).kv


def _map_layers(kv: KvTensors, change) -> KvTensors:
    return replace(kv, layers=tuple(change(layer) for layer in kv.layers))


def _permuted(layer: LayerKv, order: np.ndarray) -> LayerKv:
    """The same cache with its KV heads, and their query heads, in another order."""

    def queries(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(order), -1, *array.shape[1:])[order].reshape(array.shape)

    return LayerKv(
        keys=layer.keys[order],
        values=layer.values[order],
        positions=layer.positions[order],
        queries=queries(layer.queries),
        prompt_queries=queries(layer.prompt_queries),
    )


# --- ThinK ----------------------------------------------------------------------------------------------------------


def test_think_drops_the_channels_of_least_score(noise: KvTensors) -> None:
    stored = _store("think", noise)
    for before, after in zip(noise.layers, stored.layers, strict=True):
        dropped = (after.keys == 0).all(axis=1)
        assert (dropped.sum(axis=1) == int(0.4 * 64)).all()
        scores = channel_scores(before, 32)
        for head in range(before.num_kv_heads):
            assert scores[head][dropped[head]].max() <= scores[head][~dropped[head]].min()
        kept = ~dropped[:, None, :]
        assert np.array_equal(np.where(kept, before.keys, 0), after.keys)
        assert np.array_equal(before.values, after.values)


def test_think_scores_are_the_frobenius_norms_of_what_channels_add_to_the_logits(noise: KvTensors) -> None:
    layer = noise.layers[0]
    scores = channel_scores(layer, 32)
    queries, keys = layer.prompt_queries[:2, -32:].astype(np.float64), layer.keys[0].astype(np.float64)
    for channel in (0, 7, 63):
        norms = [np.linalg.norm(np.outer(query[:, channel], keys[:, channel])) ** 2 for query in queries]
        assert scores[0, channel] == pytest.approx(np.mean(norms) / (32 * len(keys)), rel=1e-5)


def test_think_finds_channels_that_queries_do_not_use(noise: KvTensors) -> None:
    quiet = np.ones(64, dtype=np.float32)
    quiet[10:35] = 1e-3
    still = _map_layers(
        noise, lambda layer: replace(layer, queries=layer.queries * quiet, prompt_queries=layer.prompt_queries * quiet)
    )
    stored = _store("think", still)
    for before, after in zip(still.layers, stored.layers, strict=True):
        assert ((after.keys == 0).all(axis=(0, 1)) == (quiet < 1)).all()
        logits = [layer.queries.reshape(2, -1, 64) @ layer.keys.transpose(0, 2, 1) for layer in (before, after)]
        assert np.abs(logits[0] - logits[1]).max() < 0.1


def test_think_loses_more_the_more_it_drops(noise: KvTensors) -> None:
    errors = []
    for ratio in (0, 0.2, 0.4, 0.6, 0.8):
        stored = _store(f"think:{ratio}", noise)
        errors.append(sum(np.sum((a.keys - b.keys) ** 2) for a, b in zip(noise.layers, stored.layers, strict=True)))
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert len(set(errors)) == len(errors)


def test_think_sees_the_last_queries_only(noise: KvTensors) -> None:
    loud = np.ones((1, 64, 1), dtype=np.float32)
    loud[:, :32] = 50.0
    louder = _map_layers(noise, lambda layer: replace(layer, prompt_queries=layer.prompt_queries * loud))
    assert np.array_equal(_store("think", louder).layers[0].keys, _store("think", noise).layers[0].keys)


def test_think_needs_prompt_queries(noise: KvTensors) -> None:
    mute = _map_layers(noise, lambda layer: replace(layer, prompt_queries=layer.prompt_queries[:, :0]))
    with pytest.raises(InvalidSpec, match="no prompt_queries"):
        _store("think", mute)


def test_think_hides_the_rotation_from_the_encoding(noise: KvTensors) -> None:
    assert ThinK().codec().reduce(noise).kv.rope is None


# --- MiniCache ------------------------------------------------------------------------------------------------------


def _twins(noise: KvTensors, share: float) -> KvTensors:
    """Layers 4 and 5 of six made alike: directions equal but for noise, lengths three times as long."""
    one, other = noise.layers[3], noise.layers[4]
    alike = replace(other, keys=3 * one.keys + share * other.keys, values=3 * one.values + share * other.values)
    return replace(noise, layers=(*noise.layers[:4], alike, noise.layers[5]))


def test_minicache_gives_equal_directions_back(noise: KvTensors) -> None:
    kv = _twins(noise, 0.0)
    stored = _store("minicache", kv)
    for before, after in zip(kv.layers, stored.layers, strict=True):
        for old, new in ((before.keys, after.keys), (before.values, after.values)):
            # bf16 directions (2**-9) times fp16 lengths (2**-11).
            assert np.abs(new - old).max() <= 2**-7.9 * np.abs(old).max()


def test_minicache_leaves_other_layers_alone(noise: KvTensors) -> None:
    stored = _store("minicache", noise)
    for index in (0, 1, 2, 5):
        assert np.array_equal(stored.layers[index].keys, noise.layers[index].keys)
        assert np.array_equal(stored.layers[index].values, noise.layers[index].values)


def test_minicache_keeps_lengths(noise: KvTensors) -> None:
    stored = _store("minicache(retained_fraction=0)", noise)
    for index in (3, 4):
        for name in ("keys", "values"):
            old, new = (np.linalg.norm(getattr(kv.layers[index], name), axis=2) for kv in (noise, stored))
            assert new == pytest.approx(old, rel=2**-8)
    three, four = stored.layers[3].keys, stored.layers[4].keys
    cosine = (three * four).sum(axis=2) / (np.linalg.norm(three, axis=2) * np.linalg.norm(four, axis=2))
    assert cosine == pytest.approx(1.0, abs=1e-5)


def test_minicache_retains_the_tokens_whose_directions_differ_most(noise: KvTensors) -> None:
    kv = _twins(noise, 0.5)
    stored = _store("minicache", kv)
    one, other, back = kv.layers[3].keys, kv.layers[4].keys, stored.layers[4].keys
    cosine = (one * other).sum(axis=2) / (np.linalg.norm(one, axis=2) * np.linalg.norm(other, axis=2))
    exact = (back == other).all(axis=2)
    assert (exact.sum(axis=1) == 16).all()
    for head in range(2):
        assert cosine[head][exact[head]].max() <= cosine[head][~exact[head]].min()
        kept = exact[head]
        assert np.abs(stored.layers[3].keys[head][kept] - one[head][kept]).max() < 2**-7.9 * np.abs(one).max()


def test_retaining_everything_loses_only_rounding(noise: KvTensors) -> None:
    stored = _store("minicache(retained_fraction=1)", noise)
    assert np.array_equal(stored.layers[4].keys, noise.layers[4].keys)
    assert np.abs(stored.layers[3].keys - noise.layers[3].keys).max() < 2**-7.9 * np.abs(noise.layers[3].keys).max()


def test_the_weight_favours_a_layer(noise: KvTensors) -> None:
    toward = {}
    for weight in (0.0, 0.5, 1.0):
        stored = _store(f"minicache(retained_fraction=0,interpolation={weight})", noise)
        toward[weight] = [
            float(np.abs(stored.layers[index].keys - noise.layers[index].keys).mean()) for index in (3, 4)
        ]
    assert toward[0.0][0] < toward[0.5][0] < toward[1.0][0]
    assert toward[1.0][1] < toward[0.5][1] < toward[0.0][1]


@pytest.mark.parametrize("name", ["think", "minicache", "kvsharer"])
def test_permuting_heads_permutes_the_result(name: str, noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    order = np.array([1, 0])
    plain = _store(name, noise, samples)
    turned = _store(name, _map_layers(noise, lambda layer: _permuted(layer, order)), samples)
    for one, other in zip(plain.layers, turned.layers, strict=True):
        assert np.array_equal(one.keys[order], other.keys)
        assert np.array_equal(one.values[order], other.values)


@pytest.mark.parametrize("name", ["think", "minicache", "kvsharer"])
def test_doubling_the_cache_doubles_the_result(name: str, noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    plain = _store(name, noise, samples)
    double = _map_layers(noise, lambda layer: replace(layer, keys=2 * layer.keys, values=2 * layer.values))
    for one, other in zip(plain.layers, _store(name, double, samples).layers, strict=True):
        assert np.array_equal(2 * one.keys, other.keys)
        assert np.array_equal(2 * one.values, other.values)


def test_rope_can_be_undone_on_merged_directions(noise: KvTensors) -> None:
    """Both layers' keys are turned alike, and so is what lies between them."""
    assert noise.rope is not None
    bare = _map_layers(noise, lambda layer: replace(layer, keys=noise.rope.undo(layer.keys, layer.positions)))
    codec = MiniCache(retained_fraction=0).codec()
    merged, merged_bare = codec.reduce(noise).kv.layers[3], codec.reduce(bare).kv.layers[3]
    assert noise.rope.undo(merged.keys, merged.positions) == pytest.approx(merged_bare.keys, abs=0.05)


# --- KVSharer -------------------------------------------------------------------------------------------------------


def test_kvsharer_reads_the_most_dissimilar_layer(noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    distances = layer_distances(samples)
    assert np.array_equal(distances, distances.T)
    first, second = np.unravel_index(np.argmax(distances), distances.shape)
    source, reader = sorted((int(first), int(second)))
    sources = KvSharer().codec().fit(samples).sources(6)
    assert sources[reader] == source
    assert sum(index != source for index, source in enumerate(sources)) == 2
    stored = _store("kvsharer", noise, samples)
    for index, source in enumerate(sources):
        assert np.array_equal(stored.layers[index].keys, noise.layers[source].keys)


def test_kvsharer_keeps_its_map_and_needs_calibration(noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    sources = KvSharer().codec().fit(samples).sources(6)
    fitted = fit_strategy(parse_compression("kvsharer"), samples)
    assert fitted.reduction.sources(6) == sources
    with pytest.raises(InvalidSpec, match="at least one"):
        fit_strategy(parse_compression("kvsharer"), ())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(0, 2**32 - 1), st.floats(0.01, 0.5))
def test_any_distances_give_a_map_of_readers_to_layers_that_hold(layers: int, seed: int, share: float) -> None:
    raw = np.random.default_rng(seed).random((layers, layers)).astype(np.float32)
    count = KvSharer(sharing_fraction=share).sharing_layers(layers)
    source_of = most_dissimilar_sources(raw + raw.T, count)
    assert len(source_of) == count
    assert not set(source_of) & set(source_of.values())
    assert all(source < reader for reader, source in source_of.items())
