"""What a step must cost, whatever the priors say: closed forms, roofline facts, monotone hardware."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_cases import HASH_TOKENS, MODELS, Case, build_case, deploy, step_model, table

from kvsim.catalog import resolve
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.deployment import Deployment
from kvsim.device_catalog import load_device
from kvsim.engine_memory import replicated_bytes
from kvsim.memory import plan_memory
from kvsim.ops import Component
from kvsim.pool import block_bytes, longest_prompt, prefill_growths, prompt_bytes
from kvsim.scenario import Scenario
from kvsim.specs.engine import EngineSpec, SamplingSpec
from kvsim.units import TICKS_PER_SECOND

ALONE = [(7, 3), (1000, 100), (9000, 300)]
CLOSED = ["native", "fp8", "turboquant_4bit_nc", "kivi-4", "h2o:0.5", "snapkv:0.5", "streaming_llm:512", "quest:256"]


def alone(deployment: Deployment, prompt: int, output: int) -> Case:
    return build_case(deployment, table([0], [prompt], [output]), spare_blocks=200)


@pytest.mark.parametrize(("prompt", "output"), ALONE)
@pytest.mark.parametrize("strategy", CLOSED)
def test_a_request_alone_takes_the_closed_form(strategy: str, prompt: int, output: int) -> None:
    """Batch of one: prefill_split and the sum of decode_split, to 1e-9."""
    deployment = deploy(strategy=strategy)
    step, log = step_model(deployment), alone(deployment, prompt, output).play().log
    prefill_s = total_seconds(prefill_split(step, prompt))
    decode_s = sum(total_seconds(decode_split(step, 1, prompt, g)) for g in range(output - 1))
    assert log.first_token[0] / TICKS_PER_SECOND == pytest.approx(prefill_s, rel=1e-9)
    assert (log.finished[0] - log.first_token[0]) / TICKS_PER_SECOND == pytest.approx(decode_s, rel=1e-9)


@pytest.mark.parametrize("model", [*MODELS, "jamba-v0.1"])
def test_time_by_component_is_that_of_the_closed_form(model: str) -> None:
    deployment = deploy(model)
    prompt, output = 700, 60
    step = step_model(deployment)
    (record,) = alone(deployment, prompt, output).play().records
    decode = [decode_split(step, 1, prompt, g) for g in range(output - 1)]
    prefill = prefill_split(step, prompt)
    for component in Component:
        got = getattr(record.prefill, component.value) / TICKS_PER_SECOND
        assert got == pytest.approx(prefill[component], rel=1e-5, abs=1e-9)
        got = getattr(record.decode, component.value) / TICKS_PER_SECOND
        assert got == pytest.approx(sum(split[component] for split in decode), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("strategy", ["native", "fp8", "snapkv:0.5", "streaming_llm:512"])
def test_zero_load_ttft_is_the_prefill_time(strategy: str) -> None:
    """Requests far apart wait for nobody: each first token comes one prefill after the request."""
    deployment = deploy(strategy=strategy)
    hour = 3600 * TICKS_PER_SECOND
    prompts = [100, 3000, 100, 9000]
    log = build_case(deployment, table([i * hour for i in range(4)], prompts, [50] * 4)).play().log
    step = step_model(deployment)
    for index, prompt in enumerate(prompts):
        ttft_s = (log.first_token[index] - log.arrived[index]) / TICKS_PER_SECOND
        assert ttft_s == pytest.approx(total_seconds(prefill_split(step, prompt)), rel=1e-6)
        assert log.scheduled[index] == log.arrived[index]


# --- hardware -------------------------------------------------------------------------------------------------------


def faster(deployment: Deployment, **factors: float) -> Deployment:
    """The deployment on a device with some figures multiplied."""
    device = deployment.device
    update = {}
    for name, factor in factors.items():
        fact = getattr(device, name)
        update[name] = fact.model_copy(update={"value": type(fact.value)(fact.value * factor)})
    return replace(deployment, device=device.model_copy(update=update))


def without_floors(deployment: Deployment) -> Deployment:
    """Launches and per-sequence work at a billionth of their time: what is left moves with the hardware's rates."""
    priors = deployment.priors
    tiny = {"value": 1e-15, "low": 1e-15, "high": 1e-15}
    names = ("attention_launch_s", "attention_per_sequence_s", "gemm_launch_s", "elementwise_launch_s")
    update = {
        name: {key: prior.model_copy(update=tiny) for key, prior in getattr(priors, name).items()} for name in names
    }
    return replace(deployment, priors=priors.model_copy(update=update))


def test_doubling_bandwidth_halves_a_bandwidth_bound_step() -> None:
    """A small batch on H100 is bound by bandwidth; without launch floors all of it moves with the bandwidth."""
    bound = without_floors(
        resolve(
            Scenario(
                model="llama-3.1-8b",
                device="h100-sxm",
                workload="chat",
                engine=EngineSpec(max_num_seqs=8, sampling=SamplingSpec(temperature=0.0)),
                calibration="datasheet",
            )
        )
    )
    slow, fast = (step_model(faster(bound, memory_bandwidth=factor)) for factor in (1.0, 2.0))
    for part in (Component.WEIGHTS, Component.ATTENTION, Component.OVERHEAD):
        before, after = (decode_split(step, 4, 4000, 100)[part] for step in (slow, fast))
        assert before / after == pytest.approx(2.0, rel=2e-3), part


def test_launch_floors_do_not_move_with_bandwidth() -> None:
    """Which is why twice the bandwidth is not twice the speed."""
    deployment = deploy()
    slow, fast = (
        total_seconds(decode_split(step_model(faster(deployment, memory_bandwidth=factor)), 1, 500, 10))
        for factor in (1.0, 2.0)
    )
    assert 1.1 < slow / fast < 1.95


@given(
    strategy=st.sampled_from(CLOSED), batch=st.sampled_from((1, 7, 64, 256)), prompt=st.integers(1, 20_000),
    factor=st.floats(1.0, 8.0),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_faster_memory_never_slows_a_step(strategy: str, batch: int, prompt: int, factor: float) -> None:
    deployment = deploy(strategy=strategy)
    slow, fast = step_model(deployment), step_model(faster(deployment, memory_bandwidth=factor))
    allowed = 1 + 1e-9
    assert (
        total_seconds(decode_split(fast, batch, prompt, 5))
        <= total_seconds(decode_split(slow, batch, prompt, 5)) * allowed
    )
    assert total_seconds(prefill_split(fast, prompt)) <= total_seconds(prefill_split(slow, prompt)) * allowed


@given(
    strategy=st.sampled_from(CLOSED), batch=st.integers(1, 200), more=st.integers(1, 56), prompt=st.integers(1, 9000)
)
@settings(max_examples=60, deadline=None)
def test_more_work_never_takes_less_time(strategy: str, batch: int, more: int, prompt: int) -> None:
    step = step_model(deploy(strategy=strategy))
    small = total_seconds(decode_split(step, batch, prompt, 5))
    assert small <= total_seconds(decode_split(step, batch + more, prompt, 5)) * (1 + 1e-9)
    assert total_seconds(prefill_split(step, prompt)) <= total_seconds(prefill_split(step, prompt + more)) * (1 + 1e-9)


@given(strategy=st.sampled_from(CLOSED), factor=st.floats(1.0, 3.0))
@settings(max_examples=40, deadline=None)
def test_more_memory_never_holds_fewer_sequences(strategy: str, factor: float) -> None:
    deployment = resolve(Scenario(model="llama-3.1-8b", device="h100-sxm", workload="chat", compression=strategy))
    size = block_bytes(deployment)
    small, large = (plan_memory(faster(deployment, memory_capacity=f), size) for f in (1.0, factor))
    assert small.num_blocks <= large.num_blocks
    held = [longest_prompt(deployment, plan.num_blocks * plan.block_bytes, 10**6) for plan in (small, large)]
    assert held[0] <= held[1]


def test_more_memory_never_lowers_throughput_of_a_burst() -> None:
    """Forty requests at once: each added slice of pool ends the burst no later, and without preemption soonest."""
    requests = table([0] * 40, [120] * 40, [90] * 40)
    ends, preemptions = [], []
    for spare in (4, 30, 120, 300, 700):
        result = build_case(deploy(), requests, spare_blocks=spare).play()
        ends.append(result.end_ticks)
        preemptions.append(result.records[0].preemptions)
    assert ends == sorted(ends, reverse=True)
    assert preemptions[0] > 0
    assert preemptions[-1] == 0


# --- tensor parallelism ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_tensor_parallelism_shards_weights_and_kv(ranks: int) -> None:
    one, many = deploy(), deploy(ranks=ranks)
    assert block_bytes(many) * ranks == block_bytes(one)
    plans = [plan_memory(d, block_bytes(d)) for d in (one, many)]
    whole = replicated_bytes(one.model, ranks)
    assert 0 < whole < 1e-4 * plans[0].weight_bytes, "norms"
    assert plans[1].weight_bytes * ranks == pytest.approx(plans[0].weight_bytes + (ranks - 1) * whole, rel=1e-12)
    splits = [decode_split(step_model(d), 16, 4000, 10) for d in (one, many)]
    assert splits[1][Component.WEIGHTS] < splits[0][Component.WEIGHTS]
    assert splits[1][Component.ATTENTION] < splits[0][Component.ATTENTION]
    assert splits[0][Component.COMMUNICATION] == 0.0
    assert splits[1][Component.COMMUNICATION] > 0.0


def test_a_latent_cache_is_whole_on_every_rank() -> None:
    assert block_bytes(deploy("deepseek-v2-lite", ranks=4)) == block_bytes(deploy("deepseek-v2-lite"))


def test_kv_heads_are_replicated_once_there_are_more_ranks() -> None:
    """Qwen2.5-0.5B has two KV heads and fourteen query heads: two ranks split them, no more can."""
    assert block_bytes(deploy("qwen2.5-0.5b", ranks=2)) * 2 == block_bytes(deploy("qwen2.5-0.5b"))


# --- the pool -------------------------------------------------------------------------------------------------------


@given(model=st.sampled_from(MODELS), blocks=st.integers(1, 3000), limit=st.integers(1, 40_000))
@settings(max_examples=60, deadline=None)
def test_the_longest_prompt_is_the_longest(model: str, blocks: int, limit: int) -> None:
    deployment = deploy(model)
    pool_bytes = blocks * block_bytes(deployment)
    longest = longest_prompt(deployment, pool_bytes, limit)
    assert longest == 0 or prompt_bytes(deployment, longest) <= pool_bytes
    assert longest == limit or prompt_bytes(deployment, longest + 1) > pool_bytes


def test_windowed_layers_stop_growing() -> None:
    """Sliding layers reserve the window and one scheduling step: 128 - 1 + 8192 tokens in gpt-oss (vLLM's rule)."""
    growths, fixed = prefill_growths(deploy("gpt-oss-20b"))
    assert fixed == 0
    assert [cap for cap, _ in growths] == [None, 128 - 1 + 8192]
    full, sliding = (size for _, size in growths)
    assert full == sliding == 12 * 2 * 8 * 64 * 2 * HASH_TOKENS


def test_a_second_reading_needs_room_for_its_chunk() -> None:
    """KVzip holds 2,048 tokens beside the prompt's while it scores them, whatever the prompt."""
    growths, fixed = prefill_growths(deploy())
    scored, held = prefill_growths(deploy(strategy="kvzip:0.5"))
    ((_, block),) = growths
    assert [cap for cap, _ in scored] == [None]
    assert held - fixed >= 2048 / HASH_TOKENS * block
    assert prefill_growths(deploy(strategy="kvzip:0"))[1] == fixed


@pytest.mark.parametrize("strategy", ["pyramidkv:0.5", "quest:256"])
def test_every_layer_is_charged_by_its_own_curve(strategy: str) -> None:
    """Attended tokens summed over bands equal the sum over layers."""
    deployment = deploy(strategy=strategy)
    for layer_class in deployment.layer_classes:
        view = layer_class.bands[0][0]
        layers = [replace(view, index=index) for index in layer_class.group.layers]
        assert sum(n * layer_class.head_curves(4096, v)[0].attended(0) for v, n in layer_class.bands) == sum(
            layer_class.head_curves(4096, layer)[0].attended(0) for layer in layers
        )


def test_pyramidkv_keeps_as_much_as_snapkv_in_all() -> None:
    """Its budgets differ between layers only, so a sequence decodes about as fast (arXiv 2406.02069)."""
    pyramid, snap = (
        sum(decode_split(step_model(deploy(strategy=s)), 64, 8000, 0).values()) for s in ("pyramidkv", "snapkv")
    )
    assert pyramid == pytest.approx(snap, rel=0.02)


def test_devices_are_looked_up_once() -> None:
    assert load_device("b300-sxm").spec == deploy().device
    assert np.isfinite(deploy().device.bandwidth_bytes_per_s)
