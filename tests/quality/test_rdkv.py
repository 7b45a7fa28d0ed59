"""RDKV: bits and eviction as one allocation, on tensors and in price."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsim.catalog import resolve
from kvsim.compression import parse_compression, stored_bytes
from kvsim.compression.encoding.rdkv_codec import RdkvCodec
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.sequence import SequenceModel
from kvsim.errors import InvalidSpec
from kvsim.pool import prompt_bytes
from kvsim.quality.measure import measure
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.scenario import Scenario
from kvsim.specs.base import Dtype
from kvsim.tensors import KvTensors, attend
from tests.quality.conftest import noise_cache

RATIOS = (0.0, 0.3, 0.5, 0.75, 0.9, 0.97)


def _store(name: str, kv: KvTensors) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name)), kv)


def _widths(codec: RdkvCodec, kv: KvTensors) -> list[np.ndarray]:
    """Width of each older token, found again from what was read back, (H, older)."""
    found = []
    for layer, stored in zip(kv.layers, codec.store(kv), strict=True):
        older = layer.num_tokens - codec.window_size
        same = (stored.keys == layer.keys).all(axis=2)[:, :older]
        assert stored.is_evicted is not None
        found.append(np.where(stored.is_evicted[:, :older], 0, np.where(same, 16, -1)))
    return found


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_budget_is_met_to_the_bit(ratio: float, noise: KvTensors) -> None:
    compression = parse_compression(f"rdkv:{ratio}")
    for index, bits in enumerate(_store(f"rdkv:{ratio}", noise).bits):
        group = layer_view(noise, index).group
        older = (1 - ratio) * 256 * 2 * 128 * 16
        assert bits == pytest.approx(older + 64 * 2 * 128 * 16 + 4 * 32 * 2)
        priced = encoded_bytes(compression.encoding, group, Dtype.BF16, 320)
        priced += compression.encoding.fixed_bytes_per_sequence(group, Dtype.BF16)
        assert bits == pytest.approx(8 * priced)


def test_a_smaller_budget_never_errs_less(noise: KvTensors) -> None:
    errors = [measure(fit_strategy(parse_compression(f"rdkv:{ratio}")), noise).output_error for ratio in RATIOS]
    assert errors == sorted(errors)
    assert errors[0] == 0


def test_the_window_stays_and_the_newest_is_seen(noise: KvTensors) -> None:
    for before, after in zip(noise.layers, _store("rdkv:0.97", noise).kv.layers, strict=True):
        assert after.is_seen[:, -64:].all()
        assert np.array_equal(before.keys[:, -64:], after.keys[:, -64:])
        assert 0 < after.is_seen[:, :-64].mean() < 0.3


def test_without_codes_between_it_is_eviction_by_what_dropping_does(noise: KvTensors) -> None:
    """Widths 0 and 16: of each layer those tokens stay, over all heads, whose loss moves the window's outputs most."""
    for index, widths in enumerate(_widths(RdkvCodec(0.75, 64, (0, 16)), noise)):
        assert set(np.unique(widths)) == {0, 16}
        assert (widths == 16).sum() == 128
        lost = np.stack([_dropping_error(noise, index, head) for head in range(2)])
        assert lost[widths == 16].min() >= lost[widths == 0].max() * (1 - 1e-9)


def _dropping_error(kv: KvTensors, index: int, head: int) -> np.ndarray:
    """Mean squared change of the outputs of the window's queries when one token alone is dropped, by running it."""
    layer = kv.layers[index]
    keys, values = layer.keys[head].astype(float), layer.values[head].astype(float)
    asked = layer.prompt_queries[2 * head : 2 * head + 2].reshape(-1, 64).astype(float)
    seen = np.arange(320) <= np.tile(np.arange(256, 320), 2)[:, None]
    weights = np.where(seen, np.exp(kv.attention_scale * asked @ keys.T), 0)
    total, outputs = weights.sum(axis=1, keepdims=True), weights @ values
    whole = outputs / total
    changes = []
    for token in range(256):
        mine = weights[:, token : token + 1]
        changes.append((((outputs - mine * values[token]) / (total - mine) - whole) ** 2).sum(axis=1).mean())
    return np.array(changes)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_with_one_width_it_is_uniform_quantisation(width: int, noise: KvTensors) -> None:
    exact = 1 - (width * 128 + 64) / (16 * 128)
    for one, layer in zip(RdkvCodec(exact, 64, (width,)).store(noise), noise.layers, strict=True):
        assert one.is_evicted is not None
        assert not one.is_evicted.any()
        change = ((one.keys - layer.keys)[:, :256] ** 2).mean(axis=2)
        # A rotated normal vector over its own range: a step of range / (2^b - 1), and step^2 / 12 at many levels.
        assert (change > 0).all()
        assert change.mean() == pytest.approx((4.7 / (2**width - 1)) ** 2 / 12, rel=0.35)


def test_tokens_that_weigh_more_get_more_bits(noise: KvTensors) -> None:
    """One token that the window's queries look for keeps 8 bits or all, where most have none."""
    layers = []
    for layer in noise.layers:
        keys, queries = layer.keys.copy(), layer.prompt_queries.copy()
        keys[0, 100] = 1.0
        queries[:2] += 0.8
        layers.append(replace(layer, keys=keys, prompt_queries=queries))
    kv = replace(noise, layers=tuple(layers))
    for layer, after in zip(kv.layers, _store("rdkv:0.95", kv).kv.layers, strict=True):
        assert after.is_seen[0, 100]
        assert after.keys[0, 100] == pytest.approx(layer.keys[0, 100], abs=0.02)
        assert after.is_seen[:, :-64].mean() < 0.5


def test_joint_bits_err_less_than_either_alone_at_equal_bytes() -> None:
    """On sharp attention: more than dropping tokens at full precision or coding all of them alike."""
    kv = noise_cache(5, layers=2, tokens=512)
    sharper = tuple(
        replace(one, prompt_queries=2 * one.prompt_queries, queries=2 * one.prompt_queries[:, -8:]) for one in kv.layers
    )
    kv = replace(kv, layers=sharper)
    ratio = 1 - (2 * 128 + 64) / (16 * 128)
    errors = {}
    for name, widths in {"joint": (0, 2, 4, 8, 16), "evict": (0, 16), "uniform": (2,)}.items():
        stored = RdkvCodec(ratio, 64, widths).store(kv)
        total = 0.0
        for layer, one in zip(kv.layers, stored, strict=True):
            assert one.is_evicted is not None
            after = replace(layer, keys=one.keys, values=one.values).hidden_where(one.is_evicted)
            change = attend(after, kv.attention_scale).outputs - attend(layer, kv.attention_scale).outputs
            total += float((change**2).sum())
        errors[name] = total
    assert errors["joint"] < 0.8 * min(errors["evict"], errors["uniform"])


def test_it_needs_prompt_queries(noise: KvTensors) -> None:
    mute = tuple(replace(layer, prompt_queries=layer.prompt_queries[:, :0]) for layer in noise.layers)
    with pytest.raises(InvalidSpec, match="no prompt_queries"):
        _store("rdkv", replace(noise, layers=mute))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_short_prompts(tokens: int) -> None:
    kv = noise_cache(5, layers=2, tokens=tokens)
    for layer in _store("rdkv:0.9", kv).kv.layers:
        assert np.isfinite(attend(layer, kv.attention_scale).outputs).all()


@pytest.mark.parametrize("name", ["snapkv+rdkv", "quest+rdkv", "low_rank+rdkv", "rdkv+huffman"])
def test_what_does_not_go_with_it(name: str) -> None:
    with pytest.raises(InvalidSpec, match="rdkv"):
        parse_compression(name)


# --- price ----------------------------------------------------------------------------------------------------------


def test_generated_tokens_stay_native() -> None:
    deployment = resolve(
        Scenario(model="llama-3.1-8b", device="h100-sxm", workload="chat", compression=parse_compression("rdkv:0.9"))
    )
    native = 131_072
    at_once, later = (stored_bytes(deployment.compression, deployment.model, 4064, steps) for steps in (0, 100))
    assert at_once == pytest.approx(native * (64 + 0.1 * 4000) + 32 * 8 * 16)
    assert later - at_once == pytest.approx(100 * native)
    profile = SequenceModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL)).profile(4064)
    grown = profile.resident_bytes(1600, 16) - profile.resident_bytes(0, 16)
    assert grown == 1600 * native
    # All of the prompt at the budget, the window native beside it, and counters.
    assert profile.resident_bytes(0, 16) == pytest.approx(native * (0.1 * 4064 + 64) + 32 * 8 * 16, rel=1e-3)
    assert prompt_bytes(deployment, 4064) == 4064 * native


def test_reading_fewer_bytes_takes_less_time_and_generated_tokens_read_as_native_ones() -> None:
    def ticks(name: str) -> tuple[int, int]:
        scenario = Scenario(
            model="llama-3.1-8b", device="h100-sxm", workload="chat", compression=parse_compression(name)
        )
        deployment = resolve(scenario)
        rates = build_rates(deployment.device, deployment.priors, Edge.CENTRAL)
        first = SequenceModel(deployment, rates).profile(8000).segments[0]
        return first.ticks, first.slope_ticks

    small, large, native = ticks("rdkv:0.95"), ticks("rdkv:0.5"), ticks("native")
    assert small[0] < large[0]
    assert small[0] < native[0]
    assert small[1] == large[1] == pytest.approx(native[1], rel=1e-3)
