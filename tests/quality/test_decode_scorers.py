"""R-KV and InfoKV on tensors: what their scores say, against plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.selection.cuts import CutsWhileDecoding
from kvsim.compression.selection.infokv import InfoKV
from kvsim.compression.selection.rkv import RKV, mean_similarity
from kvsim.compression.selector import layer_view
from kvsim.errors import InvalidSpec
from kvsim.tensors import KvTensors, PromptSignals
from tests.quality.conftest import noise_cache, scores_of

KV = noise_cache(11, layers=2, tokens=90)


def changed(kv: KvTensors, **fields: np.ndarray) -> KvTensors:
    """The cache with another first layer."""
    return replace(kv, layers=(replace(kv.layers[0], **fields), *kv.layers[1:]))


# --- R-KV -----------------------------------------------------------------------------------------------------------


def _plain_similarity(keys: np.ndarray, threshold: float) -> np.ndarray:
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    count = len(keys)
    total = np.zeros(count)
    for one in range(count):
        cosines = (unit @ unit[one]).tolist()
        alike = [other for other in range(count) if other != one and cosines[other] > threshold]
        for other in range(count):
            if other != one and not (alike and other == alike[-1]):
                total[other] += cosines[other]
    return total / count


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.1, 0.5, 1.0])
def test_similarity_spares_the_latest_of_those_alike(threshold: float) -> None:
    keys = KV.layers[0].keys
    found = mean_similarity(keys, threshold)
    for head in range(len(keys)):
        assert found[head] == pytest.approx(_plain_similarity(keys[head].astype(np.float64), threshold), abs=1e-5)


def test_similarity_does_not_depend_on_the_length_of_keys_or_on_pieces() -> None:
    keys = noise_cache(3, layers=1, tokens=1200).layers[0].keys
    scale = np.random.default_rng(0).uniform(0.5, 2.0, (2, 1200, 1)).astype(np.float32)
    assert mean_similarity(keys * scale, 0.2) == pytest.approx(mean_similarity(keys, 0.2), abs=1e-5)
    assert mean_similarity(keys[:1], 0.2)[0] == pytest.approx(_plain_similarity(keys[0], 0.2), abs=1e-5)


def test_of_copies_the_latest_stays() -> None:
    """Thirty tokens with one key: their redundancy lets all go but the newest of them, whoever is looked at."""
    keys = KV.layers[0].keys.copy()
    keys[:, 20:50] = keys[:, 20:21]
    kv = changed(KV, keys=keys)
    kept = parse_compression("rkv:61(mix_lambda=0.0)").selection.keep(kv, layer_view(kv, 0))
    assert kept is not None
    for head in kept:
        stayed = set(head.tolist())
        assert stayed & set(range(20, 50)) == {49}
        assert set(range(82, 90)) <= stayed


def test_importance_alone_is_attention_over_older_tokens() -> None:
    layer = KV.layers[0]
    found = scores_of("rkv:50(mix_lambda=1.0,kernel_size=1)", KV)
    assert np.isposinf(found[:, -8:]).all()
    assert found[:, :-8].sum(axis=1) == pytest.approx([1.0, 1.0], rel=1e-5)
    queries = layer.prompt_queries.reshape(2, 2, 64, 64)[:, :, -8:]
    for head in range(2):
        logits = KV.attention_scale * np.max(queries[head] @ layer.keys[head, :-8].T, axis=0)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        expected = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        assert found[head, :-8] == pytest.approx(expected, rel=1e-4)


def test_the_largest_of_neighbours_counts() -> None:
    plain, pooled = (scores_of(f"rkv:50(mix_lambda=1.0,kernel_size={size})", KV)[:, :-8] for size in (1, 7))
    for place in range(plain.shape[1]):
        assert (pooled[:, place] == plain[:, max(0, place - 3) : place + 4].max(axis=1)).all()


def test_z_mixes_the_two() -> None:
    """Z is linear in lambda between redundancy alone and importance alone."""
    first, last = (scores_of(f"rkv:50(mix_lambda={share})", KV)[:, :-8].astype(np.float64) for share in (0.0, 1.0))
    assert scores_of("rkv:50", KV)[:, :-8] == pytest.approx(0.9 * first + 0.1 * last, rel=1e-5)
    assert (first < 0).all()
    assert RKV(budget_tokens=50).mix_lambda == 0.1


# --- InfoKV ---------------------------------------------------------------------------------------------------------


def test_attention_alone_is_snapkv() -> None:
    infokv, snapkv = (scores_of(name, KV) for name in ("infokv:70(alpha=1)", "snapkv:70"))
    assert infokv == pytest.approx(snapkv / 64, rel=1e-6)
    for name in ("infokv:70(alpha=1)", "infokv:70"):
        mute = replace(KV, signals=PromptSignals())
        if "alpha" in name:
            assert np.array_equal(scores_of(name, mute), infokv)
        else:
            with pytest.raises(InvalidSpec, match="needs the signals entropy and distance"):
                scores_of(name, mute)


def test_scores_are_the_published_mixture() -> None:
    entropy, distance = KV.signals.entropy, KV.signals.distance
    assert entropy is not None
    assert distance is not None
    for index in range(2):
        weighted = (distance[index].astype(np.float64) + 1.0) * entropy
        share = np.exp(weighted) / np.exp(weighted).sum()
        attention = scores_of("infokv:70(alpha=1)", KV, index).astype(np.float64)
        expected = 0.9 * attention + 0.1 * share
        assert scores_of("infokv:70", KV, index)[:, :-64] == pytest.approx(expected[:, :-64], rel=1e-4)


def test_uncertain_tokens_stay_where_attention_is_silent() -> None:
    entropy = np.zeros(90, dtype=np.float32)
    entropy[[3, 7, 11]] = 5.5
    kv = replace(KV, signals=replace(KV.signals, entropy=entropy))
    kept = InfoKV(budget_tokens=11, window_size=8, alpha=0.0).keep(kv, layer_view(kv, 1))
    assert kept is not None
    assert all(row.tolist() == [3, 7, 11, *range(82, 90)] for row in kept)


def test_where_the_layer_is_the_last_one_tau_keeps_entropy_alive() -> None:
    """D = 0 there; without tau all tokens would weigh the same."""
    kv = replace(KV, signals=replace(KV.signals, distance=np.zeros((2, 90), dtype=np.float32)))
    flat, alive = (scores_of(f"infokv:70(alpha=0.0,tau={tau},window_size=8)", kv)[:, :-8] for tau in (0.0, 1.0))
    assert np.ptp(flat) == 0.0
    assert np.corrcoef(alive[0], kv.signals.entropy[:-8])[0, 1] > 0.5


def test_signals_follow_the_tokens_by_position() -> None:
    """A cache that has lost tokens scores those it has by what was known of them."""
    layer = KV.layers[0]
    some = np.sort(np.random.default_rng(1).permutation(82)[:40])
    indices = np.tile(np.concatenate((some, np.arange(82, 90))), (2, 1))
    cut = replace(KV, layers=(layer.take(indices),))
    whole, part = (scores_of("infokv:70(alpha=0.0,window_size=8)", kv)[:, :-8] for kv in (KV, cut))
    ratio = part / np.take_along_axis(whole, indices[:, :-8], axis=1)
    assert ratio == pytest.approx(np.full_like(ratio, ratio[0, 0]), rel=1e-4)
    assert ratio[0, 0] > 1


# --- cuts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rkv:50", "infokv:70", "decoding:70(decoding=knorm)", "rkv:0.5"])
def test_a_cut_leaves_the_target_and_repeats_itself(name: str) -> None:
    selection = parse_compression(name).selection
    assert isinstance(selection, CutsWhileDecoding)
    cut = selection.cut_selector(90)
    once = cut.select(KV)
    assert all(layer.num_tokens == selection.decode_target(90) for layer in once.layers)
    again = cut.select(once)
    assert all(one is other for one, other in zip(once.layers, again.layers, strict=True))


def test_a_cut_after_the_prompt_is_the_selection_itself() -> None:
    for name in ("rkv:50", "infokv:70"):
        selection = parse_compression(name).selection
        assert isinstance(selection, CutsWhileDecoding)
        for one, other in zip(selection.selector().select(KV).layers, selection.cut_selector(90).select(KV).layers,
                              strict=True):  # fmt: skip
            assert np.array_equal(one.positions, other.positions)


def test_a_whole_prompt_stays_until_the_first_cut() -> None:
    selection = parse_compression("decoding:66(decoding=rkv)").selection
    assert [layer.num_tokens for layer in selection.selector().select(KV).layers] == [90, 90]
