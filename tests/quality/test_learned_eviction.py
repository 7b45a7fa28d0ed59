"""KVzip, KVzap and DMS: scores by hand, budgets that move, thresholds, and prices that fit what came out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.base import LayerView
from kvsim.compression.selection.delayed import DelayedEviction
from kvsim.compression.selection.kvzap import KVzap, KVzapSelector, predicted_scores
from kvsim.compression.selection.kvzip import KVzip
from kvsim.compression.selection.reconstruction import reconstruction_scores
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.limit.token_ids import prefill_flops
from kvsim.numerics.regression import ridge
from kvsim.numerics.softmax import softmax
from kvsim.quality.store import fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec
from kvsim.tensors import KvTensors, LayerKv, PromptSignals
from tests.quality.conftest import noise_cache

LN2 = float(np.log(2.0))


# --- scores ---------------------------------------------------------------------------------------------------------


def _three_tokens() -> KvTensors:
    """Keys that weigh 2 for a query along them, and read again weigh 1."""
    keys = np.array([[[LN2, 0], [0, LN2], [0, 0]]], dtype=np.float32)
    asked = np.array([[[1, 0], [0, 1], [2, 0]]], dtype=np.float32)
    layer = LayerKv(keys, keys, np.arange(3)[None], asked[:, :0], asked[:, :0])
    signals = PromptSignals(repeat_queries=(asked,), repeat_keys=(np.zeros_like(keys),))
    return KvTensors((layer,), None, 1.0, "by hand", signals=signals)


def test_three_tokens_by_hand() -> None:
    """Weights of the three queries, with one, two and three keys of the second reading in the denominator.

    2 1 1 of 5; 1 2 1 of 6; 4 1 1 of 9: the most is 4/9, 2/6 and 1/5.
    """
    scores = reconstruction_scores(_three_tokens(), 0, "kvzip")
    assert np.exp(scores) == pytest.approx(np.array([[4 / 9, 2 / 6, 1 / 5]]), rel=1e-5)


def test_the_most_of_a_kv_heads_query_heads_counts() -> None:
    """A second query head that only asks for the last token changes nothing but its score."""
    kv = _three_tokens()
    keys = kv.layers[0].keys.copy()
    keys[0, 2] = [0, -LN2]
    asked = np.concatenate((kv.signals.repeat_queries[0], np.array([[[0, -3], [0, -3], [0, -3]]])))  # type: ignore[index]
    layer = replace(kv.layers[0], keys=keys, queries=np.zeros((2, 0, 2)), prompt_queries=np.zeros((2, 0, 2)))
    signals = replace(kv.signals, repeat_queries=(asked,))
    scores = np.exp(reconstruction_scores(replace(kv, layers=(layer,), signals=signals), 0, "kvzip"))
    assert scores[0, 2] == pytest.approx(8 / (1 + 1 / 8 + 8 + 1), rel=1e-5)
    assert scores[0, 0] == pytest.approx(4 / 9, rel=1e-5)


@pytest.mark.parametrize("sinks", [0, 3])
def test_chunks_see_sinks_and_themselves(sinks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition, query by query: sinks, the chunk, and the chunk as read again up to the query."""
    monkeypatch.setattr("kvsim.compression.selection.reconstruction.REPEAT_CHUNK", 20)
    monkeypatch.setattr("kvsim.compression.selection.reconstruction._ROWS", 7)
    kv = noise_cache(1, layers=1, tokens=50)
    found = reconstruction_scores(kv, 0, "kvzip", sinks)
    asked, again = kv.signals.repeat_queries, kv.signals.repeat_keys
    assert asked is not None
    assert again is not None
    expected = np.zeros((2, 50))
    for head in range(4):
        for place in range(50):
            start = place // 20 * 20
            stop, first = min(start + 20, 50), min(sinks, start)
            mine = kv.layers[0].keys[head // 2]
            seen = np.concatenate((mine[:first], mine[start:stop], again[0][head // 2, start : place + 1]))
            weights = softmax(kv.attention_scale * (seen.astype(np.float64) @ asked[0][head, place]))
            row = expected[head // 2, start:stop]
            np.maximum(row, weights[first : first + stop - start], out=row)
    assert np.exp(found) == pytest.approx(expected, rel=1e-5)


# --- KVzip ----------------------------------------------------------------------------------------------------------


def _sharper(kv: KvTensors, layer: int, head: int, factor: float) -> KvTensors:
    """One KV head's second reading looks more sharply."""
    asked = [one.copy() for one in kv.signals.repeat_queries or ()]
    size = kv.layers[layer].group_size
    asked[layer][head * size : (head + 1) * size] *= factor
    return replace(kv, signals=replace(kv.signals, repeat_queries=tuple(asked)))


def _kept(name: str, kv: KvTensors) -> np.ndarray:
    """(L, H) tokens kept."""
    stored = store_cache(fit_strategy(parse_compression(name)), kv)
    return np.stack([layer.is_seen.sum(axis=1) for layer in stored.kv.layers])


def test_budgets_move_between_layers_and_heads() -> None:
    kv = _sharper(noise_cache(2, layers=3), 1, 0, 4.0)
    kept = _kept("kvzip:0.75", kv)
    assert kept.sum() == 6 * 80
    assert kept[1, 0] > 200
    assert np.delete(kept.ravel(), 2).max() < 80
    within = _kept("kvzip:0.75(budget_over=layer)", kv)
    assert within.sum(axis=1).tolist() == [160] * 3
    assert within[1, 0] > within[1, 1]
    assert (_kept("kvzip:0.75(budget_over=head)", kv) == 80).all()


def test_sinks_and_the_newest_token_stay() -> None:
    kv = noise_cache(3, layers=2)
    stored = store_cache(fit_strategy(parse_compression("kvzip:0.95(n_sink=6)")), kv)
    for layer in stored.kv.layers:
        for head, is_seen in enumerate(layer.is_seen):
            positions = layer.positions[head, is_seen]
            assert positions[:6].tolist() == list(range(6))
            assert positions[-1] == 319


def test_kvzip_names_what_it_lacks() -> None:
    with pytest.raises(InvalidSpec, match="kvzip needs repeat_queries of the prompt"):
        _kept("kvzip", replace(noise_cache(), signals=PromptSignals()))


def _model(hidden: int, mlp: int, layers: int, queries: int, heads: int = 8, dim: int = 128) -> ModelSpec:
    group = LayerGroup(
        kind=LayerKind.FULL, layers=tuple(range(layers)), num_kv_heads=heads, k_head_dim=dim, v_head_dim=dim
    )
    linear = layers * (hidden * dim * 2 * (queries + heads) + 3 * hidden * mlp)
    embedding = 2 * 128_000 * hidden
    return ModelSpec(
        name="by hand", source="by hand", architecture="Test", hidden_size=hidden, num_attention_heads=queries,
        vocab_size=128_000, intermediate_size=mlp, max_position_embeddings=131_072, groups=(group,),
        num_parameters=linear + embedding, num_active_parameters=linear + embedding, num_embedding_parameters=embedding,
    )  # fmt: skip


QWEN3_8B = _model(4096, 12_288, 36, 32)
LLAMA_8B = _model(4096, 14_336, 32, 32)
QWEN3_32B = _model(5120, 25_600, 64, 64)


@pytest.mark.parametrize("tokens", [4096, 16_384, 131_072])
@pytest.mark.parametrize("model", [QWEN3_8B, LLAMA_8B])
def test_kvzip_makes_prefill_two_to_three_times_as_much(model: ModelSpec, tokens: int) -> None:
    """As kvpress warns; here FLOPs, those of the first reading included."""
    group = model.groups[0]
    ops = KVzip(compression_ratio=0.7).prefill_ops(tokens, LayerView(0, group.num_layers, group), model)
    again = group.num_layers * sum(float(call.work.flops) for call in ops)
    first = prefill_flops(model, tokens)
    assert 2.0 < (first + again) / first < 3.1


def test_kvzip_without_eviction_reads_once() -> None:
    group = LLAMA_8B.groups[0]
    layer = LayerView(0, group.num_layers, group)
    assert not tuple(KVzip(compression_ratio=0.0).prefill_ops(4096, layer, LLAMA_8B))
    assert KVzip(compression_ratio=0.0).prefill_scratch_tokens(layer) == 0
    assert KVzip(compression_ratio=0.5).prefill_scratch_tokens(layer) == 2048


# --- KVzap ----------------------------------------------------------------------------------------------------------


def _samples(count: int = 3) -> tuple[KvTensors, ...]:
    return tuple(noise_cache(seed, layers=3) for seed in range(10, 10 + count))


def _told(kv: KvTensors, noise: float = 0.0) -> KvTensors:
    """Hidden states from which scores follow, beside much that has nothing to do with them."""
    rng = np.random.default_rng(5)
    mixing = rng.standard_normal((2 + 6, 8)).astype(np.float32)
    hidden = []
    for index in range(kv.num_layers):
        scores = reconstruction_scores(kv, index, "kvzip").T
        seen = scores + noise * rng.standard_normal(scores.shape)
        hidden.append(
            (np.concatenate((seen, rng.standard_normal((len(scores), 6))), axis=1) @ mixing).astype(np.float32)
        )
    return replace(kv, signals=replace(kv.signals, hidden=tuple(hidden)))


def _fitted(name: str, samples: tuple[KvTensors, ...]) -> KVzapSelector:
    selector = fit_strategy(parse_compression(name), samples).selector
    assert isinstance(selector, KVzapSelector)
    return selector


def test_ridge_is_least_squares_with_a_penalty() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 4)).astype(np.float32)
    wanted = rows @ rng.standard_normal((4, 2)) + [3.0, -1.0]
    exact = ridge(rows, wanted, penalty=1e-9)
    assert exact(rows) == pytest.approx(wanted, abs=1e-6)
    # At the minimum the gradient vanishes.
    found = ridge(rows, wanted, penalty=5.0)
    residual = found(rows) - wanted
    assert residual.mean(axis=0) == pytest.approx([0, 0], abs=1e-6)
    assert rows.T @ residual + 5.0 * found.weights == pytest.approx(np.zeros((4, 2)), abs=1e-4)
    assert np.linalg.norm(found.weights) < np.linalg.norm(exact.weights)


def test_the_surrogate_finds_scores_where_hidden_states_tell_them() -> None:
    held_out = _told(noise_cache(0, layers=3))
    selector = _fitted("kvzap_linear:0.5(window_size=16)", tuple(_told(one) for one in _samples()))
    assert selector.surrogate is not None
    for index, guess in enumerate(predicted_scores(held_out, selector.surrogate.maps)):
        scores = reconstruction_scores(held_out, index, "kvzip")
        assert 1 - ((scores - guess) ** 2).sum() / ((scores - scores.mean()) ** 2).sum() > 0.98


def test_a_threshold_keeps_what_is_above_it_and_the_window() -> None:
    kv, samples = _told(noise_cache(0, layers=3)), tuple(_told(one) for one in _samples())
    name = "kvzap_linear:0.5(window_size=16,threshold=-3.0)"
    selector = _fitted(name, samples)
    assert selector.surrogate is not None
    stored = store_cache(fit_strategy(parse_compression(name), samples), kv)
    guesses = predicted_scores(kv, selector.surrogate.maps)
    for layer, guess in zip(stored.kv.layers, guesses, strict=True):
        for head in range(2):
            kept = set(layer.positions[head, layer.is_seen[head]].tolist())
            assert kept == {*np.flatnonzero(guess[head] >= -3.0).tolist(), *range(304, 320)}


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_threshold_removes_its_share_of_the_calibration_tokens(ratio: float) -> None:
    samples = _samples()
    compression = parse_compression(f"kvzap_linear:{ratio}(window_size=32)")
    strategy = fit_strategy(compression, samples)
    kept = sum(int(layer.is_seen.sum()) for one in samples for layer in store_cache(strategy, one).kv.layers)
    heads = 2 * 3 * len(samples)
    assert isinstance(compression.selection, KVzap)
    assert kept == pytest.approx(heads * compression.selection.expected_tokens(320), abs=2)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_bits_are_what_pricing_says_at_the_share_that_came_out(ratio: float) -> None:
    kv, samples = noise_cache(4, layers=3), _samples()
    compression = parse_compression(f"kvzap_linear:{ratio}(window_size=32)")
    stored = store_cache(fit_strategy(compression, samples), kv)
    selection = compression.selection
    for index, (layer, bits) in enumerate(zip(stored.kv.layers, stored.bits, strict=True)):
        came_out = (layer.is_seen.sum() / 2 - 32) / (320 - 32)
        same = selection.model_copy(update={"compression_ratio": 1 - came_out})
        view = layer_view(kv, index)
        priced = sum(
            heads.share * encoded_bytes(compression.encoding, view.group, Dtype.BF16, heads.resident(0))
            for heads in same.head_curves(320, view)
        )
        assert bits == pytest.approx(8 * priced, rel=1e-12)


def test_kvzap_wants_a_second_reading_only_of_what_it_learns_from() -> None:
    selection = parse_compression("kvzap_linear").selection
    assert selection.needs_signals == {"hidden"}
    assert selection.fits_on_signals == {"hidden", "repeat_queries"}
    assert parse_compression("snapkv").selection.needs_signals == frozenset()
    kv = noise_cache(0, layers=3)
    once = replace(kv, signals=PromptSignals(hidden=kv.signals.hidden))
    strategy = fit_strategy(parse_compression("kvzap_linear"), _samples())
    assert store_cache(strategy, once).total_bits == store_cache(strategy, kv).total_bits
    with pytest.raises(InvalidSpec, match="kvzap needs repeat_queries"):
        fit_strategy(parse_compression("kvzap_linear"), (once,))
    with pytest.raises(InvalidSpec, match="there are none"):
        fit_strategy(parse_compression("kvzap_linear"))


@pytest.mark.parametrize("model", [QWEN3_8B, LLAMA_8B, QWEN3_32B])
@pytest.mark.parametrize(("name", "most"), [("kvzap", 0.0111), ("kvzap_linear", 0.0002)])
def test_the_surrogate_costs_what_the_paper_says(model: ModelSpec, name: str, most: float) -> None:
    """At most 1.1 % (MLP) and 0.02 % (linear) of the linear layers' FLOPs."""
    group = model.groups[0]
    ops = parse_compression(name).selection.prefill_ops(1000, LayerView(0, group.num_layers, group), model)
    (work,) = (call.work for call in ops if call.name == "predict_scores")
    linear = 2.0 * (model.num_parameters - model.num_embedding_parameters) / group.num_layers
    assert 0 < float(work.flops) / 1000 <= most * linear


def test_the_mlp_is_priced_only() -> None:
    with pytest.raises(NotRunnable, match="kvzap_linear"):
        parse_compression("kvzap").selection.selector()


# --- delayed eviction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kvzap:0.75", "dms-8x(window_size=128)"])
def test_expected_tokens_are_those_of_chance(name: str) -> None:
    """Heads that keep each token older than the window with a probability: the mean over many is the curve."""
    selection = parse_compression(name).selection
    assert isinstance(selection, DelayedEviction)
    group = QWEN3_8B.groups[0]
    rng = np.random.default_rng(1)
    stays = rng.random((4000, 1000)) < 1 - selection.compression_ratio
    for prompt, generated in ((64, 30), (64, 500), (300, 0), (600, 400)):
        tokens = prompt + generated
        old = max(0, tokens - 128)
        held = stays[:, :old].sum(axis=1) + tokens - old
        curves = selection.head_curves(prompt, LayerView(0, 36, group))
        mean = sum(heads.share * heads.resident(generated) for heads in curves)
        assert mean == pytest.approx(selection.expected_tokens(tokens), rel=1e-12)
        assert abs(held.mean() - mean) <= 4 * held.std() / len(held) ** 0.5 + 1e-9


def test_dms_must_be_trained() -> None:
    with pytest.raises(NotRunnable, match="trained into the model"):
        parse_compression("dms").selection.selector()
    assert parse_compression("dms").name == "dms-8x"
    assert parse_compression("dms:0.75").name == "dms-4x"


def test_masked_keeps_memory_and_traffic() -> None:
    selection = parse_compression("kvzap(masked=true)").selection
    curves = selection.head_curves(1000, LayerView(0, 36, QWEN3_8B.groups[0]))
    assert [(heads.share, heads.resident(50)) for heads in curves] == [(1.0, 1050)]
    assert selection.expected_share is None
