"""Laws that any pricing must obey, over devices, models and every named strategy that can run."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from cost_cases import (
    DEVICES,
    MODELS,
    PRICED,
    decode_s,
    deploy,
    kv_bytes_read,
    label,
    peak_flops,
    prefill_s,
    ranks_needed,
    runnable,
    step_flops,
    step_model,
    weight_bytes_read,
)
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from kvsim.closed_form import decode_split, prefill_split
from kvsim.cost.collectives import all_reduce_seconds
from kvsim.cost.estimator import query_key_pairs, smooth_maximum
from kvsim.cost.priors import Edge, load_priors
from kvsim.cost.rates import build_rates
from kvsim.cost.step import captured_size
from kvsim.device_catalog import load_device
from kvsim.errors import IncompatibleScenario
from kvsim.ops import Component
from kvsim.specs.device import DeviceSpec

EXACT = 1 - 1e-9
BATCHES = (1, 2, 3, 4, 5, 8, 9, 64, 65, 256)
CONTEXTS = (1, 100, 1024, 4096, 32_768)
PROMPTS = (1, 16, 100, 512, 513, 4096, 8192, 8193, 20_000)


def falls(values: list[float]) -> bool:
    return any(after < before * EXACT for before, after in itertools.pairwise(values))


def test_every_device_runs_some_model():
    runs = {device: [model for model in MODELS if ranks_needed(model, device)] for device in DEVICES}
    assert all(runs.values()), runs
    assert runs["snapdragon-8-gen-3"] == ["llama-3.2-1b"]
    assert runs["h100-sxm"] == list(MODELS)


@pytest.mark.parametrize(("device", "calibration"), PRICED)
def test_seconds_are_finite_and_never_negative(device, calibration):
    for deployment in runnable(device, calibration):
        for edge in Edge:
            step = step_model(deployment, edge)
            for split in (decode_split(step, 8, 2000, 50), prefill_split(step, 3000)):
                assert set(split) == set(Component)
                assert all(math.isfinite(seconds) and seconds >= 0 for seconds in split.values()), label(deployment)
                assert split[Component.WEIGHTS] > 0, label(deployment)


@pytest.mark.parametrize(("device", "calibration"), PRICED)
def test_more_work_never_takes_less_time(device, calibration):
    for deployment in runnable(device, calibration):
        step = step_model(deployment)
        assert not falls([decode_s(step, batch, 2000) for batch in BATCHES]), label(deployment)
        assert not falls([decode_s(step, 8, context) for context in CONTEXTS]), label(deployment)
        assert not falls([prefill_s(step, prompt) for prompt in PROMPTS]), label(deployment)


@pytest.mark.parametrize(("device", "calibration"), PRICED)
def test_tables_of_a_step_never_fall_and_agree_with_single_prices(device, calibration):
    for model in MODELS:
        ranks = ranks_needed(model, device)
        if ranks is None:
            continue
        step = step_model(deploy(model, device, "native", ranks, calibration=calibration))
        counts = np.arange(0, 1100, dtype=np.float64)
        terms = step.token_terms(counts)
        table = np.asarray(terms.weights_s) + np.asarray(terms.communication_s) + np.asarray(terms.overhead_s)
        assert table[0] == 0.0
        assert (np.diff(table) >= -1e-15).all(), model
        for tokens in (1, 7, 256, 257, 512, 513, 1099):
            one = step.token_terms(tokens)
            alone = float(one.weights_s) + float(one.communication_s) + float(one.overhead_s)
            assert alone == pytest.approx(table[tokens], rel=1e-12)
        heads = np.asarray(step.head_seconds(counts))
        assert heads[0] == 0.0
        assert (np.diff(heads) >= 0).all()
        assert float(step.head_seconds(17)) == pytest.approx(heads[17], rel=1e-12)


@pytest.mark.parametrize(("device", "calibration"), PRICED)
def test_prefill_attention_of_an_array_is_that_of_each_chunk(device, calibration):
    for model in ("gemma-3-12b", "llama-3.2-1b"):
        ranks = ranks_needed(model, device)
        if ranks is None:
            continue
        step = step_model(deploy(model, device, "native", ranks, calibration=calibration))
        chunks = np.array([1.0, 17.0, 1023.0, 1024.0, 1025.0, 5000.0])
        for context in (0, 500, 1024, 9000):
            whole, _ = step.prefill_attention_seconds(chunks, context)
            alone = [step.prefill_attention_seconds(int(chunk), context)[0] for chunk in chunks]
            assert np.asarray(whole) == pytest.approx(alone, rel=1e-12)
            assert not falls(np.asarray(whole).tolist())


@pytest.mark.parametrize("calibration", ["datasheet", "default"])
@given(chunk=st.integers(1, 3000), context=st.integers(0, 9000))
@settings(max_examples=150, deadline=None)
def test_prefill_attention_never_falls_with_context_nor_with_the_chunk(calibration, chunk, context):
    for model in ("gemma-3-12b", "llama-3.1-8b"):
        step = step_model(deploy(model, "h100-sxm", calibration=calibration))
        here = step.prefill_attention_seconds(chunk, context)[0]
        assert step.prefill_attention_seconds(chunk, context + 1)[0] >= here * EXACT
        assert step.prefill_attention_seconds(chunk + 1, context)[0] >= here * EXACT


@given(chunk=st.integers(1, 60), context=st.integers(0, 60), window=st.none() | st.integers(1, 50))
def testquery_key_pairs_count_the_mask(chunk, context, window):
    queries = range(context + 1, context + chunk + 1)
    expected = sum(min(position, window or position) for position in queries)
    assert query_key_pairs(chunk, context, window) == expected
    assert np.asarray(query_key_pairs(np.array([float(chunk)]), context, window)).tolist() == [expected]


@pytest.mark.parametrize(("device", "calibration"), PRICED)
def test_the_optimistic_edge_is_never_slower_than_the_central_nor_that_than_the_pessimistic(device, calibration):
    for deployment in runnable(device, calibration):
        fast, middle, slow = (
            step_model(deployment, edge) for edge in (Edge.OPTIMISTIC, Edge.CENTRAL, Edge.PESSIMISTIC)
        )
        for batch, context in ((1, 100), (8, 4096), (256, 2000)):
            times = [decode_s(step, batch, context) for step in (fast, middle, slow)]
            assert not falls(times), label(deployment)
        for prompt in (100, 3000, 12_000):
            assert not falls([prefill_s(step, prompt) for step in (fast, middle, slow)]), label(deployment)


@pytest.mark.parametrize(("device", "calibration"), PRICED)
def test_no_step_beats_the_datasheet_roofline(device, calibration):
    """Bytes at peak bandwidth and FLOPs at the fastest dense rate bound every price from below, at every edge."""
    for deployment in runnable(device, calibration):
        bandwidth, flops = deployment.device.bandwidth_bytes_per_s, peak_flops(deployment)
        step = step_model(deployment, Edge.OPTIMISTIC)
        for batch, context in ((1, 4096), (64, 4096), (256, 1000)):
            weights = weight_bytes_read(deployment, step, batch)
            cached = batch * kv_bytes_read(deployment, context)
            split = decode_split(step, batch, context, 0)
            # Where every product is at its floor, only the order of adding up differs.
            assert split[Component.WEIGHTS] >= weights / bandwidth * EXACT, label(deployment)
            assert split[Component.WEIGHTS] >= step_flops(deployment, step, batch) / flops, label(deployment)
            # Achieved bandwidth over the cache never passes the peak either.
            assert split[Component.ATTENTION] + split[Component.COMPRESSION] >= cached / bandwidth, label(deployment)


def faster(spec: DeviceSpec, *, bandwidth: float = 1.0, flops: float = 1.0) -> DeviceSpec:
    vector = spec.vector_flops
    return spec.model_copy(
        update={
            "memory_bandwidth": spec.memory_bandwidth.model_copy(
                update={"value": spec.memory_bandwidth.value * bandwidth}
            ),
            "dense_flops": tuple(fact.model_copy(update={"value": fact.value * flops}) for fact in spec.dense_flops),
            "vector_flops": vector.model_copy(update={"value": vector.value * flops}) if vector else None,
        }
    )


@given(
    device=st.sampled_from(("h100-sxm", "a100-sxm-80gb", "mi300x", "tpu-v6e")),
    model=st.sampled_from(("llama-3.1-8b", "qwen3-30b-a3b", "gemma-3-12b")),
    strategy=st.sampled_from(("native", "int4_per_token_head", "turboquant_4bit_nc", "snapkv", "quest", "palu")),
    bandwidth=st.floats(1.0, 8.0),
    flops=st.floats(1.0, 8.0),
    batch=st.integers(1, 256),
    context=st.integers(1, 20_000),
)
@settings(max_examples=150, deadline=None)
def test_a_faster_device_is_never_slower(device, model, strategy, bandwidth, flops, batch, context):
    ranks = ranks_needed(model, device)
    try:
        deployment = deploy(model, device, strategy, ranks)
    except IncompatibleScenario:
        reject()
    base = step_model(deployment)
    wider = step_model(dataclasses.replace(deployment, device=faster(deployment.device, bandwidth=bandwidth)))
    stronger = step_model(dataclasses.replace(deployment, device=faster(deployment.device, flops=flops)))
    for other in (wider, stronger):
        assert decode_s(other, batch, context) * EXACT <= decode_s(base, batch, context)
        assert prefill_s(other, context) * EXACT <= prefill_s(base, context)


def test_a_step_that_scores_anew_reads_keys_again():
    """TOVA multiplies its query with all keys once more: a third to two thirds of what attention itself takes."""
    bounded, scored = (deploy("llama-3.1-8b", "h100-sxm", name) for name in ("streaming_llm:8192", "tova:8192"))
    plain_s, again_s = (
        decode_s(step_model(one), 64, 8192) - decode_s(step_model(one), 64, 1) for one in (bounded, scored)
    )
    assert 0.33 < (again_s - plain_s) / plain_s < 0.67


@pytest.mark.parametrize("model", ["llama-3.1-8b", "llama-3.3-70b", "gemma-3-12b"])
def test_tensor_parallel_ranks_share_weights_cache_and_time(model):
    one, two = deploy(model, "h200-sxm", "native", 1), deploy(model, "h200-sxm", "native", 2)
    alone, shared = step_model(one), step_model(two)
    assert 2 * weight_bytes_read(two, shared, 1) == pytest.approx(weight_bytes_read(one, alone, 1), rel=1e-3)
    assert 2 * kv_bytes_read(two, 5000) == pytest.approx(kv_bytes_read(one, 5000))
    for batch in (1, 64):
        halved = decode_split(alone, batch, 5000, 0), decode_split(shared, batch, 5000, 0)
        assert halved[1][Component.WEIGHTS] < halved[0][Component.WEIGHTS]
        assert halved[1][Component.ATTENTION] < halved[0][Component.ATTENTION]
        assert halved[0][Component.COMMUNICATION] == 0.0
        assert halved[1][Component.COMMUNICATION] > 0.0


def test_a_latent_cache_is_replicated_on_every_rank():
    one, eight = deploy("deepseek-v3", "h200-sxm", "native", 16), deploy("deepseek-v3", "h200-sxm", "native", 8)
    assert kv_bytes_read(one, 1000) == kv_bytes_read(eight, 1000) == 1001 * 70_272


def test_all_reduce_grows_with_ranks_and_size_and_shares_a_host_link():
    priors = load_priors()
    nvlink = build_rates(load_device("h100-sxm").spec, priors, Edge.CENTRAL)
    pcie = build_rates(load_device("l40s").spec, priors, Edge.CENTRAL)
    assert all_reduce_seconds(1e6, 1, nvlink) == 0.0
    for rates in (nvlink, pcie):
        assert all_reduce_seconds(1.0, 2, rates) >= rates.all_reduce_latency_s
        assert not falls([float(all_reduce_seconds(3e7, ranks, rates)) for ranks in (2, 4, 8)])
        assert not falls([float(all_reduce_seconds(size, 4, rates)) for size in (0.0, 1e4, 1e6, 1e8)])
    # A ring's time is bounded by twice the message over the link; a shared host link has no such bound.
    assert float(all_reduce_seconds(1e9, 8, nvlink)) < 2e9 / nvlink.link_bytes_per_s + 1e-4
    assert float(all_reduce_seconds(1e9, 8, pcie)) > 3 * float(all_reduce_seconds(1e9, 2, pcie))


VLLM_CAPTURE_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
"""vLLM 0.15 config/vllm.py, ``cudagraph_capture_sizes`` where nothing is set and max_num_seqs is 256 or more."""


def test_batches_are_padded_to_vllms_capture_sizes():
    counts = np.arange(1, 700, dtype=np.float64)
    expected = [next((size for size in VLLM_CAPTURE_SIZES if size >= count), count) for count in range(1, 700)]
    assert np.asarray(captured_size(counts)).tolist() == expected
    assert [captured_size(count) for count in range(1, 700)] == expected


@given(tokens=st.integers(1, 2000), max_num_seqs=st.integers(1, 1000))
def test_no_batch_above_twice_max_num_seqs_is_captured(tokens, max_num_seqs):
    largest = min(2 * max_num_seqs, 512)
    padded = captured_size(tokens, largest)
    assert padded >= tokens
    assert padded == tokens or padded <= largest
    assert captured_size(padded, largest) == padded


@given(terms=st.lists(st.floats(0, 1e3), min_size=1, max_size=5), more=st.floats(0, 1e3))
def test_the_smooth_maximum_lies_between_the_largest_term_and_the_sum(terms, more):
    value = smooth_maximum(*terms)
    assert max(terms) * EXACT <= value <= sum(terms) / EXACT
    assert smooth_maximum(*terms, more) >= value * EXACT


def test_host_work_of_a_step_grows_with_its_sequences_and_is_no_part_of_it():
    step = step_model(deploy("llama-3.1-8b", "h100-sxm"))
    assert step.host_step_seconds(0) == 0.0
    assert 0.0 < step.host_step_seconds(1) < step.host_step_seconds(256) < 0.02
    table = step.host_step_seconds(np.arange(3.0))
    assert table.tolist() == [step.host_step_seconds(n) for n in range(3)]
    optimistic, pessimistic = (
        step_model(deploy("llama-3.1-8b", "h100-sxm"), edge).host_step_seconds(8)
        for edge in (Edge.OPTIMISTIC, Edge.PESSIMISTIC)
    )
    assert optimistic < step.host_step_seconds(8) < pessimistic
