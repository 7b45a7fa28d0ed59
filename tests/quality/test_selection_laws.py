"""Laws of every token selection: a new one joins by its place in the union.

Spellings are a class's names and `spellings`, with sizes where it takes them (`BudgetedSelection`), and with
``masked=true`` where it has that field. Methods that must be trained into a model (`NotRunnable`) are held to the laws
of pricing alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from kvsim.compression import SELECTIONS, Compression, TokenSelection, parse_compression
from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import BudgetedSelection
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.tensors import KvTensors, LayerKv, PromptSignals, attend
from tests.quality.conftest import noise_cache

SIZES = ("0", "0.3", "0.7", "0.95", "100", "1", "100000")
ODD = (
    "streaming_llm:64", "streaming_llm(num_sink_tokens=0,window_length=10)", "snapkv:0.9(window_size=16)",
    "pyramidkv:100(beta=5)", "quest:64", "quest:128(num_dense_layers=0)", "chunkkv:0.7(scorer=keydiff,chunk_length=7)",
    "duo_attention(sink_size=8,recent_size=56)", "expected_attention:0.7(n_sink=0)", "lagkv:0.7(lag_size=32)",
    "pyramidkv:100(beta=5)", "quest:64", "quest:128(num_dense_layers=0)", "prefill_decoding:80",
    "prefill_decoding:80(prefilling=rkv,decoding=infokv,compression_interval=16)", "rkv:60(compression_interval=1)",
    "kvzip:0.7(budget_over=layer)", "kvzip:0.7(budget_over=head)", "kvzip:0.7(n_sink=0)",
    "kvzap_linear:0.3(window_size=32)", "kvzap_linear:0", "kvzap_linear:0.9(masked=true)",
)  # fmt: skip
PROMPTS = (0, 1, 2, 5, 63, 64, 65, 200, 1000, 4097)


def _spellings(part: type[TokenSelection]) -> Iterator[str]:
    yield from part.spellings
    for name in part.names:
        yield name
        if "masked" in part.model_fields:
            yield f"{name}(masked=true)"
        if issubclass(part, BudgetedSelection):
            yield from _sized(name)


def _sized(name: str) -> Iterator[str]:
    for size in SIZES:
        # A method may refuse a size: fewer tokens than the window that it keeps, say.
        with suppress(InvalidSpec):
            parse_compression(f"{name}:{size}")
            yield f"{name}:{size}"


def _selection(name: str) -> TokenSelection:
    return parse_compression(name).selection


def _runs(name: str) -> bool:
    try:
        _selection(name).selector()
    except NotRunnable:
        return False
    return True


EVERY = tuple(dict.fromkeys((*(name for part in SELECTIONS for name in _spellings(part)), *ODD)))
RUNNABLE = tuple(name for name in EVERY if _runs(name))
COUNTED = tuple(name for name in RUNNABLE if _selection(name).expected_share is None)
KEEPS_NEWEST = tuple(name for name in RUNNABLE if _selection(name).keeps_newest)
PLAIN = tuple(name for name in RUNNABLE if not _selection(name).merges)
NEUTRAL = tuple(
    name for name in RUNNABLE
    if isinstance(one := _selection(name), BudgetedSelection) and one.compression_ratio == 0.0
)  # fmt: skip


@cache
def _noise(seed: int = 0, tokens: int = 320, heads: int = 2, layers: int = 6) -> KvTensors:
    return noise_cache(seed, tokens=tokens, heads=heads, layers=layers)


def _store(name: str, kv: KvTensors, samples: tuple[KvTensors, ...]) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name), samples), kv)


@cache
def _stored(name: str) -> StoredCache:
    return _store(name, _noise(), (_noise(1), _noise(2)))


# --- pricing --------------------------------------------------------------------------------------------------------


def _layers(count: int = 8) -> list[LayerView]:
    group = LayerGroup(kind=LayerKind.FULL, layers=tuple(range(count)), num_kv_heads=8, k_head_dim=128, v_head_dim=128)
    return [LayerView(index, count, group) for index in range(count)]


@pytest.mark.parametrize("name", EVERY)
def test_attended_at_most_resident_at_most_context(name: str) -> None:
    selection = _selection(name)
    for layer, prompt in product(_layers(), PROMPTS):
        held = selection.prefill_resident_tokens(prompt, layer)
        for heads in selection.head_curves(prompt, layer):
            assert heads.resident(0) <= held <= prompt
            for generated in (0, 1, 2, 17, 100, 2049):
                assert 0 <= heads.attended(generated) <= heads.resident(generated) <= prompt + generated
            if prompt:
                assert heads.attended(1) >= 1


@pytest.mark.parametrize("name", EVERY)
def test_a_step_adds_one_token_at_most_and_drops_some_only_where_a_curve_breaks(name: str) -> None:
    selection = _selection(name)
    for layer, prompt in product(_layers(), (1, 64, 65, 300, 1000)):
        for curve in {heads.resident for heads in selection.head_curves(prompt, layer)}:
            held = [curve(generated) for generated in range(600)]
            for generated, (before, after) in enumerate(pairwise(held), start=1):
                assert after <= before + 1
                assert after >= before or curve.segment_at(generated)[0] == generated


@pytest.mark.parametrize("name", EVERY)
def test_a_longer_prompt_leaves_no_fewer_tokens(name: str) -> None:
    """None, where tokens stay or go one by one; where they do so in units, less than a unit per layer."""
    selection, layers = _selection(name), _layers()
    slack = len(layers) * (selection.unit_tokens - 1)
    most = 0
    for prompt in range(0, 700, 13):
        kept = sum(selection.resident_tokens(prompt, layer)(0) for layer in layers)
        assert kept >= most - slack
        most = max(most, kept)


@pytest.mark.parametrize("name", EVERY)
def test_json_and_name_round_trip(name: str) -> None:
    compression = parse_compression(name)
    assert Compression.model_validate_json(compression.model_dump_json()) == compression
    assert parse_compression(compression.name) == compression


# --- pricing and algorithm ------------------------------------------------------------------------------------------


def _seen(layer: LayerKv) -> int:
    return int(layer.is_seen.sum())


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_tokens_stay_as_pricing_says(name: str) -> None:
    """Layer by layer, or in all of them where heads share a budget unequally, over layers too."""
    selection, kv = _selection(name), _noise()
    seen, priced = [], []
    for index, (before, after) in enumerate(zip(kv.layers, _stored(name).kv.layers, strict=True)):
        seen.append(after.num_kv_heads * after.num_tokens if selection.masks else _seen(after))
        curves = selection.head_curves(before.num_tokens, layer_view(kv, index))
        assert sum(heads.share for heads in curves) == pytest.approx(1)
        priced.append(before.num_kv_heads * sum(heads.share * heads.resident(0) for heads in curves))
    if selection.granularity == "ragged" or selection.moves_budgets:
        assert sum(seen) == pytest.approx(sum(priced), rel=1e-12)
    else:
        assert seen == priced


@pytest.mark.parametrize("name", COUNTED)
def test_bits_are_what_pricing_says(name: str) -> None:
    compression, kv = parse_compression(name), _noise()
    selection, bits, priced = compression.selection, _stored(name).bits, []
    for index, before in enumerate(kv.layers):
        layer, prompt = layer_view(kv, index), before.num_tokens
        encoding, scanned = compression.encoding_at(layer), selection.scanned_tokens(prompt, layer)
        curves = selection.head_curves(prompt, layer)
        size = sum(
            heads.share * encoded_bytes(encoding, layer.group, Dtype.BF16, heads.resident(0)) for heads in curves
        )
        if scanned is not None:
            size += scanned(0) * selection.scan_bytes_per_token(layer.group, 2.0)
        size += sum(heads.share * heads.resident(0) for heads in curves) * selection.held_bytes_per_token(layer)
        priced.append(8 * size)
    if selection.granularity == "ragged" or selection.moves_budgets:
        assert sum(bits) == pytest.approx(sum(priced), rel=1e-12)
    else:
        assert list(bits) == priced


@pytest.mark.parametrize("name", NEUTRAL)
def test_removing_nothing_is_keep_all(name: str) -> None:
    selection, kv = _selection(name), _noise()
    assert not selection.evicts
    for before, after in zip(kv.layers, _stored(name).kv.layers, strict=True):
        assert np.array_equal(after.keys, before.keys)
        assert np.array_equal(after.values, before.values)
        assert after.is_seen.all()
    for layer in _layers():
        for prompt in PROMPTS:
            for generated in (0, 1, 50):
                assert selection.resident_tokens(prompt, layer)(generated) == prompt + generated
                assert selection.attended_tokens(prompt, layer)(generated) == prompt + generated


# --- algorithm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNABLE)
def test_entries_stand_for_tokens_of_the_prompt_in_order(name: str) -> None:
    merges = _selection(name).merges
    for before, after in zip(_noise().layers, _stored(name).kv.layers, strict=True):
        for head, is_seen in enumerate(after.is_seen):
            positions = after.positions[head, is_seen]
            assert len(positions) >= 1
            assert (np.diff(positions) > 0).all()
            if not merges:
                assert np.array_equal(after.keys[head, is_seen], before.keys[head, positions])
                assert np.array_equal(after.values[head, is_seen], before.values[head, positions])
        if after.log_weights is not None:
            assert not (np.isnan(after.log_weights) | np.isposinf(after.log_weights)).any()


@pytest.mark.parametrize("name", KEEPS_NEWEST)
def test_the_newest_token_stays(name: str) -> None:
    for layer in _stored(name).kv.layers:
        assert (layer.positions[:, -1] == 319).all()
        assert layer.is_seen[:, -1].all()


@pytest.mark.parametrize("name", PLAIN)
def test_lost_mass_says_how_far_the_output_moves(name: str) -> None:
    """o - o^ = m (v_E - v_S): what the evicted tokens' mean value differs by, times the attention that they had."""
    kv = _noise()
    for before, after in zip(kv.layers, _stored(name).kv.layers, strict=True):
        weights = _weights(before, kv.attention_scale)
        kept = np.zeros((before.num_kv_heads, before.num_tokens), dtype=bool)
        for head, is_seen in enumerate(after.is_seen):
            kept[head, after.positions[head, is_seen]] = True
        values = before.values.astype(np.float64)
        of_kept = np.where(kept[:, None], weights, 0)
        of_evicted = weights - of_kept
        mass = of_evicted.sum(axis=-1, keepdims=True)
        mean_kept = of_kept @ values / of_kept.sum(axis=-1, keepdims=True)
        mean_evicted = np.divide(of_evicted @ values, mass, out=mean_kept.copy(), where=mass > 0)
        moved = weights @ values - _weights(after, kv.attention_scale) @ after.values.astype(np.float64)
        np.testing.assert_allclose(moved, mass * (mean_evicted - mean_kept), rtol=0, atol=1e-12)


def _weights(layer: LayerKv, scale: float) -> np.ndarray:
    queries = layer.queries.reshape(layer.num_kv_heads, -1, layer.keys.shape[2]).astype(np.float64)
    weights = np.exp(scale * (queries @ layer.keys.astype(np.float64).transpose(0, 2, 1)))
    weights *= layer.is_seen[:, None]
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 41])
@pytest.mark.parametrize("name", RUNNABLE)
def test_short_prompts(name: str, tokens: int) -> None:
    kv = _noise(5, tokens, layers=3)
    kept = _store(name, kv, (_noise(6, layers=3), _noise(7, layers=3))).kv
    for layer in kept.layers:
        assert np.isfinite(attend(layer, kv.attention_scale).outputs).all()


@pytest.mark.parametrize("name", RUNNABLE)
def test_heads_have_no_order(name: str) -> None:
    """What stays in a KV head, with the query heads that read it, does not depend on where it stands."""
    order = np.array([2, 0, 3, 1])
    kv, *samples = (_noise(seed, 160, heads=4, layers=3) for seed in (8, 9, 10))
    plain = _store(name, kv, tuple(samples)).kv
    moved = _store(name, _reordered(kv, order), tuple(_reordered(one, order) for one in samples)).kv
    for one, other in zip(plain.layers, moved.layers, strict=True):
        assert np.array_equal(one.is_seen[order], other.is_seen)
        assert np.array_equal(one.positions[order][other.is_seen], other.positions[other.is_seen])
        np.testing.assert_allclose(other.keys, one.keys[order], atol=1e-4)
        np.testing.assert_allclose(other.values, one.values[order], atol=1e-4)
        if one.log_weights is not None and other.log_weights is not None:
            np.testing.assert_allclose(other.log_weights, one.log_weights[order], atol=1e-4)


def _reordered(kv: KvTensors, order: np.ndarray) -> KvTensors:
    size = kv.layers[0].group_size
    of_queries = (order[:, None] * size + np.arange(size)).ravel()
    layers = tuple(
        replace(
            layer,
            keys=layer.keys[order],
            values=layer.values[order],
            positions=layer.positions[order],
            queries=layer.queries[of_queries],
            prompt_queries=layer.prompt_queries[of_queries],
        )
        for layer in kv.layers
    )
    asked = tuple(one[of_queries] for one in kv.signals.repeat_queries or ())
    held = tuple(one[order] for one in kv.signals.repeat_keys or ())
    return replace(kv, layers=layers, signals=replace(kv.signals, repeat_queries=asked, repeat_keys=held))


@pytest.mark.parametrize("name", RUNNABLE)
def test_what_a_method_lacks_it_names(name: str) -> None:
    """Without prompt queries and signals: the same as with them, or a refusal that says what is missing."""
    kv = _noise()
    layers = tuple(replace(layer, prompt_queries=layer.prompt_queries[:, :0]) for layer in kv.layers)
    mute = replace(kv, layers=layers, signals=PromptSignals())
    try:
        kept = _store(name, mute, (_noise(1), _noise(2))).kv
    except InvalidSpec as refusal:
        reason = str(refusal)
    else:
        for one, other in zip(kept.layers, _stored(name).kv.layers, strict=True):
            assert np.array_equal(one.keys, other.keys)
            assert np.array_equal(one.is_seen, other.is_seen)
        return
    assert any(word in reason for word in ("prompt_queries", "hidden", "repeat_queries", "entropy", "distance"))
