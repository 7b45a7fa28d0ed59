"""Laws of every strategy on every model shape that can run it."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import NamedTuple

import pytest

from kvsim.compression import (
    CODINGS,
    ENCODINGS,
    REDUCTIONS,
    SELECTIONS,
    STRATEGIES,
    Compression,
    parse_compression,
    stored_bytes,
)
from kvsim.compression.base import KvEncoding, LayerView
from kvsim.compression.encoding.native import Native
from kvsim.compression.selection.base import acts_on
from kvsim.ops import Component, OpCall
from kvsim.specs.device import DeviceSpec
from kvsim.specs.model import LayerGroup, LayerKind, ModelSpec

NATIVE = Compression()
PAIRS = tuple(
    f"{selection}+{encoding}"
    for selection in ("streaming_llm:256", "snapkv:0.5", "h2o:128", "pyramidkv:0.7", "quest:128")
    for encoding in ("fp8", "int4_per_token_head", "kivi-2", "turboquant_3bit_nc", "low_rank")
)
STACKS = ("low_rank+fp8", "low_rank+int8_per_token_head", "snapkv+low_rank+kivi-4")
EVERY = (*STRATEGIES, *(name for name in PAIRS if name not in STRATEGIES), *STACKS)
PROMPTS = (0, 1, 5, 63, 64, 65, 200, 1000, 4097)


class Runs(NamedTuple):
    """A strategy with every model that can run it."""

    compression: Compression
    models: tuple[ModelSpec, ...]


@pytest.fixture(params=EVERY)
def runs(request: pytest.FixtureRequest, models: dict[str, ModelSpec], fp8_device: DeviceSpec) -> Runs:
    compression = parse_compression(request.param)
    able = tuple(model for model in models.values() if compression.check(model, fp8_device) is None)
    # Latents alone, where the method chooses among latents.
    assert len(able) >= (1 if compression.selection.kind == "dsa" else 5)
    return Runs(compression, able)


def _acted_layers(model: ModelSpec) -> list[LayerView]:
    return [
        LayerView(index, model.num_layers, group)
        for group in model.groups
        if acts_on(group)
        for index in group.layers
    ]  # fmt: skip


def _stored(compression: Compression, model: ModelSpec, group: LayerGroup) -> tuple[KvEncoding, ...]:
    """What the group's layers store, each encoding once."""
    return tuple(dict.fromkeys(compression.encoding_for_layer(index, model) for index in group.layers))


def _ops(compression: Compression, model: ModelSpec) -> list[OpCall]:
    calls: list[OpCall] = []
    for group in model.groups:
        for encoding in _stored(compression, model, group):
            calls += [*encoding.append_ops(group, model), *encoding.decode_ops(group, model)]
    for layer in _acted_layers(model):
        calls += compression.selection.decode_ops(layer, model)
        for prompt in PROMPTS[1:]:
            calls += compression.selection.prefill_ops(prompt, layer, model)
    return calls


def test_zero_tokens_take_zero_bytes(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        assert stored_bytes(compression, model, 0, 0) == 0.0


def test_resident_bytes_never_fall_with_tokens(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        by_generated = [stored_bytes(compression, model, 300, generated) for generated in range(0, 400, 7)]
        assert by_generated == sorted(by_generated)
        by_prompt = [stored_bytes(compression, model, prompt, 0) for prompt in range(0, 700, 13)]
        # Where tokens stay or go in units, a longer prompt may leave fewer, by less than a unit.
        slack = stored_bytes(compression, model, unit, 0) if (unit := compression.selection.unit_tokens - 1) else 0.0
        assert all(after >= before - slack for before, after in pairwise(by_prompt))


def test_attended_at_most_resident_at_most_context(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        for layer in _acted_layers(model):
            for prompt in PROMPTS:
                resident = compression.selection.resident_tokens(prompt, layer)
                attended = compression.selection.attended_tokens(prompt, layer)
                for generated in (0, 1, 2, 17, 100, 2049):
                    assert 0 <= attended(generated) <= resident(generated) <= prompt + generated
                assert compression.selection.prefill_resident_tokens(prompt, layer) <= prompt
                assert resident(0) <= compression.selection.prefill_resident_tokens(prompt, layer)


def test_something_is_attended_once_there_is_context(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        for layer in _acted_layers(model):
            for prompt in PROMPTS[1:]:
                assert compression.selection.attended_tokens(prompt, layer)(1) >= 1


def test_never_more_than_native_and_declared_metadata(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        for prompt, generated in ((1, 0), (100, 3), (5000, 200)):
            context = prompt + generated
            metadata = 0.0
            for group in model.kv_groups:
                layers = [LayerView(index, model.num_layers, group) for index in group.layers]
                scan = max(compression.selection.at_layer(layer).scan_bytes_per_token(group, 2.0) for layer in layers)
                scan = scan if acts_on(group) else 0.0
                scan += compression.selection.trained_group(group).index_key_bytes - group.index_key_bytes
                encoded = compression.stored.bytes_per_token(group, model.dtype).metadata_bytes
                fixed = compression.stored.fixed_bytes_per_sequence(group, model.dtype)
                view = LayerView(group.layers[0], model.num_layers, group)
                held = compression.selection.held_bytes_per_token(view) if acts_on(group) else 0.0
                metadata += group.num_layers * (context * (scan + encoded + held) + fixed)
            native = stored_bytes(NATIVE, model, prompt, generated)
            assert stored_bytes(compression, model, prompt, generated) <= native + metadata


def test_json_and_name_round_trip(runs: Runs) -> None:
    compression = runs.compression
    assert Compression.model_validate_json(compression.model_dump_json()) == compression
    assert parse_compression(compression.name) == compression


def test_every_operation_has_finite_work(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        for call in _ops(compression, model):
            work = call.work
            amounts = (work.flops, work.bytes_read, work.bytes_written, work.vector_flops, work.decoded_elements)
            assert all(math.isfinite(float(amount)) and float(amount) >= 0 for amount in amounts), call
            assert sum(float(amount) for amount in amounts) > 0, call
            # What runs once for all layers is shared out over them.
            assert work.launches >= 1 / model.num_layers
            assert call.component is Component.COMPRESSION


def test_layers_that_store_nothing_get_no_bytes_and_no_append_work(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        for group in model.groups:
            for encoding in _stored(compression, model, group):
                if group.kv_elements_per_token == 0:
                    assert encoding.bytes_per_token(group, model.dtype).total_bytes == 0.0
                    assert tuple(encoding.append_ops(group, model)) == ()
                if group.kind is LayerKind.LINEAR:
                    assert tuple(encoding.decode_ops(group, model)) == ()
                    assert encoding.attention_flops_per_token(group, model) == 0.0


def test_every_member_of_the_registry_is_named() -> None:
    for part in (*ENCODINGS, *SELECTIONS, *REDUCTIONS, *CODINGS):
        assert part.names
        assert part.family
        assert set(part.summaries) == set(part.names)
        assert {meant.partition(":")[0] for meant in part.aliases.values()} <= set(part.names)


@pytest.mark.parametrize(
    "neutral",
    ["keep_all", "snapkv:0", "pyramidkv:0", "h2o:0", "snapkv:100000", "pyramidkv:100000", "h2o:100000",
     "streaming_llm:100000", "keep_all+native"],
)  # fmt: skip
def test_neutral_parameters_equal_native(neutral: str, models: dict[str, ModelSpec]) -> None:
    compression = parse_compression(neutral)
    for model, prompt in product(models.values(), PROMPTS):
        for generated in (0, 1, 50):
            assert stored_bytes(compression, model, prompt, generated) == stored_bytes(NATIVE, model, prompt, generated)
            for layer in _acted_layers(model):
                attended = compression.selection.attended_tokens(prompt, layer)(generated)
                assert attended == NATIVE.selection.attended_tokens(prompt, layer)(generated)


@pytest.mark.parametrize("neutral", ["snapkv:0", "pyramidkv:0", "h2o:0"])
def test_removing_nothing_costs_nothing(neutral: str, models: dict[str, ModelSpec]) -> None:
    model, selection = models["llama-3.1-8b"], parse_compression(neutral).selection
    layer = LayerView(0, model.num_layers, model.groups[0])
    assert tuple(selection.prefill_ops(4096, layer, model)) == ()
    assert tuple(selection.decode_ops(layer, model)) == ()
    assert selection.decode_score_flops_per_token(layer.group, model) == 0.0
    assert not selection.evicts


def test_quest_with_an_ample_budget_reads_everything_and_adds_only_page_bounds(models: dict[str, ModelSpec]) -> None:
    model = models["llama-3.1-8b"]
    quest = parse_compression("quest:131072")
    for layer in _acted_layers(model):
        assert quest.selection.attended_tokens(1000, layer)(24) == 1024
    bounds = 30 * 1024 * 2 * 128 * 2 * 8 / 16
    assert stored_bytes(quest, model, 1000, 24) == stored_bytes(NATIVE, model, 1000, 24) + bounds


def test_kept_layers_are_native(runs: Runs) -> None:
    compression = runs.compression
    for model in runs.models:
        chosen: list[KvEncoding] = [
            compression.encoding_for_layer(index, model, engine_skip_layers=(0, "sliding_window"))
            for index in range(model.num_layers)
        ]
        assert chosen[0] == Native()
        for group in model.groups:
            if group.kind is LayerKind.SLIDING:
                assert all(chosen[index] == Native() for index in group.layers)
