"""Caches as data: RoPE undone, attention by definition, wrong shapes refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.errors import InvalidSpec
from kvsim.tensors import LayerKv, Rope, attend


def _layer(heads: int = 2, tokens: int = 5, dim: int = 8, query_heads: int = 4, seed: int = 0) -> LayerKv:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    positions = np.broadcast_to(np.arange(tokens), (heads, tokens))
    return LayerKv(
        draw(heads, tokens, dim), draw(heads, tokens, dim), positions, draw(query_heads, 3, dim),
        draw(query_heads, 2, dim),
    )  # fmt: skip


@given(st.integers(0, 10**6), st.integers(0, 100_000))
def test_rope_is_undone_and_keeps_lengths(seed: int, start: int) -> None:
    rng = np.random.default_rng(seed)
    rope = Rope.plain(16, 500_000.0)
    vectors = rng.standard_normal((2, 7, 24)).astype(np.float32)
    positions = np.broadcast_to(np.arange(start, start + 7), (2, 7))
    turned = rope.rotate(vectors, positions)
    assert np.allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(vectors, axis=-1), rtol=1e-5)
    assert np.allclose(rope.undo(turned, positions), vectors, atol=1e-5)
    assert np.array_equal(turned[..., 16:], vectors[..., 16:])


def test_rope_makes_logits_depend_on_distance_only() -> None:
    rng = np.random.default_rng(1)
    rope = Rope.plain(32, 10_000.0)
    query, key = rng.standard_normal((2, 32)).astype(np.float32)
    at = lambda vector, position: rope.rotate(vector[None], np.array([position]))[0]  # noqa: E731
    assert at(query, 40) @ at(key, 30) == pytest.approx(at(query, 1010) @ at(key, 1000), abs=1e-4)


def test_attention_by_its_definition_head_by_head() -> None:
    layer = _layer()
    found = attend(layer, 0.5)
    for query_head in range(4):
        keys, values = layer.keys[query_head // 2], layer.values[query_head // 2]
        logits = 0.5 * layer.queries[query_head] @ keys.T
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        assert np.allclose(found.weights[query_head], weights, atol=1e-6)
        assert np.allclose(found.outputs[query_head], weights @ values, atol=1e-5)


def test_masked_tokens_have_no_weight_and_taking_tokens_is_masking_the_rest() -> None:
    layer = _layer()
    kept = np.array([[0, 2, 4], [1, 2, 3]])
    mask = np.zeros((4, 3, 5), dtype=bool)
    for query_head in range(4):
        mask[query_head][:, kept[query_head // 2]] = True
    masked, taken = attend(layer, 0.5, mask), attend(layer.take(kept), 0.5)
    assert (masked.weights[~mask] == 0).all()
    assert np.allclose(masked.outputs, taken.outputs, atol=1e-6)
    assert np.array_equal(layer.take(kept).positions, kept)


def test_shapes_that_disagree_are_refused() -> None:
    layer = _layer()
    with pytest.raises(InvalidSpec, match="disagree in heads or tokens"):
        LayerKv(layer.keys, layer.values[:, :4], layer.positions, layer.queries, layer.prompt_queries)
    with pytest.raises(InvalidSpec, match="do not fit keys"):
        LayerKv(layer.keys, layer.values, layer.positions, layer.queries[:3], layer.prompt_queries)
