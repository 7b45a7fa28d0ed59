"""Every part with every other: it runs and keeps its laws, or is refused with a reason that names both."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from pydantic import ValidationError

from kvsim.compression import CODINGS, ENCODINGS, REDUCTIONS, SELECTIONS, Compression, parse_compression
from kvsim.compression.base import StrategyPart
from kvsim.compression.parse import parse_part
from kvsim.compression.rules import RULES, Parts, conflicts
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes, stored_bytes
from kvsim.compression.strategy import spell
from kvsim.device_catalog import load_device
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec
from kvsim.tensors import KvTensors
from tests.quality.conftest import noise_cache

SIZED = {
    "streaming_llm": "streaming_llm:192", "snapkv": "snapkv:160", "h2o": "h2o:160", "pyramidkv": "pyramidkv:160",
    "merging": "merging:160", "cam": "cam:160", "d2o": "d2o:160", "quest": "quest:64",
    "adakv": "adakv:160", "duo_attention": "duo_attention(sink_size=8,recent_size=56)",
    "mla": "mla(kv_lora_rank=48,qk_rope_head_dim=16)",
    "minicache": "minicache(retained_fraction=0.0625)",
}  # fmt: skip
"""Sizes that bite at 320 tokens and divide into the groups of every format."""
SLOTS: tuple[Sequence[type[StrategyPart]], ...] = (SELECTIONS, REDUCTIONS, ENCODINGS, CODINGS)
NAMES = tuple(tuple(SIZED.get(name, name) for part in slot for name in part.names) for slot in SLOTS)
NEUTRAL = ("keep_all", "full_width", "native", "fixed_width")
SAMPLE = 10**6 if os.environ.get("KVSIM_WHOLE_PRODUCT") else 60
"""Other products that run beside all pairs without a coding, whose own tests run each with each encoding."""


PARTS = {name: parse_part(name) for names in NAMES for name in names}


def _together(names: Sequence[str]) -> Parts:
    return Parts(*(PARTS[name] for name in names))


def _changed(names: Sequence[str]) -> int:
    return sum(name != neutral for name, neutral in zip(names, NEUTRAL, strict=True))


PRODUCT = tuple(product(*NAMES))
ALLOWED = tuple(names for names in PRODUCT if not any(conflicts(_together(names))))
PAIRS = tuple(names for names in ALLOWED if _changed(names) <= 2 and names[3] == NEUTRAL[3])
REST = tuple(names for names in ALLOWED if names not in PAIRS)
RUN = (*PAIRS, *random.Random(6).sample(REST, min(SAMPLE, len(REST))))


@pytest.fixture(scope="module")
def model(noise: KvTensors) -> ModelSpec:
    """A model whose cache has the shape of ``noise``."""
    first = noise.layers[0]
    group = LayerGroup(
        kind=LayerKind.FULL, layers=tuple(range(noise.num_layers)), num_kv_heads=first.num_kv_heads,
        k_head_dim=first.keys.shape[2], v_head_dim=first.values.shape[2],
    )  # fmt: skip
    return ModelSpec(
        name="noise", source="built by hand", architecture="Test", hidden_size=256,
        num_attention_heads=first.queries.shape[0], vocab_size=1000, intermediate_size=512,
        max_position_embeddings=4096, groups=(group,), num_parameters=10**7, num_active_parameters=10**7,
        num_embedding_parameters=10**6,
    )  # fmt: skip


def test_every_product_is_a_strategy_or_refused_with_both_names() -> None:
    refused = 0
    for names in PRODUCT:
        parts = _together(names)
        values = dict(zip(Compression.model_fields, vars(parts).values(), strict=True))
        reason = next(conflicts(parts), None)
        if reason is None:
            compression = Compression(**values)
            assert parse_compression(compression.name) == compression
            continue
        refused += 1
        with pytest.raises(ValidationError) as caught:
            Compression(**values)
        assert reason in str(caught.value)
        named = [part for part in vars(parts).values() if part.kind in reason or spell(part) in reason]
        assert len(named) >= 2, reason
    # Most entropy codings take few encodings, and no selection per head goes with layers that are stored together.
    assert 0 < refused < 2 / 3 * len(PRODUCT)


def test_every_rule_refuses_something() -> None:
    # The last rule asks codings, and the neutral one takes everything.
    for rule in RULES if len(CODINGS) > 1 else RULES[:-1]:
        assert any(rule(_together(names)) for names in PRODUCT), rule.__name__


@pytest.mark.parametrize("names", RUN, ids="+".join)
def test_what_is_allowed_runs_or_says_why_not(
    names: tuple[str, ...], model: ModelSpec, noise: KvTensors, samples: Sequence[KvTensors]
) -> None:
    compression = Compression(**dict(zip(Compression.model_fields, vars(_together(names)).values(), strict=True)))
    reason = compression.check(model, load_device("h100-sxm").spec)
    if reason is not None:
        assert any(spell(part) in reason or part.kind in reason for part in vars(_together(names)).values()), reason
        return
    untold = _cannot_run(compression)
    if untold is None:
        _check_laws(compression, store_cache(fit_strategy(compression, samples), noise), noise, model)
    else:
        assert untold.reason
        assert any(untold.method in {spell(part), part.kind} for part in vars(_together(names)).values())


@pytest.mark.parametrize("reduction", [name for name in NAMES[1] if name != NEUTRAL[1]])
def test_a_cache_that_fits_the_residual_window(reduction: str, model: ModelSpec, samples: Sequence[KvTensors]) -> None:
    """Nothing is left to reduce or encode."""
    compression = Compression(reduction=PARTS[reduction], encoding=PARTS["kivi-4"])
    if _cannot_run(compression) is None:
        kv = noise_cache(9, tokens=100)
        stored = store_cache(fit_strategy(compression, samples), kv)
        _check_laws(compression, stored, kv, model)
        sources = fit_strategy(compression, samples).reduction.sources(6)
        for layer, source in zip(stored.kv.layers, sources, strict=True):
            assert np.array_equal(layer.keys, kv.layers[source].keys)


def _cannot_run(compression: Compression) -> NotRunnable | None:
    """Why an algorithm does not run on tensors at all."""
    try:
        compression.selection.selector()
        compression.reduction.codec()
        compression.encoding.codec()
        if not compression.coding.is_none:
            compression.coding.coder()
    except NotRunnable as refusal:
        return refusal
    return None


def _check_laws(compression: Compression, stored: StoredCache, kv: KvTensors, model: ModelSpec) -> None:
    _check_shapes(compression, stored, kv)
    selection, encoding, tokens = compression.selection, compression.encoding, kv.layers[0].num_tokens
    if selection.expected_share is None:
        held = sum(int(layer.is_seen.sum()) for layer in stored.kv.layers)
        priced = sum(_priced_entries(selection, kv, index) for index in range(kv.num_layers))
        # Which tokens are worth no bits at all, such an encoding finds in the data.
        assert held < priced if encoding.evicts else held == pytest.approx(priced, rel=1e-12)
    # A format's groups are priced per token: exact where no group is only partly full.
    is_ragged, residual = selection.granularity == "ragged", encoding.residual_tokens
    coded = [max(0, layer.num_tokens - residual) for layer in stored.kv.layers]
    if compression.stored.rate is not None or (encoding.native_tokens and any(count % 32 for count in coded)):
        return
    if is_ragged and encoding.sink_tokens:
        # Short heads are filled up in front, so some of their sinks are coded with the rest.
        assert stored.total_bits < 8 * _bytes_by_head(compression, stored, kv)
        return
    if not encoding.evicts:
        assert stored.total_bits == pytest.approx(8 * _bytes_by_head(compression, stored, kv), rel=1e-9)
    if selection.expected_share is None:
        assert stored.total_bits == pytest.approx(8 * stored_bytes(compression, model, tokens, 0), rel=1e-9)


def _check_shapes(compression: Compression, stored: StoredCache, kv: KvTensors) -> None:
    selection = compression.selection
    is_shared_out = selection.granularity == "ragged" or selection.moves_budgets
    for index, (before, after) in enumerate(zip(kv.layers, stored.kv.layers, strict=True)):
        assert np.isfinite(after.keys).all()
        assert np.isfinite(after.values).all()
        assert after.keys.dtype == np.float32
        assert np.array_equal(after.queries, before.queries)
        assert after.keys.shape[::2] == before.keys.shape[::2]
        assert after.values.shape == (*after.keys.shape[:2], before.values.shape[2])
        if not is_shared_out:
            assert before.num_kv_heads * after.num_tokens == _priced_entries(selection, kv, index)


def _priced_entries(selection: TokenSelection, kv: KvTensors, index: int) -> float:
    """Entries that pricing counts in all heads of a layer."""
    curves = selection.head_curves(kv.layers[index].num_tokens, layer_view(kv, index))
    return kv.layers[index].num_kv_heads * sum(heads.share * heads.resident(0) for heads in curves)


def _bytes_by_head(compression: Compression, stored: StoredCache, kv: KvTensors) -> float:
    """Bytes of what every head of every layer really holds, each by its own length."""
    selection, size = compression.selection, 0.0
    for index, (before, after) in enumerate(zip(kv.layers, stored.kv.layers, strict=True)):
        layer, held = layer_view(kv, index), after.is_seen.sum(axis=1).tolist()
        encoding, scanned = compression.encoding_at(layer), selection.scanned_tokens(before.num_tokens, layer)
        size += sum(encoded_bytes(encoding, layer.group, Dtype.BF16, count) for count in held) / len(held)
        size += encoding.fixed_bytes_per_sequence(layer.group, Dtype.BF16)
        size += selection.held_bytes_per_token(layer) * sum(held) / len(held)
        size += scanned(0) * selection.scan_bytes_per_token(layer.group, 2.0) if scanned else 0.0
    return size


def test_a_refusal_reads_well() -> None:
    with pytest.raises(InvalidSpec, match=r"minicache stores tokens of several layers together.*snapkv keeps other"):
        parse_compression("snapkv+minicache")
    with pytest.raises(InvalidSpec, match=r"kvsharer finds on calibration sequences.*turboquant keeps the first"):
        parse_compression("kvsharer+turboquant_4bit_nc")
