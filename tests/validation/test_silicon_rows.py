"""Rules by which a row of the silicon sample becomes a server and a load."""

from __future__ import annotations

import pytest
from made_up_data import SILICON, write_csv

from kvsim.validation import engine_rows, engine_tables
from kvsim.validation.silicon_rows import engine_of, harness_of, range_ratio, recipe_of, stated_clients
from kvsim.validation.suite import Options
from kvsim.validation.tables import read_rows

INFERENCEX = (
    "source_file=2026-04-06.csv; model=Llama-3.1-70B; silicon_concurrency=16; measured=2025-10-29T00:00:00.000Z"
)
OWN = "source_file=/home/me/aic-auto-gap-analysis/data/h100_sxm/vllm/0.12.0/Qwen_Qwen3-32B.csv; silicon_concurrency=16"


@pytest.fixture
def row(tmp_path):
    def made(**change):
        return read_rows(write_csv(tmp_path / "silicon.csv", [SILICON | change]), ())[0]

    return made


def test_lengths_are_those_of_the_harness(row):
    assert (harness_of(row(silicon_data_source=INFERENCEX)), range_ratio(row(silicon_data_source=INFERENCEX))) == (
        "InferenceX", 0.8,
    )  # fmt: skip
    assert (harness_of(row(silicon_data_source=OWN)), range_ratio(row(silicon_data_source=OWN))) == (
        "aiconfigurator", 1.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "batch", "clients"),
    [
        ("silicon_concurrency=16", "16", 16),
        ("silicon_concurrency=16", "", 16),
        # 32 equal servers behind one door.
        ("silicon_concurrency=416", "13", 13),
        # A search's plan is no load.
        ("gtl_job_id=23364591", "32", None),
    ],
)
def test_clients_of_one_server(row, source, batch, clients):
    assert stated_clients(row(silicon_data_source=source, batch_size=batch)) == clients


LLAMA = {"model_path": "meta-llama/Llama-3.1-70B", "precision": "fp8", "isl": "1024", "osl": "1024", "tp_size": "4"}


@pytest.mark.parametrize(
    ("change", "kind", "kv", "budget", "collectives"),
    [
        (LLAMA | {"backend": "vllm", "system": "b200_sxm"}, "vllm", "fp8", 8192, "trtllm"),
        (LLAMA | {"backend": "vllm", "system": "h100_sxm"}, "vllm", "native", 8192, None),
        (LLAMA | {"backend": "trtllm", "system": "b200_sxm"}, "tensorrt_llm", "fp8", 16384, None),
        ({"backend": "trtllm", "model_path": "openai/gpt-oss-120b"}, "tensorrt_llm", "fp8", 20000, None),
        ({"backend": "trtllm", "model_path": "deepseek-ai/DeepSeek-R1"}, "tensorrt_llm", "fp8", 1152, None),
        ({"backend": "sglang", "model_path": "deepseek-ai/DeepSeek-R1"}, "sglang", "fp8", 16384, None),
        ({"backend": "vllm", "model_path": "someone/else"}, "vllm", "native", 8192, None),
    ],
)
def test_servers_of_inferencex(row, change, kind, kv, budget, collectives):
    found = row(silicon_data_source=INFERENCEX, **change)
    recipe, engine = recipe_of(found), engine_of(found, 16)
    assert (recipe.kv, recipe.collectives) == (kv, collectives)
    assert (engine.kind, engine.max_num_batched_tokens) == (kind, budget)


@pytest.mark.parametrize(
    ("backend", "precision", "kv", "budget", "ahead"),
    [
        ("vllm", "", "native", 1024 + 16 + 1500, False),
        ("trtllm", "fp8", "fp8", 1024 + 16 + 1500, True),
        # Whole prompts up to SGLang's 16384 tokens, the host waiting for the device in every step.
        ("sglang", "", "native", 16384, False),
    ],
)
def test_servers_of_aiconfigurators_runs(row, backend, precision, kv, budget, ahead):
    found = row(silicon_data_source=OWN, backend=backend, precision=precision, isl="1024")
    engine = engine_of(found, 16)
    assert recipe_of(found).kv == kv
    assert (engine.max_num_batched_tokens, engine.schedules_ahead) == (budget, ahead)


@pytest.mark.parametrize(
    ("change", "iters"),
    [
        ({}, 20),
        ({"tp_size": "8"}, 0),
        ({"osl": "8192"}, 0),
        ({"model_path": "deepseek-ai/DeepSeek-R1"}, 0),
        ({"silicon_data_source": OWN}, 0),
    ],
)
def test_tensorrt_llm_waits_for_company_where_inferencex_asked_for_it(row, change, iters):
    found = row(**{"silicon_data_source": INFERENCEX, "backend": "trtllm", "system": "b200_sxm"} | LLAMA | change)
    assert engine_of(found, 16).batch_wait_timeout_iters == iters


@pytest.mark.parametrize(("clients", "interval"), [(8, 10), (16, 30)])
def test_sglang_looks_rarely_where_inferencex_asked_for_it(row, clients, interval):
    change = {"backend": "sglang", "model_path": "deepseek-ai/DeepSeek-R1"}
    assert engine_of(row(silicon_data_source=INFERENCEX, **change), clients).scheduler_recv_interval == interval
    assert engine_of(row(silicon_data_source=OWN, **change), clients).scheduler_recv_interval == 1


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({"backend": "trtllm", "system": "b200_sxm"}, True),
        ({"backend": "vllm", "system": "b200_sxm"}, True),
        ({"backend": "vllm", "system": "h100_sxm"}, False),
        # TensorRT-LLM's Qwen3 has no fused norm (modeling_qwen3.py).
        (
            {"backend": "trtllm", "system": "h100_sxm", "model_path": "Qwen/Qwen3-32B", "silicon_data_source": OWN},
            False,
        ),
    ],
)
def test_who_quantises_inputs_beside_other_work(row, change, fused):
    found = row(**{"silicon_data_source": INFERENCEX} | LLAMA | change)
    assert engine_of(found, 16).fused_input_quantization is fused


def test_a_step_has_a_token_and_a_seat_for_every_client(row):
    engine = engine_of(row(silicon_data_source=OWN, backend="vllm", isl="1024"), 9000)
    assert engine.max_num_batched_tokens >= 9000
    assert engine.max_num_seqs == 9000


def test_rows_run_their_own_engines_kernels(row):
    for backend in ("vllm", "sglang", "trtllm"):
        case = engine_rows._silicon(row(backend=backend), Options())
        assert case.setup.framework == backend


@pytest.mark.parametrize(
    ("source", "backend", "greedy"),
    [(INFERENCEX, "vllm", True), (OWN, "vllm", False), (OWN, "trtllm", True), (OWN, "sglang", False)],
)
def test_requests_that_state_no_temperature_are_sampled_as_the_server_does(row, source, backend, greedy):
    case = engine_rows._silicon(row(silicon_data_source=source, backend=backend), Options())
    assert case.setup.greedy is greedy


def test_vllm_before_0_14_schedules_synchronously_unless_asked(row):
    own = engine_rows._silicon(row(silicon_data_source=OWN, backend="vllm"), Options()).setup.engine
    asked = engine_rows._silicon(row(silicon_data_source=INFERENCEX, backend="vllm"), Options()).setup.engine
    assert (own.schedules_ahead, asked.schedules_ahead) == (False, True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tp_size": "4", "moe_ep_size": "4", "moe_tp_size": "1"}, True),
        ({"tp_size": "4", "moe_ep_size": "1", "moe_tp_size": "4"}, False),
        ({"tp_size": "16", "moe_ep_size": "4", "moe_tp_size": "4"}, engine_rows.EXPERT_PARALLEL),
        ({"tp_size": "4", "moe_ep_size": "16", "attention_dp_size": "4"}, engine_rows.DATA_PARALLEL),
    ],
)
def test_experts_lie_whole_on_the_ranks_of_a_tensor_parallel_group_or_the_row_is_left_out(row, change, expected):
    case = engine_rows._silicon(row(silicon_data_source=INFERENCEX, **change), Options())
    assert (case if isinstance(case, str) else case.setup.expert_parallel) == expected


def test_a_repeated_measurement_counts_once(run, tmp_path):
    other = SILICON | {"silicon_ttft_ms": 151.0}
    found = run("engine-tables", write_csv(tmp_path / "silicon.csv", [SILICON, other, SILICON | {"tp_size": 4}]))
    assert found.rows == 2
    assert {one.reason: one.count for one in found.skipped} == {engine_tables.REPEATED: 1}


@pytest.mark.parametrize(
    ("change", "in_scope"),
    [
        ({}, True),
        ({"backend": "sglang", "system": "b200_sxm"}, True),
        ({"system": "a100_sxm"}, False),
        ({"model_path": "openai/gpt-oss-120b", "precision": "fp4", "tp_size": 2}, False),
    ],
)
def test_targets_are_for_dense_models_on_h100_and_b200(run, tmp_path, change, in_scope):
    found = run("engine-tables", write_csv(tmp_path / "silicon.csv", [SILICON | change]))
    assert found.rows == 1
    assert (f"scope={engine_tables.SCOPE}" in found.groups) is in_scope
