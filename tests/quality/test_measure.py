"""Measured risk by its definition: nothing lost is nothing measured, and each figure by hand."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.quality.measure import compare_caches, measure, pooled
from kvsim.quality.run import run_strategies
from kvsim.quality.store import StoredCache, fit_strategy
from kvsim.rendering.quality import risk_csv, risk_document
from kvsim.tensors import IntArray, KvTensors, attend
from kvsim.tensors.ensemble import draw, preset

SPEC = preset("retrieval", num_layers=2, num_tokens=256, num_needles=4, retrieval_heads=0.5)


@pytest.fixture(scope="module")
def kv() -> KvTensors:
    return draw(SPEC, 0)


def _stored(kv: KvTensors, indices: IntArray | None = None, shift: float = 0.0) -> StoredCache:
    layers = tuple(layer if indices is None else layer.take(indices) for layer in kv.layers)
    layers = tuple(replace(layer, keys=layer.keys + np.float32(shift)) for layer in layers)
    return StoredCache(replace(kv, layers=layers), (None,) * kv.num_layers, (1.0,) * kv.num_layers)


def _without(kv: KvTensors, dropped: list[int]) -> IntArray:
    kept = np.setdiff1d(np.arange(kv.layers[0].num_tokens), dropped)
    return np.broadcast_to(kept, (kv.layers[0].num_kv_heads, len(kept))).copy()


def test_native_does_no_harm(kv: KvTensors) -> None:
    risk = measure(fit_strategy(parse_compression("native")), kv)
    assert risk.bits_per_element == 16.0
    assert risk.output_error == risk.mean("logit_error") == risk.mean("lost_mass") == 0.0
    assert risk.mean("top1_agreement") == 1.0
    assert risk.needle_survival == 1.0


def test_what_softmax_ignores_is_no_error(kv: KvTensors) -> None:
    """The same vector added to all keys shifts all logits of a query alike."""
    risk = compare_caches(kv, _stored(kv, shift=0.5))
    assert risk.mean("logit_error") < 1e-4
    assert risk.output_error < 1e-4


def test_dropped_tokens_are_lost_mass_and_lost_needles(kv: KvTensors) -> None:
    gone = [kv.needles[1], 17, 200]
    risk = compare_caches(kv, _stored(kv, _without(kv, gone)))
    weights = attend(kv.layers[1], kv.attention_scale).weights.astype(np.float64)
    heads = [head for head in risk.heads if head.layer == 1]
    assert [head.lost_mass for head in heads] == pytest.approx(weights[..., gone].sum(axis=-1).mean(axis=-1))
    assert all(head.logit_error == 0.0 for head in risk.heads)
    sought = [head for head in risk.heads if head.sought_needles >= SPEC.num_queries]
    assert sought
    assert np.mean([head.needle_survival for head in sought]) == pytest.approx(0.75, abs=0.02)
    assert risk.worst.needle_survival is not None


def test_a_needle_that_is_kept_but_not_found_is_lost(kv: KvTensors) -> None:
    layers = []
    for layer in kv.layers:
        keys = layer.keys.copy()
        keys[:, kv.needles[0]] = keys[:, 30]
        layers.append(replace(layer, keys=keys))
    risk = compare_caches(kv, StoredCache(replace(kv, layers=tuple(layers)), (None, None), (0.0, 0.0)))
    sought = [head for head in risk.heads if head.sought_needles >= SPEC.num_queries]
    assert np.mean([head.needle_survival for head in sought]) == pytest.approx(0.75, abs=0.02)
    assert np.mean([head.top1_agreement for head in sought]) < 0.9


def test_a_read_mask_hides_as_eviction_does(kv: KvTensors) -> None:
    gone = [kv.needles[0], 99]
    evicted = compare_caches(kv, _stored(kv, _without(kv, gone)))
    layer = kv.layers[0]
    mask = np.ones((layer.queries.shape[0], layer.queries.shape[1], layer.num_tokens), dtype=bool)
    mask[..., gone] = False
    hidden = compare_caches(kv, StoredCache(kv, (mask, mask), (0.0, 0.0)))
    for one, other in zip(evicted.heads, hidden.heads, strict=True):
        assert one == other or (
            one.output_error == pytest.approx(other.output_error, rel=1e-5)
            and (one.lost_mass, one.needle_survival) == (other.lost_mass, other.needle_survival)
        )


def test_several_sequences_are_pooled_head_by_head(kv: KvTensors) -> None:
    one = compare_caches(kv, _stored(kv, _without(kv, [kv.needles[0]])))
    both = pooled((one, compare_caches(kv, _stored(kv))))
    assert both.heads[3].lost_mass == pytest.approx(one.heads[3].lost_mass / 2)
    assert both.heads[3].output_error == pytest.approx(one.heads[3].output_error / 2**0.5)
    assert both.needle_survival == pytest.approx((1 + (one.needle_survival or 0)) / 2)


def test_no_queries_nothing_measured(kv: KvTensors) -> None:
    layers = tuple(replace(layer, queries=layer.queries[:, :0]) for layer in kv.layers)
    silent = replace(kv, layers=layers)
    with pytest.raises(InvalidSpec, match="has no queries"):
        compare_caches(silent, _stored(silent))


def test_a_run_keeps_what_cannot_run_with_its_reason_and_what_is_published(
    kv: KvTensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvsim.compression.encoding.native import Native
    from kvsim.errors import NotRunnable

    def refuse(self: Native) -> None:
        raise NotRunnable(self.kind, "only today")

    native, *_ = run_strategies(kv, ["native"])
    assert native.reason is None
    assert native.theory is not None
    assert native.theory.output_error == 0.0
    assert native.theory.eviction_bound is None
    assert native.published.status == "baseline"
    monkeypatch.setattr(Native, "codec", refuse)
    (row,) = run_strategies(kv, ["native"])
    assert (row.measured, row.theory, row.reason) == (None, None, "only today")
    with pytest.raises(UnknownName):
        run_strategies(kv, ["natve"])


@pytest.mark.parametrize("name", ["cam", "d2o", "merging", "weighted_atoms", "merging+fp8"])
def test_formulas_say_nothing_of_merged_entries(kv: KvTensors, name: str) -> None:
    (row,) = run_strategies(kv, [name])
    assert (row.reason, row.theory) == (None, None)
    assert row.theory_reason is not None
    assert "merged" in row.theory_reason
    document = risk_document(row)
    assert document["theory"] is None
    assert document["measured"] is not None
    line = next(csv.DictReader(io.StringIO(risk_csv([row], heads=True))))
    assert (line["theory_output_error"], line["theory_eviction_bound"], line["theory_cautions"]) == ("", "", "")
    assert float(line["measured_output_error"]) > 0.0


def test_theory_of_eviction_is_a_bound_on_what_is_measured(kv: KvTensors) -> None:
    from kvsim.quality.run import predict

    stored = _stored(kv, _without(kv, list(range(40, 160))))
    said, seen = predict(kv, stored), compare_caches(kv, stored)
    assert said.output_error == 0.0
    for bound, head in zip(said.heads, seen.heads, strict=True):
        assert bound.eviction_bound is not None
        assert head.output_error <= bound.eviction_bound
