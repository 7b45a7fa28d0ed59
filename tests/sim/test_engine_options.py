"""Options of every engine: own names, defaults, and refusal of another engine's options with the reason."""

import pytest
from pydantic import ValidationError

from kvsim.errors import InvalidSpec
from kvsim.prepare import prepare
from kvsim.scenario import Scenario
from kvsim.scenario_file import load_scenario
from kvsim.specs.engine import EngineSpec
from kvsim.specs.engine_options import DEFAULTS, NO_OVERLAP, OWN_NAMES, OWNERS


def test_existing_scenarios_are_vllm_with_its_defaults():
    assert EngineSpec() == EngineSpec(kind="vllm", max_num_seqs=256, max_num_batched_tokens=8192, block_size=16)


@pytest.mark.parametrize("kind", OWN_NAMES)
def test_an_engine_s_own_name_is_the_shared_option(kind):
    values = {"block_size": 16, "enable_prefix_caching": False}
    for own, shared in OWN_NAMES[kind].items():
        value = values.get(shared, 64)
        engine = EngineSpec(**{"kind": kind, own: value})
        assert getattr(engine, shared) == value
        with pytest.raises(ValidationError, match=f"{own} and {shared} are two names"):
            EngineSpec(**{"kind": kind, own: value, shared: value})
        with pytest.raises(
            ValidationError, match=rf"{own} is {kind}'s name, and engine.kind is vllm; there it is {shared}"
        ):
            EngineSpec(**{own: value})


def test_own_names_work_on_the_command_line_and_in_sweeps(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: llama-3.1-8b\ndevice: h100-sxm\nworkload: chat\nengine: {kind: sglang}\n")
    engine = load_scenario(path, ("engine.max_running_requests=12", "engine.disable_overlap_schedule=true")).engine
    assert (engine.max_num_seqs, engine.async_scheduling) == (12, False)
    with pytest.raises(
        InvalidSpec, match=r"max_batch_size is tensorrt_llm's name, .* there it is max_running_requests"
    ):
        load_scenario(path, ("engine.max_batch_size=12",))


@pytest.mark.parametrize("kind", ["vllm", *DEFAULTS])
def test_specs_survive_a_round_trip(kind):
    engine = EngineSpec(kind=kind)
    assert EngineSpec.model_validate_json(engine.model_dump_json()) == engine
    for name, value in DEFAULTS.get(kind, {}).items():
        assert getattr(engine, name) == value


CHANGED = {
    "scheduling_policy": "priority", "long_prefill_token_threshold": 5, "kv_offloading_size": "1 GiB",
    "kv_tiers": ({"kind": "host", "size": "1 GiB"},), "compression_stream": "side", "max_prefill_tokens": 5,
    "enable_mixed_chunk": True, "schedule_conservativeness": 0.5, "schedule_policy": "lpm",
    "capacity_scheduler_policy": "max_utilization", "scheduler_recv_interval": 5,
    "batch_wait_timeout_iters": 5, "batch_wait_max_tokens_ratio": 0.5, "n_ubatch": 5,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "acceptance_rate": 0.5},
    "gpu_memory_utilization": 0.5, "num_gpu_blocks_override": 5, "kv_cache_memory_bytes": "1 GiB",
    "cuda_graph_memory_bytes": "1 GiB", "version": "0.15.1", "mem_fraction_static": 0.5,
    "free_gpu_memory_fraction": 0.5, "ctx_size": 4096,
}  # fmt: skip


@pytest.mark.parametrize("option", OWNERS)
def test_another_engine_s_option_is_refused(option):
    for kind in ("vllm", *DEFAULTS):
        if kind in OWNERS[option]:
            assert EngineSpec(**{"kind": kind, option: CHANGED[option]})
        else:
            with pytest.raises(ValidationError, match=f"{option} is an option of .*engine.kind is {kind}"):
                EngineSpec(**{"kind": kind, option: CHANGED[option]})


@pytest.mark.parametrize(("kind", "name"), NO_OVERLAP.items())
def test_overlap_has_the_engines_names(kind, name):
    assert EngineSpec(kind=kind).schedules_ahead
    assert not EngineSpec(**{"kind": kind, name: True}).schedules_ahead
    with pytest.raises(ValidationError, match=f"{name} is {kind}'s name, and engine.kind is vllm"):
        EngineSpec(**{name: True})
    with pytest.raises(ValidationError, match=f"{name} must be true or false and stand alone"):
        EngineSpec(**{"kind": kind, name: True, "async_scheduling": False})


def test_sglang_without_chunking_is_bounded_by_max_prefill_tokens():
    engine = EngineSpec(kind="sglang", chunked_prefill_size=-1, max_prefill_tokens=5000)
    assert (engine.enable_chunked_prefill, engine.max_num_batched_tokens) == (False, 5000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size 1 is SGLang's page size"),
        ({"kind": "llamacpp", "ctx_size": 3, "parallel": 4}, "leaves no token for each of"),
        (
            {"kind": "tensorrt_llm", "max_num_tokens": 16, "enable_chunked_prefill": True, "max_batch_size": 4},
            "max_num_tokens 16 is less than tokens_per_block 32",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        EngineSpec(**options)


@pytest.mark.parametrize(("parallel", "longest"), [(1, 8192), (4, 2048)])
def test_llamacpp_divides_its_context_among_slots(parallel, longest):
    engine = EngineSpec(kind="llamacpp", ctx_size=8192, parallel=parallel)
    scenario = Scenario(model="llama-3.2-1b", device="apple-m4-max", workload="phone-assistant", engine=engine)
    assert prepare(scenario).max_model_len == longest
