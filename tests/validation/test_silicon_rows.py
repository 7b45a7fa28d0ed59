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


@pytest.mark.parametrize(
    ("change", "kv", "budget", "collectives"),
    [
        ({"backend": "vllm", "model_path": "meta-llama/Llama-3.1-70B", "system": "b200_sxm"}, "fp8", 8192, "trtllm"),
        ({"backend": "vllm", "model_path": "meta-llama/Llama-3.1-70B", "system": "h100_sxm"}, "native", 8192, None),
        ({"backend": "trtllm", "model_path": "meta-llama/Llama-3.1-70B", "system": "b200_sxm"}, "fp8", 16384, None),
        ({"backend": "trtllm", "model_path": "openai/gpt-oss-120b", "system": "b200_sxm"}, "fp8", 20000, None),
        ({"backend": "trtllm", "model_path": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm"}, "fp8", 1152, None),
        ({"backend": "vllm", "model_path": "someone/else", "system": "h100_sxm"}, "native", 8192, None),
    ],
)
def test_servers_of_inferencex(row, change, kv, budget, collectives):
    recipe = recipe_of(row(silicon_data_source=INFERENCEX, **change))
    assert (recipe.kv, recipe.collectives) == (kv, collectives)
    assert engine_of(recipe, 1024, 16).max_num_batched_tokens == budget


@pytest.mark.parametrize(
    ("backend", "precision", "kv", "budget"),
    [("vllm", "", "native", 1024 + 16 + 1500), ("trtllm", "fp8", "fp8", 1024 + 16 + 1500)],
)
def test_servers_of_aiconfigurators_runs(row, backend, precision, kv, budget):
    recipe = recipe_of(row(silicon_data_source=OWN, backend=backend, precision=precision))
    engine = engine_of(recipe, 1024, 16)
    assert (recipe.kv, engine.max_num_batched_tokens) == (kv, budget)


def test_a_step_has_a_token_for_every_client(row):
    recipe = recipe_of(row(silicon_data_source=INFERENCEX, backend="vllm"))
    assert engine_of(recipe, 1024, 9000).max_num_batched_tokens == 9000
    assert engine_of(recipe, 1024, 9000).max_num_seqs == 9000


def test_rows_run_their_own_engines_kernels(row):
    for backend in ("vllm", "sglang", "trtllm"):
        case = engine_rows._silicon(row(backend=backend), Options())
        assert case.setup.framework == backend


@pytest.mark.parametrize(
    ("source", "backend", "greedy"),
    [(INFERENCEX, "vllm", True), (OWN, "vllm", False), (OWN, "trtllm", True), (OWN, "sglang", True)],
)
def test_requests_that_state_no_temperature_are_sampled_as_the_server_does(row, source, backend, greedy):
    case = engine_rows._silicon(row(silicon_data_source=source, backend=backend), Options())
    assert case.setup.greedy is greedy


def test_vllm_before_0_14_schedules_synchronously_unless_asked(row):
    own = engine_rows._silicon(row(silicon_data_source=OWN, backend="vllm"), Options()).setup.engine
    asked = engine_rows._silicon(row(silicon_data_source=INFERENCEX, backend="vllm"), Options()).setup.engine
    assert (own.schedules_ahead, asked.schedules_ahead) == (False, True)


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
