"""Laws of every strategy whose algorithm runs on tensors: it does what its bytes say, and no more harm than it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvsim.compression import STRATEGIES, Compression, parse_compression
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes
from kvsim.errors import NotRunnable
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.tensors import KvTensors

Run = tuple[Compression, StoredCache]


def _runs_on_tensors(name: str) -> bool:
    compression = parse_compression(name)
    try:
        compression.selection.selector()
        compression.reduction.codec()
        compression.encoding.codec()
    except NotRunnable:
        return False
    return True


RUNNABLE = tuple(name for name in STRATEGIES if _runs_on_tensors(name))


def _store(name: str, kv: KvTensors, samples: Sequence[KvTensors]) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name), samples), kv)


@pytest.fixture(
    scope="module", params=[name for name in RUNNABLE if parse_compression(name).selection.kind == "keep_all"]
)
def run(request: pytest.FixtureRequest, noise: KvTensors, samples: Sequence[KvTensors]) -> Run:
    return parse_compression(request.param), _store(request.param, noise, samples)


def test_shapes_and_positions_stay(run: Run, noise: KvTensors) -> None:
    _, stored = run
    for before, after in zip(noise.layers, stored.kv.layers, strict=True):
        assert after.keys.shape == before.keys.shape
        assert after.values.shape == before.values.shape
        assert after.keys.dtype == after.values.dtype == np.float32
        assert np.array_equal(after.positions, before.positions)
        assert np.isfinite(after.keys).all()
        assert np.isfinite(after.values).all()


def test_bits_are_what_pricing_says(run: Run, noise: KvTensors) -> None:
    compression, stored = run
    if compression.stored.rate is not None:
        pytest.skip("the rate depends on the data; see test_rates")
    priced = []
    for index, kept in enumerate(noise.layers):
        layer = layer_view(noise, index)
        encoding = compression.encoding_at(layer)
        whole = encoded_bytes(encoding, layer.group, Dtype.BF16, kept.num_tokens)
        priced.append(8 * (whole + encoding.fixed_bytes_per_sequence(layer.group, Dtype.BF16)))
    if compression.reduction.prices_mean_layer:
        assert stored.total_bits == pytest.approx(sum(priced), rel=1e-9)
        return
    for index in range(noise.num_layers):
        # Layers that are stored together are priced a share each, and the first of them holds it all.
        together = compression.reduction.stored_with(layer_view(noise, index))
        held, expected = (sum(side[one] for one in together) for side in (stored.bits, priced))
        assert held == pytest.approx(expected, rel=1e-9), index


def test_newest_tokens_of_a_residual_window_are_exact(run: Run, noise: KvTensors) -> None:
    compression, stored = run
    window = compression.encoding.residual_tokens
    if window:
        for before, after in zip(noise.layers, stored.kv.layers, strict=True):
            assert np.array_equal(after.keys[:, -window:], before.keys[:, -window:])
            assert np.array_equal(after.values[:, -window:], before.values[:, -window:])


def test_storing_twice_gives_the_same(run: Run, noise: KvTensors, samples: Sequence[KvTensors]) -> None:
    compression, stored = run
    again = _store(compression.name, noise, samples)
    assert again.bits == stored.bits
    for one, other in zip(stored.kv.layers, again.kv.layers, strict=True):
        assert np.array_equal(one.keys, other.keys)
        assert np.array_equal(one.values, other.values)


def test_the_input_is_left_alone(noise: KvTensors, samples: Sequence[KvTensors]) -> None:
    before = [(layer.keys.copy(), layer.values.copy()) for layer in noise.layers]
    for name in RUNNABLE:
        _store(name, noise, samples)
    for (keys, values), layer in zip(before, noise.layers, strict=True):
        assert np.array_equal(keys, layer.keys)
        assert np.array_equal(values, layer.values)


def test_native_is_exact_and_takes_sixteen_bits(noise: KvTensors) -> None:
    stored = _store("native", noise, ())
    for before, after in zip(noise.layers, stored.kv.layers, strict=True):
        assert np.array_equal(before.keys, after.keys)
        assert np.array_equal(before.values, after.values)
    assert stored.total_bits == 16 * sum(layer.keys.size + layer.values.size for layer in noise.layers)
