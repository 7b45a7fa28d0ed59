"""Small caches made of noise, for laws that hold of any cache."""

from __future__ import annotations

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.selection.scored import ScoredSelection
from kvsim.compression.selector import layer_view
from kvsim.tensors import KvTensors, LayerKv, PromptSignals, Rope


def noise_cache(
    seed: int = 0, *, layers: int = 6, heads: int = 2, tokens: int = 320, head_dim: int = 64, group_size: int = 2
) -> KvTensors:
    """Independent normal K, V and queries, rounded to what bf16 holds, and signals of every kind."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
        return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    positions = np.broadcast_to(np.arange(tokens), (heads, tokens)).copy()
    made = tuple(
        LayerKv(
            keys=draw(heads, tokens, head_dim),
            values=draw(heads, tokens, head_dim),
            positions=positions,
            queries=draw(heads * group_size, 8, head_dim),
            prompt_queries=draw(heads * group_size, 64, head_dim),
        )
        for _ in range(layers)
    )
    signals = _noise_signals(seed, layers, heads, group_size, tokens, head_dim)
    return KvTensors(made, Rope.plain(head_dim, 10_000.0), head_dim**-0.5, f"noise, seed {seed}", signals=signals)


def scores_of(name: str, kv: KvTensors, index: int = 0) -> np.ndarray:
    """What a strategy's selection gives the tokens of one layer."""
    selection = parse_compression(name).selection
    assert isinstance(selection, ScoredSelection)
    return selection.scores(kv, layer_view(kv, index))


def _noise_signals(seed: int, layers: int, heads: int, group_size: int, tokens: int, head_dim: int) -> PromptSignals:
    rng = np.random.default_rng((seed, 1))
    width = 48
    return PromptSignals(
        hidden=_per_layer(rng, layers, tokens, width),
        repeat_queries=_per_layer(rng, layers, heads * group_size, tokens, head_dim),
        repeat_keys=_per_layer(rng, layers, heads, tokens, head_dim),
        entropy=rng.uniform(0, np.log(256), tokens).astype(np.float32),
        distance=rng.uniform(0, 2, (layers, tokens)).astype(np.float32),
    )


def _per_layer(rng: np.random.Generator, layers: int, *shape: int) -> tuple[np.ndarray, ...]:
    return tuple(rng.standard_normal(shape).astype(np.float32) for _ in range(layers))


@pytest.fixture(scope="session")
def noise() -> KvTensors:
    return noise_cache()


@pytest.fixture(scope="session")
def samples() -> tuple[KvTensors, ...]:
    """Other sequences than ``noise``, for codecs that calibrate."""
    return tuple(noise_cache(seed) for seed in (1, 2))
