"""Reading vLLM logs (made up from the formats) and comparing them with the prediction."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_logs import SERVER_0_8, SERVER_0_15, SERVER_0_22
from typer.testing import CliRunner

from kvsim.cli import build_app
from kvsim.errors import InvalidSpec, KvsimError
from kvsim.log_check import check_log, log_scenario
from kvsim.scenario_file import build_scenario
from kvsim.vllm_log import VllmLog, parse_vllm_log

LOGS = {"0.15": SERVER_0_15, "0.8": SERVER_0_8, "0.22": SERVER_0_22}


def parse(text: str) -> VllmLog:
    return parse_vllm_log(text.splitlines(), "server.log")


def run(tmp_path: Path, text: str, *arguments: str) -> Any:
    path = tmp_path / "server.log"
    path.write_text(text, encoding="utf-8")
    return CliRunner().invoke(build_app(), ["check", "--vllm-log", str(path), *arguments])


def test_a_log_of_0_15_is_read_whole() -> None:
    log = parse(SERVER_0_15)
    assert log.version == "0.15.1"
    assert log.is_server
    assert log.sizes == {
        "weights_gib": 14.19, "kv_gib": 55.86, "kv_tokens": 1045888, "concurrency": 31.92, "graphs_gib": 0.55,
    }  # fmt: skip
    wanted = {
        "model": "Qwen/Qwen2.5-7B-Instruct", "max_num_seqs": 128, "max_num_batched_tokens": 1024,
        "gpu_memory_utilization": 0.9, "max_model_len": 32768, "tensor_parallel_size": 1, "dtype": "bfloat16",
        "kv_cache_dtype": "auto", "enable_prefix_caching": True, "enable_chunked_prefill": True,
        "async_scheduling": True,
    }  # fmt: skip
    assert {name: log.options[name] for name in wanted} == wanted


def test_of_several_ranks_the_least_room_counts() -> None:
    log = parse(SERVER_0_8)
    assert log.version == "0.8.1"
    assert log.sizes["kv_tokens"] == 332_688
    assert log.sizes["weights_gib"] == 32.037
    assert (log.options["tensor_parallel_size"], log.options["kv_cache_dtype"]) == (2, "auto")
    assert "block_size" not in log.options


def test_later_spellings_give_device_memory_activations_and_reserved_graphs() -> None:
    log = parse(SERVER_0_22)
    assert log.version == "0.22.0"
    assert log.reserves_graphs
    assert (log.sizes["total_gib"], log.sizes["activations_gib"], log.sizes["non_torch_gib"]) == (79.19, 1.40, 0.20)
    assert log.options["gpu_memory_utilization"] == 0.92


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("INFO 1-1 [x.py:1] # GPU blocks: 2588, # CPU blocks: 0", "blocks", 2588),
        ("INFO 1-1 [x.py:1] # cuda blocks: 12,588, # CPU blocks: 7", "blocks", 12588),
        ("INFO 1-1 [x.py:1] num_gpu_blocks is: 4096", "blocks", 4096),
        ("(Worker_TP1 pid=9) \x1b[36mINFO\x1b[0m Available KV cache memory: 6.87 GiB", "kv_gib", 6.87),
        ("(EngineCore_DP1 pid=9) INFO GPU KV cache size: 1,000 tokens, Maximum", "kv_tokens", 1000),
    ],
)
def test_single_lines(line: str, key: str, value: float) -> None:
    sizes = parse(line + "\nGPU KV cache size: 9,999,999 tokens").sizes
    assert sizes[key] == value


@pytest.mark.parametrize("name", LOGS)
def test_colours_and_prefixes_change_nothing(name: str) -> None:
    plain = parse(LOGS[name])
    dressed = "\n".join(f"\x1b[1;32m(Worker pid=7)\x1b[0m {line}\x1b[0m" for line in LOGS[name].splitlines())
    assert parse(dressed) == plain


def test_the_scenario_of_a_log() -> None:
    document, notes = log_scenario(parse(SERVER_0_22), "h100-sxm")
    assert document["compression"] == "fp8"
    assert document["engine"]["version"] == "0.22.0"
    assert document["engine"]["cuda_graph_memory_bytes"] == f"{round(0.36 * 2**30)} B"
    assert any("CUDA graphs are taken from the log" in note for note in notes)
    bare = re.sub(r"'max_num_seqs': \d+", "'port': 1", SERVER_0_22)
    document, notes = log_scenario(parse(bare), "h100-sxm")
    assert document["engine"]["max_num_seqs"] == 1024
    assert any("max_num_seqs" in note for note in notes)


@pytest.mark.parametrize("name", LOGS)
def test_a_log_made_by_the_rules_passes(name: str, tmp_path: Path) -> None:
    """The block counts of the 0.15 and 0.8 logs are those of runs 66 and 65; the 0.22 log's is made up to agree."""
    result = run(tmp_path, LOGS[name], "--device", "h100-sxm", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"]
    assert document["decisive"] == "KV blocks"
    blocks = next(figure for figure in document["figures"] if figure["name"] == "KV blocks")
    assert abs(blocks["error"]) <= 0.01


def test_a_log_that_differs_exits_with_3(tmp_path: Path) -> None:
    wrong = SERVER_0_15.replace("1,045,888", "1,245,888")
    result = run(tmp_path, wrong, "--device", "h100-sxm")
    assert result.exit_code == 3
    assert "KV blocks differ by -16.06%" in result.stderr
    assert "outside the tolerance of 1.00%" in result.stdout
    assert run(tmp_path, wrong, "--device", "h100-sxm", "--tolerance", "0.2").exit_code == 0


def test_a_scenario_of_ones_own_is_compared_and_differences_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model: qwen2.5-7b\ndevice: h100-sxm\nworkload: chat\n"
        "engine: {max_num_seqs: 64, max_num_batched_tokens: 1024, gpu_memory_utilization: 0.8}\n",
        encoding="utf-8",
    )
    result = run(tmp_path, SERVER_0_15, str(path))
    assert result.exit_code == 3
    assert "note: gpu_memory_utilization is 0.8 in the scenario and 0.9 in the log" in result.stderr
    assert run(tmp_path, SERVER_0_15, str(path), "--gpu-memory-utilization", "0.9").exit_code == 0


def test_a_scenario_of_another_model_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("{model: llama-3.1-8b, device: h100-sxm, workload: chat}")
    result = run(tmp_path, SERVER_0_15, str(path))
    assert "note: model is llama-3.1-8b in the scenario and Qwen/Qwen2.5-7B-Instruct in the log" in result.stderr
    assert "note: max_model_len is None in the scenario and 32768 in the log" in result.stderr
    path.write_text("{model: qwen2.5-7b, device: h100-sxm, workload: chat}")
    assert "note: model" not in run(tmp_path, SERVER_0_15, str(path)).stderr


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", ("--device", "h100-sxm"), "no line says how large the KV cache is"),
        ("\x00\xff binary", ("--device", "h100-sxm"), "give the log of a vLLM server"),
        (SERVER_0_15, (), "no line names the device; give --device"),
        ("GPU KV cache size: 1,024 tokens", ("--device", "h100-sxm"), "no line names the model"),
        (
            SERVER_0_8.replace("kv_cache_dtype='auto'", "kv_cache_dtype='int3'"), ("--device", "h100-sxm"),
            "kv_cache_dtype 'int3' has no strategy here",
        ),
        (
            SERVER_0_8.replace("max_num_seqs=128", "max_num_seqs=1.5"), ("--device", "h100-sxm"),
            "max_num_seqs is 1.5, which is not a whole number",
        ),
        (
            SERVER_0_15.replace("pipeline_parallel_size=1", "pipeline_parallel_size=2"), ("--device", "h100-sxm"),
            "only tensor parallelism is compared",
        ),
        (SERVER_0_15, ("--device", "h1000"), "unknown device 'h1000'"),
    ],
)  # fmt: skip
def test_other_logs_are_refused_with_the_reason(
    text: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run(tmp_path, text, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(build_app(), ["check", "--vllm-log", str(tmp_path / "none.log")])
    assert result.exit_code == 2
    assert "none.log: cannot read" in result.stderr


LINES = [line for text in LOGS.values() for line in text.splitlines()]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(LINES),
            st.text(max_size=80),
            st.tuples(st.sampled_from(LINES), st.integers(0, 300), st.text(max_size=5)).map(
                lambda cut: cut[0][: cut[1]] + cut[2] + cut[0][cut[1] :]
            ),
            st.tuples(
                st.sampled_from(["GPU KV cache size: ", "# GPU blocks: ", "non-default args: {'max_num_seqs': "]),
                st.text("0123456789.,-e'}", max_size=40),
            ).map(lambda parts: f"{parts[0]}{parts[1]} tokens"),
        ),
        max_size=12,
    )
)
def test_no_log_crashes_the_reader(lines: list[str]) -> None:
    try:
        log = parse_vllm_log(lines, "x.log")
        document, notes = log_scenario(log, "h100-sxm", "qwen2.5-7b")
        check = check_log(log, build_scenario(document, [], "x.log"), tuple(notes))
    except KvsimError:
        return
    assert check.figures


def test_a_number_without_sense_is_left_out() -> None:
    with pytest.raises(InvalidSpec):
        parse_vllm_log(["GPU KV cache size: 1" + "0" * 400 + " tokens"], "x.log")
