"""Fewer bytes are not faster by themselves: unpacking has a rate of its own."""

from __future__ import annotations

import pytest
from cost_cases import decode_s, deploy, kv_bytes_read, step_model

from kvsim.closed_form import decode_split
from kvsim.cost.priors import Edge, load_priors
from kvsim.ops import Component
from kvsim.pool import block_bytes
from kvsim.specs.model import LayerKind


def token_s(strategy: str, device: str = "h100-sxm", model: str = "llama-3.1-8b", edge: Edge = Edge.CENTRAL) -> float:
    """Marginal seconds of one cached token in a decode step at long context."""
    step = step_model(deploy(model, device, strategy), edge)
    return (decode_s(step, 1, 60_000) - decode_s(step, 1, 30_000)) / 30_000


def bytes_gain(strategy: str, device: str = "h100-sxm", model: str = "llama-3.1-8b") -> float:
    native, packed = deploy(model, device), deploy(model, device, strategy)
    return (kv_bytes_read(native, 60_000) - kv_bytes_read(native, 30_000)) / (
        kv_bytes_read(packed, 60_000) - kv_bytes_read(packed, 30_000)
    )


@pytest.mark.parametrize("device", ["h100-sxm", "h200-sxm", "a100-sxm-80gb"])
@pytest.mark.parametrize("strategy", ["int4_per_token_head", "int8_per_token_head", "kivi-4", "kivi-2"])
def test_packed_caches_gain_less_time_than_bytes_beside_fast_memory(strategy, device):
    speed = token_s("native", device) / token_s(strategy, device)
    assert speed < 0.9 * bytes_gain(strategy, device)


@pytest.mark.parametrize("strategy", ["int4_per_token_head", "int8_per_token_head", "kivi-4", "kivi-2"])
def test_packed_caches_gain_nearly_their_bytes_beside_slow_memory(strategy):
    """L40S unpacks 4 times as much per byte moved as H100 (91.6 TFLOPS beside 0.86 TB/s): fp8 there measures 1.9x."""
    speed = token_s("native", "l40s") / token_s(strategy, "l40s")
    assert 0.9 * bytes_gain(strategy, "l40s") < speed <= bytes_gain(strategy, "l40s")


def test_turboquant_gains_capacity_and_loses_speed_at_long_context_on_h100():
    native, packed = deploy("llama-3.1-8b", "h100-sxm"), deploy("llama-3.1-8b", "h100-sxm", "turboquant_4bit_nc")
    assert block_bytes(native) / block_bytes(packed) > 2
    for context in (8_000, 32_000, 100_000):
        assert decode_s(step_model(native), 1, context) / decode_s(step_model(packed), 1, context) < 1


def test_the_unpacking_part_is_what_the_strategy_adds_over_moving_its_bytes():
    packed = deploy("llama-3.1-8b", "h100-sxm", "int4_per_token_head")
    split = decode_split(step_model(packed), 1, 60_000, 0)
    moved_s = kv_bytes_read(packed, 60_000) / step_model(packed).rates.stream_bytes_per_s
    floor_s = 32 * step_model(packed).rates.attention_launch_s
    assert split[Component.ATTENTION] == pytest.approx(moved_s + floor_s, rel=0.02)
    assert split[Component.COMPRESSION] > 0.5 * moved_s


@pytest.mark.parametrize("family", sorted(load_priors().unpack_ops_per_element))
def test_more_bandwidth_alone_cannot_lift_an_unpack_bound(family):
    """H200 has H100's compute and 1.43 times its bandwidth: an unpack-bound format gains less than that."""
    strategies = {
        "fp8": "fp8", "fp8_per_token_head": "fp8_per_token_head", "int8_per_token_head": "int8_per_token_head",
        "int4_per_token_head": "int4_per_token_head", "kivi_4": "kivi-4", "kivi_2": "kivi-2",
        "turboquant_k8v4": "turboquant_k8v4", "turboquant_4bit": "turboquant_4bit_nc",
        "turboquant_k3v4": "turboquant_k3v4_nc", "turboquant_3bit": "turboquant_3bit_nc",
        "turboquant_mse": "turboquant_mse", "turboquant_prod": "turboquant_prod", "quarot_4": "quarot-4",
        "quarot_3": "quarot-3", "quarot_2": "quarot-2", "rotatekv_4": "rotatekv-4", "rotatekv_3": "rotatekv-3",
        "rotatekv_2": "rotatekv-2", "kvquant_4": "kvquant-4", "kvquant_3": "kvquant-3", "kvquant_2": "kvquant-2",
    }  # fmt: skip
    if family not in strategies:
        pytest.skip(f"{family} has no native path on Hopper")
    gain = token_s(strategies[family], "h100-sxm") / token_s(strategies[family], "h200-sxm")
    assert 1.0 <= gain < 0.9 * token_s("native", "h100-sxm") / token_s("native", "h200-sxm")


def test_a_kernel_that_unpacks_per_query_head_pays_for_grouped_queries():
    """TurboQuant as merged unpacks once per query head: Llama-3.1-8B has four of them to a KV head."""
    rates = step_model(deploy("llama-3.1-8b", "h100-sxm")).rates
    prior = rates.unpack_prior("turboquant_4bit")
    assert prior.per_query_head
    group = deploy("llama-3.1-8b", "h100-sxm").model.kv_groups[0]
    assert group.kind is LayerKind.FULL
    per_layer = 4 * group.kv_elements_per_token * prior.value / rates.lane_ops_per_s
    packed_layers = 32 - 4
    assert token_s("turboquant_4bit_nc") > packed_layers * per_layer
