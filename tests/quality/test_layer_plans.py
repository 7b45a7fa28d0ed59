"""Making layer plans: totals, freedoms, and what a plan does to tensors."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from kvsim.compression import parse_compression
from kvsim.compression.base import LayerView
from kvsim.compression.selector import layer_view
from kvsim.compression.stored import encoded_bytes
from kvsim.errors import InvalidSpec
from kvsim.quality.layer_plans import (
    SHARE_UNITS,
    Option,
    Sensitivity,
    alone,
    best_plan,
    encoding_options,
    local_harms,
    local_sensitivity,
    predicted_harm,
    selection_options,
    sensitivity_by,
    uniform,
)
from kvsim.quality.plan_runs import Budget, plan_from_caches
from kvsim.quality.store import StoredCache, fit_strategy, store_cache
from kvsim.specs.base import Dtype
from kvsim.tensors import KvTensors
from tests.quality.conftest import noise_cache

CANDIDATES = ("streaming_llm", "h2o", "snapkv(window_size=16)")


def _store(name: str, kv: KvTensors) -> StoredCache:
    return store_cache(fit_strategy(parse_compression(name)), kv)


# --- on tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ("layer_plan[6*{}]", "snapkv:0.75"),
        ("layer_plan:relative[{}]", "pyramidkv"),
        ("layer_plan:relative[{}]", "quest"),
        ("layer_plan:relative[{0};{0}]", "h2o:0.9"),
        ("layer_plan[6*{}]", "streaming_llm:0.75"),
        ("layer_plan[6*{}]", "expected_attention:0.75"),
        ("layer_encodings[6*{}]", "kivi-4"),
        ("layer_encodings:relative[{}]", "turboquant_4bit_nc"),
        ("layer_encodings[6*{}]", "turboquant_mse:2(value_bits=3)"),
        ("layer_encodings:relative[{}]", "kvquant-3"),
    ],
)
def test_one_policy_everywhere_is_that_policy_byte_for_byte(
    plan: str, name: str, noise: KvTensors, samples: tuple[KvTensors, ...]
) -> None:
    ours, theirs = (
        store_cache(fit_strategy(parse_compression(text), samples), noise) for text in (plan.format(name), name)
    )
    assert ours.bits == theirs.bits
    for mine, other in zip(ours.kv.layers, theirs.kv.layers, strict=True):
        for field in ("keys", "values", "positions"):
            assert getattr(mine, field).tobytes() == getattr(other, field).tobytes()
    for mask, other_mask in zip(ours.read_masks, theirs.read_masks, strict=True):
        assert (mask is None) == (other_mask is None)
        assert mask is None or np.array_equal(mask, other_mask)


def test_each_layer_is_what_its_own_policy_leaves(noise: KvTensors) -> None:
    names = ("snapkv:0.75", "quest:64(num_dense_layers=0)", "h2o:0.9", "keep_all", "streaming_llm:0.5", "pyramidkv")
    found = _store(f"layer_plan[{';'.join(names)}]", noise)
    for index, name in enumerate(names):
        alike = _store(name, noise)
        assert found.kv.layers[index].keys.tobytes() == alike.kv.layers[index].keys.tobytes()
        assert found.bits[index] == alike.bits[index]
        assert (found.read_masks[index] is None) == (alike.read_masks[index] is None)


def test_bits_of_a_mixed_plan_are_what_pricing_says(noise: KvTensors) -> None:
    encodings = "native;fp8;kivi-2;turboquant_mse:3(value_bits=1);turboquant_mse:2.5;int4_per_token_head"
    plan = (
        f"layer_plan[snapkv:0.75;h2o:0.9;keep_all;streaming_llm:0.5;snapkv:100;pyramidkv]+layer_encodings[{encodings}]"
    )
    compression = parse_compression(plan)
    for index, bits in enumerate(_store(plan, noise).bits):
        layer = layer_view(noise, index)
        encoding = compression.encoding_at(layer)
        tokens = compression.selection.resident_tokens(noise.layers[index].num_tokens, layer)(0)
        fixed = encoding.fixed_bytes_per_sequence(layer.group, Dtype.BF16)
        assert bits == 8 * (encoded_bytes(encoding, layer.group, Dtype.BF16, tokens) + fixed)


def test_a_plan_for_another_model_is_refused(noise: KvTensors) -> None:
    with pytest.raises(InvalidSpec, match="a model of 4 layers, and this one has 6"):
        _store("layer_plan[4*h2o]", noise)


# --- options --------------------------------------------------------------------------------------------------------


def test_the_order_of_candidates_changes_nothing(noise: KvTensors) -> None:
    options = [selection_options(names, (8, 16, 32, 64)) for names in (CANDIDATES, CANDIDATES[::-1])]
    assert options[0] == options[1]
    found = [local_sensitivity([noise], one[::step]) for one, step in ((options[0], 1), (options[0], -1))]
    assert found[0].options == found[1].options
    assert np.array_equal(found[0].harms, found[1].harms)
    assert best_plan(found[0], 16) == best_plan(found[1], 16)


def test_options_keep_the_share_that_they_cost(noise: KvTensors) -> None:
    for option in selection_options(CANDIDATES, range(4, 65)):
        selection = uniform(option).selection
        for index in range(noise.num_layers):
            assert selection.resident_tokens(320, layer_view(noise, index))(0) == option.cost * 5


@pytest.mark.parametrize("names", [("fp8",), ("quest",), ("layer_plan",)])
def test_only_selections_with_a_share_are_candidates(names: tuple[str, ...]) -> None:
    with pytest.raises(InvalidSpec):
        selection_options(names)


def test_shares_are_64ths() -> None:
    with pytest.raises(InvalidSpec, match="whole 64ths"):
        selection_options(CANDIDATES, (0, 16))


# --- plans ----------------------------------------------------------------------------------------------------------


def _random(seed: int, layers: int = 3) -> Sensitivity:
    options = selection_options(CANDIDATES, (8, 16, 32, 64))
    harms = np.random.default_rng(seed).exponential(size=(layers, len(options)))
    harms[:, [option.is_free_of_harm for option in options]] = 0.0
    return Sensitivity(options, harms)


@pytest.mark.parametrize("seed", range(6))
def test_the_total_is_kept_exactly_and_nothing_is_better(seed: int) -> None:
    found = _random(seed)
    plan = best_plan(found, 16)
    assert sum(option.cost for option in plan) == 3 * 16
    totals = [
        predicted_harm(found, choice)
        for choice in product(found.options, repeat=3)
        if sum(option.cost for option in choice) == 3 * 16
    ]
    assert predicted_harm(found, plan) == pytest.approx(min(totals), rel=1e-12)
    tokens = [
        parse_compression(option.name).selection.resident_tokens(640, LayerView(0, 3, _GROUP))(0) for option in plan
    ]
    assert sum(tokens) == 3 * 160


@pytest.mark.parametrize("seed", range(6))
def test_each_freedom_is_worth_something_and_no_more_than_both(seed: int) -> None:
    found = _random(seed)
    both = predicted_harm(found, best_plan(found, 16))
    policies = best_plan(found, 16, "policy")
    assert {option.cost for option in policies} == {16}
    for policy in found.policies:
        budgets = best_plan(found, 16, "budget", policy)
        assert {option.policy for option in budgets} <= {policy, ""}
        alike = next(one for one in found.options if one.policy == policy and one.cost == 16)
        uniform_harm = predicted_harm(found, [alike] * 3)
        for part in (budgets, policies):
            assert both <= predicted_harm(found, part) + 1e-12
            assert predicted_harm(found, part) <= uniform_harm + 1e-12


def test_a_total_that_nothing_reaches_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="no plan of 3 layers"):
        best_plan(_random(0), 3)


def test_layers_alone_leave_the_others_as_they_are(noise: KvTensors) -> None:
    option = selection_options(("h2o",), (8,))[0]
    stored = store_cache(fit_strategy(alone(option, 2, 6)), noise)
    assert [layer.num_tokens for layer in stored.kv.layers] == [320, 320, 40, 320, 320, 320]
    bits = encoding_options({"turboquant_mse:2": 4})[0]
    read = store_cache(fit_strategy(alone(bits, 1, 6)), noise).kv.layers
    assert [np.array_equal(one.keys, other.keys) for one, other in zip(read, noise.layers, strict=True)] == [
        True, False, True, True, True, True,
    ]  # fmt: skip


def test_measuring_layers_alone_or_all_at_once_finds_the_same_local_harm(noise: KvTensors) -> None:
    options = selection_options(("h2o", "streaming_llm"), (8, 64))
    at_once = local_sensitivity([noise], options)
    alone_each = sensitivity_by(lambda one: float(local_harms(one, [noise]).sum()), options, 6)
    assert at_once.harms == pytest.approx(alone_each.harms, rel=1e-9)
    assert (at_once.harms[:, [option.is_free_of_harm for option in at_once.options]] == 0.0).all()


def test_a_sensitive_layer_gets_the_tokens() -> None:
    """Layer 1 attends to one token out of the middle, the others to all alike, and their values hardly differ."""
    kv, *others = (_with_a_look_up(noise_cache(seed, layers=3), layer=1, position=100) for seed in (11, 12, 13))
    made = plan_from_caches([kv], ("streaming_llm",), Budget(keep=0.375), held_out=others)
    costs = [option.cost for option in made.options]
    assert costs[1] == max(costs)
    assert sum(costs) == 3 * 24
    assert made.predicted == pytest.approx(made.calibrated, rel=1e-9)
    assert made.held_out is not None
    assert made.held_out_uniform is not None
    assert made.held_out < made.held_out_uniform


def _with_a_look_up(kv: KvTensors, layer: int, position: int) -> KvTensors:
    layers = [replace(one, values=one.values + 10.0) for one in kv.layers]
    keys, queries = layers[layer].keys.copy(), layers[layer].queries.copy()
    keys[:, position] = 1.5
    queries += 1.0
    layers[layer] = replace(layers[layer], keys=keys, queries=queries)
    return replace(kv, layers=tuple(layers))


def test_encodings_are_planned_by_the_bits_that_they_take(noise: KvTensors) -> None:
    names = ("turboquant_mse:1", "turboquant_mse:2", "turboquant_mse:3", "turboquant_mse")
    made = plan_from_caches([noise], names, Budget(bits=2.5), held_out=[noise_cache(21)])
    stored = store_cache(fit_strategy(made.compression), noise)
    elements = sum(layer.keys.size + layer.values.size for layer in noise.layers)
    assert stored.total_bits / elements <= 2.5
    assert made.calibrated <= made.calibrated_uniform + 1e-12


@pytest.mark.parametrize(
    ("names", "budget", "message"),
    [
        (("fp8",), Budget(keep=0.5), "token selections go with --keep"),
        (("h2o",), Budget(bits=4.0), "encodings with --bits"),
        (("h2o", "fp8"), Budget(keep=0.5), "never both"),
        (("h2o",), Budget(), "give one of --keep"),
        (("h2o",), Budget(keep=0.3), "whole 64ths"),
        (("fp8",), Budget(bits=2.0), "no plan of 6 layers"),
    ],
)
def test_wrong_budgets_say_what_goes(names: tuple[str, ...], budget: Budget, message: str, noise: KvTensors) -> None:
    with pytest.raises(InvalidSpec, match=message):
        plan_from_caches([noise], names, budget)


_GROUP = layer_view(noise_cache(0, layers=1, tokens=16), 0).group


def test_an_option_says_whether_it_harms() -> None:
    assert selection_options((), (SHARE_UNITS,)) == (Option("keep_all", "", SHARE_UNITS),)
    assert selection_options((), (SHARE_UNITS,))[0].is_free_of_harm
