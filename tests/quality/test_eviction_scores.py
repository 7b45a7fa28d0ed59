"""What each scorer of evicting methods looks at, against a direct definition or caches with a known answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.compression import parse_compression
from kvsim.compression.selection.chunkkv import ChunkKV, chunk_means
from kvsim.compression.selection.expected_attention import ExpectedAttention, FutureQueries, expected_weights
from kvsim.compression.selection.prompt_attention import received_attention
from kvsim.compression.selection.qfilter import query_filters
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.numerics.softmax import softmax
from kvsim.quality.store import fit_strategy, needs_calibration, store_cache
from kvsim.tensors import KvTensors, LayerKv, Rope
from tests.quality.conftest import noise_cache, scores_of


@pytest.fixture
def kv() -> KvTensors:
    return noise_cache(11, layers=2, tokens=200)


def _kept(name: str, kv: KvTensors, *samples: KvTensors) -> list[np.ndarray]:
    return [layer.positions for layer in store_cache(fit_strategy(parse_compression(name), samples), kv).kv.layers]


def _changed(kv: KvTensors, change: Callable[[LayerKv], LayerKv]) -> KvTensors:
    return replace(kv, layers=tuple(change(layer) for layer in kv.layers))


# --- Knorm, KeyDiff -------------------------------------------------------------------------------------------------


def test_knorm_keeps_the_shortest_keys(kv: KvTensors) -> None:
    for layer, positions in zip(kv.layers, _kept("knorm:0.75", kv), strict=True):
        shortest = np.argsort(np.linalg.norm(layer.keys, axis=2), axis=1)[:, :50]
        assert np.array_equal(positions, np.sort(shortest, axis=1))


def test_keydiff_looks_at_directions_alone(kv: KvTensors) -> None:
    lengths = np.exp(np.random.default_rng(12).standard_normal((2, 200, 1))).astype(np.float32)
    stretched = _changed(kv, lambda layer: replace(layer, keys=layer.keys * lengths))
    np.testing.assert_allclose(scores_of("keydiff", stretched), scores_of("keydiff", kv), atol=1e-6)


def test_keydiff_keeps_the_odd_ones_out(kv: KvTensors) -> None:
    def bundle(layer: LayerKv) -> LayerKv:
        keys = 0.1 * layer.keys + 1.0
        keys[:, 40:44] *= -1.0
        return replace(layer, keys=keys)

    for positions in _kept("keydiff:4", _changed(kv, bundle)):
        assert np.array_equal(positions, [range(40, 44)] * 2)


# --- TOVA -----------------------------------------------------------------------------------------------------------


def test_tova_ranks_by_the_newest_query_in_all_heads(kv: KvTensors) -> None:
    layer, scores = kv.layers[1], scores_of("tova", kv, 1)
    weights = np.zeros(200)
    for head in range(4):
        logits = kv.attention_scale * layer.keys[head // 2].astype(np.float64) @ layer.prompt_queries[head, -1]
        weights += softmax(logits) / 4
    assert np.isinf(scores[:, -1]).all()
    np.testing.assert_allclose(scores[:, :-1], np.tile(weights[:-1], (2, 1)), rtol=1e-5)
    for positions in _kept("tova:0.8", kv):
        assert np.array_equal(positions[0], positions[1])
        assert positions[0, -1] == 199


# --- Expected Attention ---------------------------------------------------------------------------------------------


def test_the_mean_rotation_is_that_of_single_ones() -> None:
    rng = np.random.default_rng(13)
    vectors, positions = rng.standard_normal((5, 32)), np.arange(900, 1412)
    for rope in (Rope.plain(32, 10_000.0), Rope(Rope.plain(32, 10_000.0).inverse_frequencies[:8])):
        single = np.stack([rope.rotate(vectors.astype(np.float32), np.full(5, place)) for place in positions])
        np.testing.assert_allclose(
            vectors @ rope.mean_rotation(32, positions).T, single.mean(axis=0, dtype=np.float64), atol=1e-6
        )


def test_expected_weights_are_those_of_gaussian_queries() -> None:
    """Softmax of ln E[exp(s q·k)], the mean taken over 200,000 draws, within five of its standard errors."""
    rng = np.random.default_rng(14)
    factor = 0.4 * rng.standard_normal((8, 8))
    mean, covariance = rng.standard_normal(8), factor @ factor.T
    keys = rng.standard_normal((1, 12, 8)).astype(np.float32)
    nothing = np.zeros((1, 0, 8), dtype=np.float32)
    layer = LayerKv(keys, keys, np.arange(12)[None], nothing, nothing)
    draws = rng.multivariate_normal(mean, covariance, 200_000)
    exponentials = np.exp(0.35 * draws @ keys[0].T.astype(np.float64))
    sampled, error = exponentials.mean(axis=0), exponentials.std(axis=0) / np.sqrt(len(draws))
    weights = expected_weights(layer, FutureQueries(mean[None], covariance[None]), 0.35)[0]
    total = np.exp(0.35 * keys[0] @ mean + 0.5 * 0.35**2 * np.einsum("nd,de,ne->n", keys[0], covariance, keys[0])).sum()
    assert (np.abs(weights * total - sampled) < 5 * error).all()


def test_expected_attention_finds_the_law_of_the_queries() -> None:
    """Queries of one law before RoPE: its mean and covariance, turned by the mean rotation, come back."""
    rng = np.random.default_rng(15)
    kv = noise_cache(15, layers=1, tokens=4000, head_dim=16)
    assert kv.rope is not None
    factor, mean = rng.standard_normal((16, 16)), rng.standard_normal(16)
    bare = (mean + rng.standard_normal((4, 4000, 16)) @ factor.T).astype(np.float32)
    queries = kv.rope.rotate(bare, np.arange(4000))
    kv = _changed(kv, lambda layer: replace(layer, prompt_queries=queries))
    found = ExpectedAttention(compression_ratio=0.5).future_queries(kv, 0)
    turn = kv.rope.mean_rotation(16, np.arange(4000, 4512))
    assert found.covariance is not None
    spread = turn @ factor @ factor.T @ turn.T
    np.testing.assert_allclose(found.mean, np.tile(turn @ mean, (4, 1)), atol=0.4)
    assert np.linalg.norm(found.covariance - spread, axis=(1, 2)).max() < 0.1 * np.linalg.norm(spread)
    # Queries of the sinks count for nothing.
    queries[:, :4] = 1e6
    again = ExpectedAttention(compression_ratio=0.5).future_queries(kv, 0)
    assert np.array_equal(again.mean, found.mean)


def test_expected_attention_keeps_sinks_and_weighs_by_value(kv: KvTensors) -> None:
    scores, bare = (scores_of(f"expected_attention(use_vnorm={on})", kv) for on in ("true", "false"))
    lengths = np.linalg.norm(kv.layers[0].values, axis=2)
    assert np.isinf(scores[:, :4]).all()
    np.testing.assert_allclose(scores[:, 4:], (bare * lengths)[:, 4:], rtol=1e-5)
    np.testing.assert_allclose(bare[:, 4:].sum(axis=1), 1.0, rtol=1e-5)
    shifted = scores_of("expected_attention(epsilon=0.01)", kv)
    np.testing.assert_allclose(shifted[:, 4:], scores[:, 4:] + 0.01 * lengths[:, 4:], rtol=1e-5)
    for positions in _kept("expected_attention:0.95", kv):
        assert np.array_equal(positions[:, :4], [range(4)] * 2)


# --- Q-Filters ------------------------------------------------------------------------------------------------------


def _along(kv: KvTensors, direction: np.ndarray) -> KvTensors:
    """Queries that spread along a direction, two thirds of them on its positive side."""
    rng = np.random.default_rng(16)

    def pull(layer: LayerKv) -> LayerKv:
        signs = np.where(rng.random((4, 64, 1)) < 2 / 3, 10.0, -10.0)
        return replace(layer, prompt_queries=(layer.prompt_queries + signs * direction).astype(np.float32))

    return _changed(kv, pull)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_filter_points_to_where_most_queries_lie(kv: KvTensors, sign: float) -> None:
    direction = np.full(64, sign * 64**-0.5)
    (sample,) = (_along(noise_cache(17, layers=1, tokens=80), direction),)
    filters = query_filters(sample.layers)
    assert filters.shape == (2, 64)
    assert (filters @ direction > 0.95).all()


def test_qfilter_keeps_keys_that_reach_far_along_other_sequences_queries(kv: KvTensors) -> None:
    direction = np.full(64, 64**-0.5)
    sample = _along(noise_cache(18, layers=2, tokens=80), direction)
    kept = _kept("qfilter:0.75", kv, sample)
    for layer, other, positions in zip(kv.layers, sample.layers, kept, strict=True):
        products = np.einsum("hnd,hd->hn", layer.keys, query_filters([other]))
        assert np.array_equal(positions, np.sort(np.argsort(-products, axis=1)[:, :50], axis=1))


def test_qfilter_says_what_it_needs(kv: KvTensors) -> None:
    compression = parse_compression("qfilter")
    assert needs_calibration(compression)
    with pytest.raises(InvalidSpec, match="qfilter needs calibration caches"):
        fit_strategy(compression)
    with pytest.raises(InvalidSpec, match="these have none"):
        fit_strategy(compression, [kv.without_queries()])
    with pytest.raises(InvalidSpec, match="not fitted"):
        compression.selection.selector().select(kv)
    with pytest.raises(NotRunnable, match="selector fits"):
        scores_of("qfilter", kv)


# --- ChunkKV --------------------------------------------------------------------------------------------------------


def test_chunkkv_keeps_whole_chunks_in_all_heads(kv: KvTensors) -> None:
    for index, positions in enumerate(_kept("chunkkv:0.7(chunk_length=16)", kv)):
        # 200 tokens are 12 chunks and one of 8: int(13 * 0.3) = 3 of them stay, the last among them.
        assert positions.shape == (2, 40)
        assert np.array_equal(positions[0], positions[1])
        scores = received_attention(kv.layers[index], kv.attention_scale, 64)
        assert scores.shape == (2, 200)
        starts = positions[0].reshape(-1, 8)[:, 0]
        assert set(starts % 16) == {0, 8}
        assert starts[-1] == 192


def test_chunkkv_takes_the_best_means(kv: KvTensors) -> None:
    scores = -np.linalg.norm(kv.layers[0].keys, axis=2).sum(axis=0)
    means = [scores[start : start + 20].mean() for start in range(0, 200, 20)]
    best = sorted({9, *np.argsort(means[:9])[::-1][:3].tolist()})
    assert len(best) == 4
    (positions, _) = _kept("chunkkv:0.55(scorer=knorm)", kv)
    assert np.array_equal(positions[0] // 20, np.repeat(best, 20))
    np.testing.assert_allclose(chunk_means(-np.linalg.norm(kv.layers[0].keys, axis=2), 20), means, rtol=1e-6)


def test_tokens_that_always_stay_count_as_the_best_of_the_others() -> None:
    scores = np.array([[np.inf, 1.0, 2.0, 3.0], [np.inf, 5.0, 0.0, 1.0]], dtype=np.float32)
    assert chunk_means(scores, 2).tolist() == [(10 + 6) / 2, (2 + 4) / 2]


@given(prompt=st.integers(1, 5000), ratio=st.floats(0, 0.99), length=st.integers(1, 64), budget=st.integers(64, 3000))
def test_chunks_fit_their_budget(prompt: int, ratio: float, length: int, budget: int) -> None:
    by_share = ChunkKV(compression_ratio=ratio, chunk_length=length)
    chunks = -(-prompt // length)
    assert by_share.kept_chunks(prompt) == max(1, int(chunks * (1 - ratio)))
    assert (by_share.budget(prompt) - prompt) % length == 0
    by_tokens = ChunkKV(budget_tokens=budget, chunk_length=length).budget(prompt)
    assert by_tokens <= budget
    assert by_tokens == prompt or by_tokens + length > budget


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("chunkkv:64(chunk_length=65)", "holds no chunk of chunk_length 65"),
        ("chunkkv:40", "scorer 'snapkv': budget_tokens 40 is smaller than window_size 64"),
        ("chunkkv(scorer=chunkkv)", "unknown scorer 'chunkkv'"),
    ],
)
def test_chunks_that_cannot_be_are_refused(name: str, match: str) -> None:
    with pytest.raises(InvalidSpec, match=match):
        parse_compression(name)


# --- LagKV, CUR, random ---------------------------------------------------------------------------------------------


def test_lagkv_ranks_within_parts(kv: KvTensors) -> None:
    scores = scores_of("lagkv(lag_size=32)", kv)
    # 4 sinks, 6 parts of 32 of which the last is spared, and 4 tokens beyond them.
    assert (scores[:, :4] > scores[:, 4:].max()).all()
    parts = np.sort(scores[:, 4:164].reshape(2, 5, 32), axis=2)
    assert np.array_equal(parts, np.broadcast_to(np.arange(32, dtype=np.float32) / 32, parts.shape))
    assert (np.diff(scores[:, 164:], axis=1) > 0).all()
    assert scores[:, 164:].min() > scores[:, 4:164].max()


def test_lagkv_looks_at_the_range_of_the_next_part(kv: KvTensors) -> None:
    """Moving and stretching whole channels changes nothing; a token far outside the range of the next part is kept."""
    rng = np.random.default_rng(19)
    scale, shift = np.exp(rng.standard_normal(64)).astype(np.float32), rng.standard_normal(64).astype(np.float32)
    moved = _changed(
        kv, lambda layer: replace(layer, keys=scale * layer.keys + shift, values=scale * layer.values - shift)
    )
    assert np.array_equal(scores_of("lagkv(lag_size=32)", moved), scores_of("lagkv(lag_size=32)", kv))

    def stand_out(layer: LayerKv) -> LayerKv:
        keys = layer.keys.copy()
        keys[:, 50] *= 20
        return replace(layer, keys=keys)

    assert (scores_of("lagkv(lag_size=32)", _changed(kv, stand_out))[:, 50] == np.float32(31 / 32)).all()


def test_lagkv_keeps_the_newest_of_a_short_prompt(kv: KvTensors) -> None:
    for positions in _kept("lagkv:0.75", kv):
        assert np.array_equal(positions, [[*range(4), *range(154, 200)]] * 2)


@pytest.mark.parametrize("leverage", ["key", "value", "kv_avg", "kv_product"])
def test_cur_takes_shares_of_a_window(kv: KvTensors, leverage: str) -> None:
    layer = kv.layers[0]
    parts = {"key": (layer.keys**2).sum(axis=2), "value": (layer.values**2).sum(axis=2)}
    shares = {}
    for name, energy in parts.items():
        shares[name] = np.concatenate(
            [part / part.sum(axis=1, keepdims=True) for part in np.split(energy, range(16, 200, 16), axis=1)], axis=1
        )
    mean, product = (shares["key"] + shares["value"]) / 2, shares["key"] * shares["value"]
    expected = {**shares, "kv_avg": mean, "kv_product": product}[leverage]
    scores = scores_of(f"cur(leverage_type={leverage})", kv)
    assert np.isinf(scores[:, :4]).all()
    np.testing.assert_allclose(scores[:, 4:], expected[:, 4:], rtol=1e-5)


def test_cur_over_the_whole_prompt_ranks_by_length_alone(kv: KvTensors) -> None:
    scores = scores_of("cur(leverage_type=key,use_local_approximation=false)", kv)[:, 4:]
    assert np.array_equal(np.argsort(scores), np.argsort((kv.layers[0].keys ** 2).sum(axis=2)[:, 4:]))


def test_random_draws_follow_content_and_seed(kv: KvTensors) -> None:
    first, again, other = (_kept(f"random:0.75(seed={seed})", kv) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0][0], first[0][1])
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first, _kept("random:0.75", noise_cache(20, layers=2, tokens=200)))


def test_random_draws_are_fair() -> None:
    """How often each token stays over 400 draws of four heads, within five standard errors of a quarter."""
    kv = noise_cache(21, layers=1, heads=4, tokens=40)
    stays = np.zeros(40)
    for seed in range(400):
        stays += np.bincount(_kept(f"random:0.75(seed={seed})", kv)[0].ravel(), minlength=40)
    assert np.abs(stays / 1600 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 1600)
