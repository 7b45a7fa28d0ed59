"""Low-rank methods on tensors: exact where they must be, and best under their own objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from kvsim.compression import STRATEGIES, parse_compression
from kvsim.compression.encoding.native import Native
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.numerics.svd import rank_for_energy, second_moment
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.tensors import KvTensors, LayerKv, Rope, attend

DIM, HEADS, QUERY_HEADS, TOKENS = 32, 4, 8, 160
METHODS = ("low_rank", "kq_svd", "eigen_attention", "xkv")


def _cache(
    seed: int, *, rank: int = DIM, layers: int = 4, shared: int = 0, rope: bool = True, turned: bool = True
) -> KvTensors:
    """Draw a stationary process: bare keys and values of each head span ``rank`` fixed directions of falling strength.

    ``shared``: all layers and heads are maps of so many common factors per token. ``turned``: RoPE is applied to keys
    of that rank; False means that keys after RoPE have it.
    """
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    turn = Rope.plain(DIM, 10_000.0)
    factors = rng.standard_normal((TOKENS, shared)) if shared else None
    made = []
    for _ in range(layers):
        strengths = 0.85 ** np.arange(rank)
        sides = []
        for _ in range(2):
            if factors is None:
                maps = fixed.standard_normal((HEADS, rank, DIM)) * strengths[:, None]
                sides.append((rng.standard_normal((HEADS, TOKENS, rank)) @ maps).astype(np.float32))
            else:
                sides.append((factors @ fixed.standard_normal((HEADS, shared, DIM))).astype(np.float32))
        positions = np.tile(np.arange(TOKENS), (HEADS, 1))
        keys = turn.rotate(sides[0], positions) if rope and turned else sides[0]
        queries = rng.standard_normal((QUERY_HEADS, 40, DIM)).astype(np.float32)
        made.append(LayerKv(keys, sides[1], positions, queries[:, :8], queries[:, 8:]))
    return KvTensors(tuple(made), turn if rope else None, DIM**-0.5, f"factors, seed {seed}", native_bits=32)


def _store(name: str, kv: KvTensors, samples: Sequence[KvTensors]) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name), samples), kv)


def _errors(kv: KvTensors, stored: StoredCache) -> tuple[float, float]:
    """Relative squared errors of K and of V over all layers."""
    pairs = list(zip(kv.layers, stored.kv.layers, strict=True))
    keys = sum(float(((a.keys - b.keys) ** 2).sum()) for a, b in pairs) / sum(
        float((a.keys**2).sum()) for a, _ in pairs
    )
    values = sum(float(((a.values - b.values) ** 2).sum()) for a, b in pairs)
    return keys, values / sum(float((a.values**2).sum()) for a, _ in pairs)


def _logit_error(kv: KvTensors, stored: StoredCache) -> float:
    """Squared error of all scaled logits against their squared size."""
    pairs = [
        (attend(a, kv.attention_scale).logits, attend(b, kv.attention_scale).logits)
        for a, b in zip(kv.layers, stored.kv.layers, strict=True)
    ]
    return sum(float(((a - b) ** 2).sum()) for a, b in pairs) / sum(float((a**2).sum()) for a, _ in pairs)


def _with_fraction(method: str, fraction: float) -> str:
    if method == "xkv":
        width = 4 * HEADS * DIM
        return f"xkv(rank_k={round(fraction * width)},rank_v={round(fraction * width)})"
    return f"{method}(retained_fraction={fraction})"


@pytest.fixture(scope="module")
def samples() -> tuple[KvTensors, ...]:
    return _cache(1), _cache(2)


@pytest.mark.parametrize("method", METHODS)
def test_full_rank_is_exact(method: str, samples: Sequence[KvTensors]) -> None:
    kv = _cache(3)
    stored = _store(_with_fraction(method, 1.0), kv, samples)
    for before, after in zip(kv.layers, stored.kv.layers, strict=True):
        assert np.allclose(after.keys, before.keys, atol=2e-5)
        assert np.allclose(after.values, before.values, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_error_falls_with_rank(method: str, samples: Sequence[KvTensors]) -> None:
    kv = _cache(3)
    found = [_errors(kv, _store(_with_fraction(method, one), kv, samples)) for one in (0.06, 0.12, 0.2, 0.29)]
    for earlier, later in pairwise(found):
        assert later[0] < earlier[0]
        assert later[1] < earlier[1]


@pytest.mark.parametrize(
    "name",
    ["low_rank(retained_fraction=0.25)", "low_rank(retained_fraction=0.25,group_size=1)",
     "low_rank(retained_fraction=0.25,objective=kq)", "low_rank(retained_fraction=0.25,hadamard=true)",
     "kq_svd(retained_fraction=0.25,keys=pre_rope)"],
)  # fmt: skip
def test_bare_keys_of_true_rank_come_back(name: str) -> None:
    calibration = _cache(1, rank=8), _cache(2, rank=8)
    kv = _cache(3, rank=8)
    assert max(_errors(kv, _store(name, kv, calibration))) < 1e-10


def test_keys_of_true_rank_after_rope_come_back_there() -> None:
    calibration = _cache(1, rank=8, turned=False), _cache(2, rank=8, turned=False)
    kv = _cache(3, rank=8, turned=False)
    assert max(_errors(kv, _store("kq_svd(retained_fraction=0.25)", kv, calibration))) < 1e-10
    assert _errors(kv, _store("kq_svd(retained_fraction=0.25,keys=pre_rope)", kv, calibration))[0] > 1e-3


def test_without_rope_eigen_attention_has_a_basis_per_head() -> None:
    """With RoPE all heads share one key basis, as in the authors' code: heads that differ are not restored."""
    calibration = tuple(_cache(seed, rank=8, rope=False) for seed in (1, 2))
    calibration = tuple(_asked_in_the_span(one) for one in calibration)
    kv = _cache(3, rank=8, rope=False)
    assert max(_errors(kv, _store("eigen_attention(retained_fraction=0.25)", kv, calibration))) < 1e-10
    turned = _cache(3, rank=8)
    shared = _store("eigen_attention(retained_fraction=0.25)", turned, (_cache(1, rank=8), _cache(2, rank=8)))
    keys, values = _errors(turned, shared)
    assert keys > 0.05
    assert values < 1e-10


def _asked_in_the_span(kv: KvTensors) -> KvTensors:
    """Queries drawn from the keys themselves, so that keys and queries share a basis."""
    layers = tuple(
        replace(layer, queries=layer.keys[:, :8].repeat(2, axis=0), prompt_queries=layer.keys[:, :4].repeat(2, axis=0))
        for layer in kv.layers
    )
    return replace(kv, layers=layers)


def test_xkv_needs_one_rank_for_what_layers_share() -> None:
    kv = _cache(3, shared=12)
    assert max(_errors(kv, _store("xkv(rank_k=12,rank_v=12)", kv, ()))) < 1e-9
    assert max(_errors(kv, _store("xkv(rank_k=11,rank_v=11)", kv, ()))) > 1e-3
    # The same bytes without sharing: rank 3 per layer.
    assert min(_errors(kv, _store("xkv(layer_group_size=1,rank_k=3,rank_v=3)", kv, ()))) > 0.3


def test_last_group_of_layers_has_its_share_of_the_rank() -> None:
    kv = _cache(3, layers=6)
    stored = _store("xkv(rank_k=40,rank_v=64)", kv, ())
    coordinates = 32 * TOKENS * (40 + 64)
    bases = 32 * HEADS * DIM * (40 + 64)
    assert stored.bits == (coordinates + bases, bases, bases, bases, (coordinates + bases) / 2, bases / 2)


def test_query_aware_basis_wins_on_logits_and_plain_on_keys() -> None:
    """Key channels that are heavy, and that no query reads."""

    def skewed(seed: int) -> KvTensors:
        kv = _cache(seed, rope=False)
        heavy, unread = np.ones(DIM, dtype=np.float32), np.ones(DIM, dtype=np.float32)
        heavy[:8], unread[:8] = 20.0, 0.01
        layers = tuple(
            replace(
                one, keys=one.keys * heavy, queries=one.queries * unread, prompt_queries=one.prompt_queries * unread
            )
            for one in kv.layers
        )
        return replace(kv, layers=layers)

    kv, calibration = skewed(3), (skewed(1), skewed(2))
    plain, aware = (
        _store(f"low_rank(retained_fraction=0.25,group_size=1,objective={objective})", kv, calibration)
        for objective in ("kv", "kq")
    )
    assert _logit_error(kv, aware) < 0.4 * _logit_error(kv, plain)
    assert _errors(kv, plain)[0] < _errors(kv, aware)[0]
    assert _errors(kv, plain)[1] == _errors(kv, aware)[1]


def test_query_aware_basis_before_rope_sees_queries_turned_back() -> None:
    """Queries read one slow pair of channels; keys are heavy in the others."""
    slow = DIM // 2 - 1

    def skewed(seed: int) -> KvTensors:
        kv = _cache(seed)
        assert kv.rope is not None
        layers = []
        for one in kv.layers:
            bare = kv.rope.undo(one.keys, one.positions)
            bare[..., [slow, DIM - 1]] *= 0.05
            read = np.zeros(DIM, dtype=np.float32)
            read[[slow, DIM - 1]] = 1.0
            layers.append(
                replace(
                    one,
                    keys=kv.rope.rotate(bare, one.positions),
                    queries=one.queries * read,
                    prompt_queries=one.prompt_queries * read,
                )
            )
        return replace(kv, layers=tuple(layers))

    kv, calibration = skewed(3), (skewed(1), skewed(2))
    plain, aware = (
        _store(f"low_rank(retained_fraction=0.25,group_size=1,objective={objective})", kv, calibration)
        for objective in ("kv", "kq")
    )
    assert _logit_error(kv, aware) < 1e-6
    assert _logit_error(kv, plain) > 0.1


def test_rope_raises_the_rank_of_keys_of_a_stationary_process() -> None:
    kv = _cache(3, rank=8)
    assert kv.rope is not None
    for layer in kv.layers:
        for head in range(HEADS):
            bare = kv.rope.undo(layer.keys[head], layer.positions[head])
            before, after = (rank_for_energy(second_moment(rows), 0.99) for rows in (bare, layer.keys[head]))
            assert before <= 8
            assert after >= 2 * before


def test_permuting_heads_permutes_the_result() -> None:
    order = [2, 0, 3, 1]

    def permuted(kv: KvTensors) -> KvTensors:
        asked = [2 * head + place for head in order for place in (0, 1)]
        layers = tuple(
            LayerKv(
                one.keys[order], one.values[order], one.positions[order], one.queries[asked], one.prompt_queries[asked]
            )
            for one in kv.layers
        )
        return replace(kv, layers=layers)

    samples = _cache(1), _cache(2)
    kv = _cache(3)
    for name in ("low_rank(group_size=1)", "kq_svd", "eigen_attention"):
        plain = _store(name, kv, samples)
        turned = _store(name, permuted(kv), [permuted(one) for one in samples])
        for one, other in zip(plain.kv.layers, turned.kv.layers, strict=True):
            assert np.allclose(one.keys[order], other.keys, atol=1e-4)
            assert np.allclose(one.values[order], other.values, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bit_coordinates_are_rounded(method: str, samples: Sequence[KvTensors]) -> None:
    """At full rank the error is that of bf16 coordinates and bases, 2^-9 of either at most."""
    kv, bf16 = replace(_cache(3), native_bits=16), [replace(one, native_bits=16) for one in samples]
    keys, values = _errors(kv, _store(_with_fraction(method, 1.0), kv, bf16))
    assert 0 < values < (3 * 2.0**-9) ** 2
    assert 0 < keys < (3 * 2.0**-9) ** 2


def test_unfitted_or_ill_fitting_codecs_say_so(samples: Sequence[KvTensors]) -> None:
    kv = _cache(3)
    with pytest.raises(InvalidSpec, match="other sequences of the same model; there are none"):
        fit_strategy(parse_compression("low_rank"), ())
    with pytest.raises(InvalidSpec, match="differ in layers"):
        fit_strategy(parse_compression("low_rank"), (kv, _cache(4, layers=2)))
    with pytest.raises(InvalidSpec, match="cache has 2"):
        store_cache(fit_strategy(parse_compression("low_rank"), samples), _cache(4, layers=2))
    with pytest.raises(InvalidSpec, match="do not divide 4 KV heads"):
        fit_strategy(parse_compression("low_rank(group_size=3)"), samples)
    with pytest.raises(InvalidSpec, match="caches with queries"):
        fit_strategy(parse_compression("kq_svd"), [one.without_queries() for one in samples])
    uneven = replace(kv, layers=(*kv.layers[:3], kv.layers[3].take(np.tile(np.arange(9), (HEADS, 1)))))
    with pytest.raises(InvalidSpec, match="layers 3 and 0 hold"):
        store_cache(fit_strategy(parse_compression("xkv")), uneven)
    with pytest.raises(NotRunnable, match="must be trained"):
        fit_strategy(parse_compression("mla"))


def _encodings_that_run() -> list[str]:
    names = []
    for name in STRATEGIES:
        compression = parse_compression(name)
        plain = compression.reduction.is_none and compression.coding.is_none
        if not plain or compression.selection.kind != "keep_all" or compression.encoding.is_native:
            continue
        try:
            compression.encoding.codec()
        except NotRunnable:
            continue
        names.append(name)
    return names


def _goes_together(name: str) -> bool:
    try:
        parse_compression(name)
    except InvalidSpec:
        return False
    return True


REDUCTIONS = ("low_rank", "kq_svd", "xkv(rank_k=64,rank_v=128)")
STACKS = [f"{reduction}+{encoding}" for reduction in REDUCTIONS for encoding in (*_encodings_that_run(), "native")]


def test_most_encodings_follow() -> None:
    assert sum(map(_goes_together, STACKS)) > 0.6 * len(STACKS)


@pytest.mark.parametrize("name", [name for name in STACKS if _goes_together(name)])
def test_an_encoding_takes_the_bits_of_the_reduced_shape(name: str) -> None:
    compression = parse_compression(name)
    kv, calibration = (replace(_cache(seed, layers=8), native_bits=16) for seed in (3, 1))
    stored = _store(name, kv, (calibration,))
    priced = 0.0
    for index in range(kv.num_layers):
        layer = layer_view(kv, index)
        given = compression.encoding_at(layer)
        priced += encoded_bytes(given, layer.group, Dtype.BF16, TOKENS)
        priced += given.fixed_bytes_per_sequence(layer.group, Dtype.BF16)
    assert sum(stored.bits) == pytest.approx(8 * priced, rel=1e-9)
    assert max(_errors(kv, stored)) < 1.0


def test_layers_stored_together_are_native_together() -> None:
    """vLLM's TurboQuant spares two layers at each end; a group with one of them holds its coordinates natively."""
    compression = parse_compression("xkv+turboquant_k8v4")
    kv = _cache(3, layers=12)
    spared = []
    for index in range(12):
        given = compression.encoding_at(layer_view(kv, index))
        spared.append(getattr(given, "encoding", given) == Native())
    assert spared == [True] * 4 + [False] * 4 + [True] * 4
    skipped = [compression.encoding_at(layer_view(kv, index), (5,)) == Native() for index in range(12)]
    assert skipped == [False] * 4 + [True] * 4 + [False] * 4


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_cache_stays_empty(method: str, samples: Sequence[KvTensors]) -> None:
    full = _cache(3)
    nothing = np.zeros((HEADS, 0), dtype=np.int64)
    stored = _store(method, replace(full, layers=tuple(layer.take(nothing) for layer in full.layers)), samples)
    assert all(layer.keys.shape == layer.values.shape == (HEADS, 0, DIM) for layer in stored.kv.layers)
