"""Memory of a device: laws of every engine's rule, terms that add up, and block counts that real engines logged."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.catalog import resolve
from kvsim.cost.priors import EDGES
from kvsim.deployment import Deployment
from kvsim.engine_memory import (
    activation_bytes,
    rank_weight_bytes,
    replicated_bytes,
    rotary_bytes,
    sampler_bytes,
)
from kvsim.errors import InfeasibleScenario, InvalidSpec, WeightsDoNotFit
from kvsim.hf_config import parse_hf_config
from kvsim.memory import plan_memory, slot_tokens, waterfall
from kvsim.model_catalog import load_model
from kvsim.parallelism import Parallelism
from kvsim.pool import block_bytes, logged_tokens, prefill_growths, prompt_bytes
from kvsim.scenario import Scenario
from kvsim.scenario_file import build_scenario
from kvsim.specs.engine import EngineSpec
from kvsim.specs.model import LayerKind

KINDS = ("vllm", "sglang", "tensorrt_llm", "llamacpp")
MODELS = ("llama-3.1-8b", "mixtral-8x7b", "gemma-3-27b", "gpt-oss-20b", "qwen2.5-0.5b")
SHARES = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static", "tensorrt_llm": "free_gpu_memory_fraction"}
GIB = 2**30


def deploy(model: str = "llama-3.1-8b", device: str = "h100-sxm", ranks: int = 1, **engine: Any) -> Deployment:
    return resolve(
        Scenario(
            model=model, device=device, workload="chat", tensor_parallel_size=ranks, calibration="datasheet",
            engine=EngineSpec(**engine),
        )
    )  # fmt: skip


def blocks(deployment: Deployment) -> int:
    try:
        return plan_memory(deployment, block_bytes(deployment)).num_blocks
    except WeightsDoNotFit:
        return 0


# --- block counts of logged runs ------------------------------------------------------------------------------------

H100 = {"max_num_seqs": 128, "gpu_memory_utilization": 0.9, "version": "0.15.1"}
LOGGED = [
    # The two runs that the two constants were fitted on.
    ("llama-3.1-70b", "h100-sxm", 4, {**H100, "max_num_batched_tokens": 8192}, 30251),
    ("yi-34b", "h100-sxm", 2, {**H100, "max_num_batched_tokens": 2048}, 20793),
    # The others.
    ("mistral-nemo-12b", "h100-sxm", 1, {**H100, "max_num_batched_tokens": 2048}, 19251),
    ("qwen2.5-7b", "h100-sxm", 1, {**H100, "max_num_batched_tokens": 1024}, 65368),
    (
        "llama-3.1-8b", "rtx-4090", 1,
        {"max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.9, "version": "0.19.0"}, 2588,
    ),
    # vLLM 0.31, a public log on an A100: 460,496 tokens at the default utilisation.
    ("llama-3.1-8b", "a100-sxm-80gb", 1, {"max_num_batched_tokens": 8192, "version": "0.31.0"}, 460_496 // 16),
]  # fmt: skip


@pytest.mark.parametrize(("model", "device", "ranks", "engine", "logged"), LOGGED)
def test_blocks_of_dense_models_are_within_one_percent_of_the_log(
    model: str, device: str, ranks: int, engine: dict[str, Any], logged: int
) -> None:
    """vLLM 0.15.1 on H100, 0.19 on an RTX 4090, 0.31 on an A100."""
    assert blocks(deploy(model, device, ranks, **engine)) == pytest.approx(logged, rel=0.01)


def test_a_mixture_of_experts_with_vision_lies_within_its_band() -> None:
    """Llama-4-Scout FP8 logged 8,253 blocks; what its prior leaves open covers that, and the centre misses by 9 %."""
    scout = deploy("llama-4-scout-fp8", "h100-sxm", 2, **{**H100, "max_num_batched_tokens": 2048})
    low, centre, high = sorted(plan_memory(scout, block_bytes(scout), edge).num_blocks for edge in EDGES)
    assert low < 8253 < high
    assert centre == pytest.approx(8253, rel=0.10)


# --- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("model", MODELS)
def test_a_larger_share_never_gives_fewer_blocks(kind: str, model: str) -> None:
    found = [blocks(deploy(model, ranks=2, kind=kind, **{SHARES[kind]: share})) for share in (0.3, 0.6, 0.75, 0.85)]
    assert found == sorted(found)
    assert found[-1] > found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_more_memory_never_gives_fewer_blocks(kind: str) -> None:
    small = deploy(kind=kind)
    spec = small.device
    found = []
    for gib in (20, 40, 60, 80, 141):
        capacity = spec.memory_capacity.model_copy(update={"value": gib * GIB})
        device = spec.model_copy(update={"memory_capacity": capacity})
        found.append(blocks(Deployment(**{**vars(small), "device": device})))
    assert found == sorted(found)
    assert found[0] < found[-1]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS), model=st.sampled_from(MODELS), ranks=st.sampled_from([1, 2]),
    seats=st.integers(1, 1024), budget=st.integers(1024, 65536), edge=st.sampled_from(EDGES),
)  # fmt: skip
def test_terms_add_up_to_the_device_and_blocks_fit_the_pool(
    kind: str, model: str, ranks: int, seats: int, budget: int, edge: Any
) -> None:
    deployment = deploy(model, ranks=ranks, kind=kind, max_num_seqs=seats, max_num_batched_tokens=budget)
    size = block_bytes(deployment)
    try:
        plan = plan_memory(deployment, size, edge)
    except InfeasibleScenario:
        return
    assert plan.num_blocks * size <= plan.pool_bytes < (plan.num_blocks + 1) * size
    terms = waterfall(plan, deployment)
    assert sum(term.size_bytes for term in terms) == pytest.approx(plan.total_bytes, rel=1e-12)
    assert all(term.size_bytes >= -plan.usable_bytes * 1e-4 for term in terms)


def test_each_engine_means_its_own_by_its_share() -> None:
    plans = {kind: plan_memory(one := deploy(kind=kind, **{SHARES[kind]: 0.8}), block_bytes(one)) for kind in SHARES}
    usable, weights = plans["vllm"].usable_bytes, plans["vllm"].weight_bytes
    runtime = plans["vllm"].runtime_bytes
    assert plans["vllm"].pool_bytes == pytest.approx(0.8 * usable - weights - runtime)
    assert (plans["sglang"].pool_bytes + weights) / usable == pytest.approx(0.8)
    assert plans["tensorrt_llm"].pool_bytes == pytest.approx(0.8 * (usable - weights - runtime))
    defaults = plan_memory(one := deploy(kind="tensorrt_llm"), block_bytes(one))
    assert defaults.pool_bytes == pytest.approx(0.9 * (usable - weights - defaults.runtime_bytes))


def test_llamacpp_allocates_its_context_and_divides_it_among_slots() -> None:
    whole = deploy(device="apple-m4-max", kind="llamacpp", ctx_size=32768, max_num_seqs=1)
    split = deploy(device="apple-m4-max", kind="llamacpp", ctx_size=32768, max_num_seqs=4)
    plans = [plan_memory(one, block_bytes(one)) for one in (whole, split)]
    assert plans[0].pool_bytes == prompt_bytes(whole, 32768) == 32768 * 131072
    assert plans[1].pool_bytes == plans[0].pool_bytes
    assert (slot_tokens(whole), slot_tokens(split)) == (32768, 8192)
    with pytest.raises(InfeasibleScenario, match=r"lower engine\.ctx_size"):
        blocks(deploy(device="apple-m1", kind="llamacpp", ctx_size=10_000_000, max_num_seqs=1))


def test_stated_sizes_win() -> None:
    given_bytes = plan_memory(one := deploy(kv_cache_memory_bytes=10 * GIB), block_bytes(one))
    assert given_bytes.pool_bytes == 10 * GIB
    assert blocks(deploy(num_gpu_blocks_override=1234)) == 1234
    graphs = plan_memory(one := deploy(cuda_graph_memory_bytes=2 * GIB), block_bytes(one))
    plain = plan_memory(one := deploy(), block_bytes(one))
    assert plain.pool_bytes - graphs.pool_bytes == pytest.approx(2 * GIB)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"kind": "sglang", "gpu_memory_utilization": 0.8}, "gpu_memory_utilization is an option of vllm"),
        ({"kind": "vllm", "mem_fraction_static": 0.8}, "mem_fraction_static is an option of sglang"),
        ({"kind": "sglang", "free_gpu_memory_fraction": 0.8}, "memory options of sglang: mem_fraction_static"),
        ({"kind": "tensorrt_llm", "num_gpu_blocks_override": 9}, "num_gpu_blocks_override is an option of vllm"),
        ({"kind": "vllm", "ctx_size": 4096}, "ctx_size is an option of llamacpp"),
        ({"kind": "llamacpp", "ctx_size": 3, "parallel": 4}, "leaves no token for each of .* 4 slots"),
        ({"kind": "vllm", "version": "main"}, "version"),
    ],
)
def test_options_of_another_engine_are_refused(engine: dict[str, Any], message: str) -> None:
    document = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat", "engine": engine}
    with pytest.raises(InvalidSpec, match=message):
        build_scenario(document, [], "test", require_units=False)


def test_a_scenario_of_another_engine_survives_a_round_trip() -> None:
    scenario = Scenario(model="llama-3.1-8b", device="h100-sxm", workload="chat", engine=EngineSpec(kind="sglang"))
    assert Scenario.model_validate(scenario.model_dump(mode="json")) == scenario


# --- terms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_ranks_hold_at_least_their_share_of_the_weights(name: str) -> None:
    model = load_model(name)
    assert rank_weight_bytes(model, Parallelism()) == model.weight_bytes
    before = float(model.weight_bytes)
    for ranks in (2, 4, 8, 16):
        per_rank = rank_weight_bytes(model, Parallelism(tensor=ranks))
        assert model.weight_bytes / ranks <= per_rank < before
        before = per_rank


def test_kv_projections_are_repeated_where_ranks_outnumber_heads() -> None:
    """qwen2.5-0.5b has 2 KV heads: on 8 ranks each holds a whole head's projections."""
    model = load_model("qwen2.5-0.5b")
    (group,) = model.groups
    one_head = group.num_layers * model.hidden_size * 2 * group.k_head_dim * 2
    norms = 2 * model.hidden_size * (2 * model.num_layers + 1)
    rest = model.weight_bytes - norms - 2 * one_head
    assert rank_weight_bytes(model, Parallelism(tensor=8)) == pytest.approx(rest / 8 + norms + one_head, rel=1e-12)
    assert replicated_bytes(model, 2) == norms


def test_latent_projections_are_whole_on_every_rank() -> None:
    model = load_model("deepseek-v3")
    down = 61 * 7168 * (1536 + 512 + 64) * model.weight_bits / 8
    assert replicated_bytes(model, 8) == pytest.approx(down, rel=0.25)
    assert replicated_bytes(model, 8) > down


def test_rotary_tables_cover_every_position_of_the_config() -> None:
    assert rotary_bytes(load_model("llama-4-scout")) == 10_485_760 * 128 * 2
    assert rotary_bytes(load_model("deepseek-v3")) == 163_840 * 64 * 2


def test_activations_count_the_widest_layer() -> None:
    model, engine = load_model("llama-3.1-70b"), EngineSpec()
    assert activation_bytes(model, engine, 4) == 8192 * (3 * 28672 // 4 + 3 * 8192) * 2
    routed = load_model("mixtral-8x7b")
    assert activation_bytes(routed, engine, 1) == 8192 * (2 * (3 * 14336 + 4096) + 3 * 4096) * 2


def test_sampling_by_sorting_takes_more_until_0_16() -> None:
    model = load_model("llama-3.1-8b")
    found = {v: sampler_bytes(model, EngineSpec(version=v)) for v in ("0.8.5", "0.15.1", "0.16.0", None)}
    assert found["0.8.5"] == found["0.15.1"] == 256 * 128256 * 26
    assert found["0.16.0"] == found[None] == 256 * 128256 * 10


def test_vision_encoder_and_partial_rotation_are_read_from_a_config() -> None:
    text = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
        "intermediate_size": 128, "max_position_embeddings": 512, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64}
    plain = parse_hf_config(text, name="x", source="test")
    seeing = parse_hf_config({"text_config": text, "vision_config": vision}, name="x", source="test")
    assert (plain.num_encoder_parameters, seeing.num_encoder_parameters) == (0, 3 * 32 * (4 * 32 + 2 * 64))
    assert rotary_bytes(plain) == 512 * 8 * 2
    assert (
        rank_weight_bytes(seeing, Parallelism()) - rank_weight_bytes(plain, Parallelism())
        == 2 * seeing.num_encoder_parameters
    )
    with pytest.raises(InvalidSpec, match="partial_rotary_factor"):
        parse_hf_config({**text, "partial_rotary_factor": 2}, name="x", source="test")


# --- hybrid models --------------------------------------------------------------------------------------------------


def test_an_incomplete_group_of_layers_pays_for_whole_pages() -> None:
    """Gemma 3 27B: 10 full layers, 52 sliding ones in 6 groups of 10, so sliding layers cost 60 / 52."""
    padded, exact = deploy("gemma-3-27b"), deploy("gemma-3-27b", kind="sglang", block_size=16)
    per_layer = {group.kind: 16 * group.num_kv_heads * 2 * group.k_head_dim * 2 for group in padded.model.groups}
    growths = dict(prefill_growths(padded)[0])
    window = next(cap for cap in growths if cap is not None)
    assert growths[None] == 10 * per_layer[LayerKind.FULL]
    assert growths[window] == 60 * per_layer[LayerKind.SLIDING]
    assert dict(prefill_growths(exact)[0])[window] == 52 * per_layer[LayerKind.SLIDING]


def test_logged_tokens_of_a_hybrid_model_count_every_group() -> None:
    """hf-mem issue 60: gpt-oss-120b logged 78,384 tokens for 5.38 GiB."""
    deployment = deploy("gpt-oss-120b", ranks=1, kv_cache_memory_bytes=1 * GIB)
    assert logged_tokens(deployment, 5.38 * GIB) == pytest.approx(78_384, rel=0.001)
    plain = deploy()
    assert logged_tokens(plain, 100.5 * block_bytes(plain)) == 1600


def test_a_model_of_one_kind_is_not_padded() -> None:
    growths, _ = prefill_growths(deploy())
    assert growths == ((None, 16 * 32 * 2 * 8 * 128 * 2),)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"engine": {"kv_cache_memory_bytes": "1 B"}}, r"^engine.kv_cache_memory_bytes: 1 B is less than one KV block"),
        ({"engine": {"gpu_memory_utilization": 0.1}}, r"raise engine.gpu_memory_utilization"),
        ({"model": "llama-3.1-405b"}, r"tensor_parallel_size: 16 would hold the weights"),
        ({"model": "llama-3.1-8b", "device": "snapdragon-8-gen-3"}, r"choose a smaller model"),
        ({"model": "deepseek-v3", "device": "a10"}, r"tensor_parallel_size: 64 would hold the weights"),
    ],
)
def test_the_advice_where_nothing_fits_is_one_that_can_be_taken(changes: dict[str, Any], advice: str) -> None:
    base = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"}
    deployment = resolve(build_scenario(base | changes, (), "s.yaml"))
    with pytest.raises(InfeasibleScenario, match=advice):
        plan_memory(deployment, block_bytes(deployment))
