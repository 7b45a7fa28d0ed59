"""Selections whose heads keep different numbers of tokens, on tensors: budgets, masks, and what each takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.selection.adakv import AdaKV
from kvsim.compression.selection.duo_attention import DuoAttention, head_scores
from kvsim.compression.selection.scorers import SCORERS
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import stored_bytes
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.specs.model import ModelSpec
from kvsim.tensors import KvTensors, LayerKv, attend
from tests.quality.conftest import noise_cache

ADAKV = (
    "adakv", "adakv:0.7(alpha_safeguard=0)", "adakv:100(alpha_safeguard=1)", "adakv:0.6(scorer=pyramidkv)",
)  # fmt: skip
DUO = ("duo_attention(sink_size=8,recent_size=24)", "duo_attention:0.75(sink_size=0,recent_size=50)")
NEUTRAL = ("adakv:0", "duo_attention:0", "duo_attention:1(sink_size=200,recent_size=120)")


@pytest.fixture(scope="module")
def uneven() -> KvTensors:
    """Of three heads the first attends to few tokens, the last to all alike."""
    kv = noise_cache(11, layers=3, heads=3, tokens=320)
    sharpness = np.repeat([3.0, 1.0, 0.05], 2)[:, None, None].astype(np.float32)
    layers = (replace(layer, prompt_queries=layer.prompt_queries * sharpness) for layer in kv.layers)
    return replace(kv, layers=tuple(layers))


def _store(name: str, kv: KvTensors, samples: tuple[KvTensors, ...] = ()) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name), samples), kv)


def _tokens(layer: LayerKv) -> np.ndarray:
    return layer.is_seen.sum(axis=1)


def _model(kv: KvTensors) -> ModelSpec:
    group = layer_view(kv, 0).group
    return ModelSpec(
        name="noise", source="made", architecture="Test", hidden_size=256, num_attention_heads=4, vocab_size=100,
        intermediate_size=512, max_position_embeddings=4096, groups=(group,), num_parameters=1_000_000,
        num_active_parameters=1_000_000, num_embedding_parameters=1000, dtype=Dtype.BF16,
    )  # fmt: skip


# --- laws of all ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ADAKV, *DUO, *NEUTRAL])
def test_all_layers_take_the_bits_that_pricing_says(
    name: str, noise: KvTensors, samples: tuple[KvTensors, ...]
) -> None:
    for text in (name, name + "(masked=true)" if "(" not in name else name.replace(")", ",masked=true)")):
        stored = _store(text, noise, samples)
        assert stored.total_bits == pytest.approx(8 * stored_bytes(parse_compression(text), _model(noise), 320, 0))


@pytest.mark.parametrize("name", ADAKV)
def test_each_layer_keeps_its_budget_and_each_head_its_safeguard(name: str, uneven: KvTensors) -> None:
    selection = parse_compression(name).selection
    assert isinstance(selection, AdaKV)
    for index, layer in enumerate(_store(name, uneven).kv.layers):
        kept = selection.kept_tokens(320, layer_view(uneven, index))
        assert _tokens(layer).sum() == 3 * kept
        assert (_tokens(layer) >= int(selection.alpha_safeguard * kept)).all()
        assert (layer.positions[:, -1] == 319).all()


@pytest.mark.parametrize("name", [*ADAKV, *DUO])
def test_masked_and_freed_attend_alike(name: str, noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    masked_name = name + "(masked=true)" if "(" not in name else name.replace(")", ",masked=true)")
    freed, masked = _store(name, noise, samples), _store(masked_name, noise, samples)
    native = 16.0 * 2 * 2 * 320 * 64
    for before, less, hidden, bits in zip(noise.layers, freed.kv.layers, masked.kv.layers, masked.bits, strict=True):
        outputs = [attend(layer, noise.attention_scale).outputs for layer in (less, hidden)]
        assert outputs[0] == pytest.approx(outputs[1], rel=1e-5, abs=1e-6)
        assert np.array_equal(_tokens(less), _tokens(hidden))
        assert hidden.num_tokens == before.num_tokens
        assert bits == native
    dropped = sum(2 * 320 - int(_tokens(layer).sum()) for layer in freed.kv.layers)
    # They differ by exactly what is not freed: K and V of every dropped token of a head.
    assert masked.total_bits - freed.total_bits == pytest.approx(dropped * 2 * 64 * 16)


@pytest.mark.parametrize("name", NEUTRAL)
def test_keeping_everything_changes_nothing(name: str, noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    for before, after in zip(noise.layers, _store(name, noise, samples).kv.layers, strict=True):
        assert np.array_equal(before.keys, after.keys)
        assert after.is_seen.all()


@pytest.mark.parametrize("name", ["adakv", "duo_attention"])
def test_heads_of_unequal_length_have_no_common_indices(name: str, noise: KvTensors) -> None:
    with pytest.raises(NotRunnable, match="different numbers of tokens"):
        parse_compression(name).selection.keep(noise, layer_view(noise, 0))


# --- Ada-KV ---------------------------------------------------------------------------------------------------------


def test_heads_that_spread_their_attention_get_the_larger_budget(uneven: KvTensors) -> None:
    """Scores of SnapKV sum to the same in each head, so a sharp head has few high ones and the rest near zero."""
    for layer in _store("adakv:0.3(alpha_safeguard=0)", uneven).kv.layers:
        sharp, _, flat = _tokens(layer)
        assert sharp < 224 < flat


def test_small_budgets_go_to_the_peaks_of_sharp_heads(uneven: KvTensors) -> None:
    """The other side of one threshold for all heads, and what the safeguard is for."""
    for layer in _store("adakv:0.75(alpha_safeguard=0)", uneven).kv.layers:
        assert _tokens(layer).tolist() == [112, 64, 64]


def test_equal_heads_get_equal_budgets(noise: KvTensors) -> None:
    same = replace(noise, layers=tuple(_first_head_twice(layer) for layer in noise.layers))
    for layer in _store("adakv", same).kv.layers:
        assert _tokens(layer).tolist() == [160, 160]


def _first_head_twice(layer: LayerKv) -> LayerKv:
    def twice(values: np.ndarray) -> np.ndarray:
        return np.concatenate((values[: len(values) // 2],) * 2)

    return replace(
        layer, keys=twice(layer.keys), values=twice(layer.values), prompt_queries=twice(layer.prompt_queries)
    )


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_full_safeguard_is_the_scorer_itself(scorer: str, noise: KvTensors) -> None:
    shared = _store(f"adakv(alpha_safeguard=1,scorer={scorer})", noise)
    alone = _store(f"{scorer}:0.5", noise)
    for mine, its in zip(shared.kv.layers, alone.kv.layers, strict=True):
        assert np.array_equal(mine.positions, its.positions)


def test_heads_in_another_order_keep_the_same(uneven: KvTensors) -> None:
    turned = replace(uneven, layers=tuple(_reversed_heads(layer) for layer in uneven.layers))
    for one, other in zip(_store("adakv", uneven).kv.layers, _store("adakv", turned).kv.layers, strict=True):
        assert np.array_equal(_tokens(one), _tokens(other)[::-1])


def _reversed_heads(layer: LayerKv) -> LayerKv:
    def turned(queries: np.ndarray) -> np.ndarray:
        return queries.reshape(3, 2, *queries.shape[1:])[::-1].reshape(queries.shape)

    return replace(
        layer, keys=layer.keys[::-1], values=layer.values[::-1], queries=turned(layer.queries),
        prompt_queries=turned(layer.prompt_queries),
    )  # fmt: skip


def test_joint_top_k_retains_at_least_the_mass_of_equal_budgets(uneven: KvTensors) -> None:
    """What Ada-KV is for: of the scores of a layer, no split of the same budget retains more."""
    selection = parse_compression("adakv(alpha_safeguard=0)").selection
    assert isinstance(selection, AdaKV)
    for index in range(uneven.num_layers):
        view = layer_view(uneven, index)
        scores = np.nan_to_num(selection.scored.scores(uneven, view), posinf=0.0)
        alone = selection.scored.keep(uneven, view)
        assert alone is not None
        assert scores[selection.keep_mask(uneven, view)].sum() >= np.take_along_axis(scores, alone, axis=1).sum()


# --- DuoAttention ---------------------------------------------------------------------------------------------------


def _looking_early(kv: KvTensors, layer: int, head: int) -> KvTensors:
    """One head of mean query and key that point against each other before RoPE, so that far tokens weigh most."""
    assert kv.rope is not None
    layers = list(kv.layers)
    keys, queries = layers[layer].keys.copy(), layers[layer].prompt_queries.copy()
    direction = np.zeros(64, np.float32)
    # These channels turn by half a circle over the 500 positions of the profile.
    direction[17:19] = 4.0
    keys[head] += kv.rope.rotate(np.tile(direction, (320, 1)), np.arange(320))
    asked = kv.rope.rotate(np.tile(-direction, (64, 1)), np.arange(256, 320))
    queries[2 * head : 2 * head + 2] += asked
    layers[layer] = replace(layers[layer], keys=keys, prompt_queries=queries)
    return replace(kv, layers=tuple(layers))


def test_heads_that_look_back_are_retrieval_heads(samples: tuple[KvTensors, ...], noise: KvTensors) -> None:
    seen = tuple(_looking_early(kv, 2, 1) for kv in samples)
    assert np.unravel_index(head_scores(seen[0]).argmax(), (6, 2)) == (2, 1)
    stored = _store("duo_attention:0.9(sink_size=8,recent_size=24)", noise, seen)
    held = np.array([_tokens(layer) for layer in stored.kv.layers])
    assert (held == 320).sum() == 12 - round(0.9 * 12)
    assert held[2, 1] == 320


def test_heads_whose_output_needs_far_tokens_are_retrieval_heads(
    samples: tuple[KvTensors, ...], noise: KvTensors
) -> None:
    """By what is asked after the prompt: kvpress's profile of means cannot see a head that looks for content."""
    seen = []
    for kv in samples:
        layers = list(kv.layers)
        keys, queries = layers[4].keys.copy(), layers[4].queries.copy()
        keys[0, 100], queries[:2] = 3.0, 1.0
        layers[4] = replace(layers[4], keys=keys, queries=queries)
        seen.append(replace(kv, layers=tuple(layers)))
    name = "duo_attention:0.9(sink_size=8,recent_size=120{})"
    found, missed = (_store(name.format(profile), noise, tuple(seen)) for profile in (",profile=output_change", ""))
    assert found.kv.layers[4].is_seen[0].all()
    assert not missed.kv.layers[4].is_seen[0].all()


def test_streaming_heads_keep_sinks_and_recent(noise: KvTensors, samples: tuple[KvTensors, ...]) -> None:
    stored = _store("duo_attention:1(sink_size=8,recent_size=24)", noise, samples)
    for layer in stored.kv.layers:
        assert np.array_equal(layer.positions, [[*range(8), *range(296, 320)]] * 2)


def test_a_profile_does_not_depend_on_where_its_sample_starts(noise: KvTensors) -> None:
    """Means are taken before RoPE, so turning keys and queries by one more position each moves nothing."""
    rope = noise.rope
    assert rope is not None
    layers = []
    for layer in noise.layers:
        asked = rope.rotate(layer.prompt_queries, np.full(64, 7))
        keys = rope.rotate(layer.keys, np.full(320, 7))
        layers.append(replace(layer, keys=keys, prompt_queries=asked))
    moved = replace(noise, layers=tuple(layers))
    # Both turn by 7 positions before the profile turns them on: logits depend on differences alone.
    assert head_scores(moved) == pytest.approx(head_scores(noise), abs=1e-5)


def test_heads_are_profiled_on_other_sequences(noise: KvTensors) -> None:
    with pytest.raises(InvalidSpec, match="calibration sequences, and there are none"):
        fit_strategy(parse_compression("duo_attention"), ())
    with pytest.raises(InvalidSpec, match="calibration sequences first"):
        DuoAttention().selector().select(noise)


def test_a_profile_needs_rope_and_queries(noise: KvTensors) -> None:
    with pytest.raises(InvalidSpec, match="lack one of them"):
        head_scores(replace(noise, rope=None))
    mute = tuple(replace(layer, queries=layer.queries[:, :0]) for layer in noise.layers)
    with pytest.raises(InvalidSpec, match="queries after the prompt"):
        _store("duo_attention(profile=output_change)", noise, (replace(noise, layers=mute),))
