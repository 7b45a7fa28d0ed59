"""Scores, the JSON of a result, and what all suites say to wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_data import APPLE, KV_QUANT, RUN, SILICON, write_csv, write_json
from typer.testing import CliRunner

from kvsim.cli import build_app
from kvsim.errors import InvalidSpec, KvsimError, UnknownName
from kvsim.validation import SUITES, load_suite, run_suite
from kvsim.validation.deployments import find_device, find_preset
from kvsim.validation.pool import in_processes
from kvsim.validation.report import result_document, result_table
from kvsim.validation.suite import Samples, Tally, score, score_by_metric

LATENCIES = tuple(f"{what}_{how}" for what in ("ttft", "tpot", "itl", "e2e") for how in ("mean", "p90", "p99"))
METRICS = {
    "kernel-timings": ("decode_attention", "prefill_attention", "gemm", "mla", "all_reduce"),
    "vllm-serving": (*LATENCIES, "kv_blocks"),
    "vllm-requests": (*LATENCIES, "kv_blocks"),
    "engine-tables": ("ttft", "tpot", "output_tok_s"),
    "kv-quant": ("ratio", "direction"),
    "edge": ("decode_tok_s", "prefill_tok_s"),
}
"""Names that others read from the JSON."""


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_the_agreed_metrics(name):
    suite = load_suite(name)
    assert (suite.name, suite.metrics) == (name, METRICS[name])


def test_unknown_suite_is_named_with_a_suggestion():
    with pytest.raises(UnknownName, match=r"unknown suite 'edges'; did you mean 'edge'"):
        load_suite("edges")


def test_score_by_hand():
    found = score(np.array([1.0, 2.0, 4.0]), np.array([1.1, 1.8, 4.0]))
    assert found.n == 3
    assert found.median_ape == pytest.approx(0.1)
    assert found.p90_ape == pytest.approx(0.1)
    assert found.bias == pytest.approx(0.0)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(0.1, 10.0))
def test_a_constant_factor_is_all_error_and_all_bias(measured, factor):
    values = np.array(measured)
    found = score(values, values * factor)
    assert found.median_ape == pytest.approx(abs(factor - 1), abs=1e-9)
    assert found.bias == pytest.approx(factor - 1, abs=1e-9)


def test_direction_counts_the_side_of_one():
    ratios = Samples("direction", np.array([1.2, 0.9, 1.5, 0.8]), np.array([1.01, 0.5, 0.9, 0.99]))
    assert score_by_metric([ratios], ("ratio", "direction"))["direction"].correct == 0.75


def test_skipped_rows_add_up_by_reason_in_order_of_name():
    tally = Tally()
    tally.skip("b", 2)
    tally.skip("a")
    tally.skip("b", 3)
    tally.skip("c", 0)
    found = tally.result(load_suite("edge"))
    assert [(one.reason, one.count) for one in found.skipped] == [("a", 1), ("b", 5)]
    assert (found.rows, found.overall, found.groups) == (0, {}, {})


def test_json_of_a_result(run, tmp_path):
    document = result_document(run("edge", write_csv(tmp_path / "apple.csv", [APPLE])))
    assert set(document) == {"suite", "rows", "skipped", "groups", "overall", "notes"}
    assert (document["suite"], document["rows"]) == ("edge", 1)
    assert document["skipped"] == [{"reason": "no figure in the row", "count": 2}]
    assert set(document["overall"]) == {"decode_tok_s", "prefill_tok_s"}
    assert set(document["overall"]["decode_tok_s"]) == {"n", "median_ape", "p90_ape", "bias"}
    assert document["groups"]["device=apple-m2-pro"] == document["overall"]
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_direction_has_its_share_in_the_json(run, tmp_path):
    rows = [KV_QUANT, KV_QUANT | {"kv_scheme": "fp8", "value": 120.0}]
    found = result_document(run("kv-quant", write_csv(tmp_path / "kv.csv", rows)))["overall"]["direction"]
    assert set(found) == {"n", "median_ape", "p90_ape", "bias", "correct"}
    assert (found["n"], found["median_ape"], found["p90_ape"], found["bias"]) == (1, None, None, None)
    assert found["correct"] in (0.0, 1.0)


def test_table_shows_every_score(run, tmp_path):
    found = run("edge", write_csv(tmp_path / "apple.csv", [APPLE]))
    assert result_table(found).row_count == len(found.overall) + sum(len(scores) for scores in found.groups.values())


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "kernel-timings"])
def test_a_path_that_is_not_there(run, suite, tmp_path):
    with pytest.raises(InvalidSpec, match="no such file or folder"):
        run(suite, tmp_path / "absent")


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "kernel-timings"])
def test_a_folder_of_something_else(run, suite, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InvalidSpec, match=f"holds nothing for {suite}"):
        run(suite, tmp_path)


@pytest.mark.parametrize("suite", ["engine-tables", "kv-quant", "edge"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a,b\n1,2\n", "table of|is missing"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_csv_file_that_is_none_of_the_suite(run, suite, text, message, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidSpec, match=message):
        run(suite, path)


@pytest.mark.parametrize(
    ("suite", "row", "column"),
    [
        ("engine-tables", SILICON, "precision"),
        ("kv-quant", KV_QUANT, "workload"),
        ("edge", APPLE, "q8_0_tg128"),
    ],
)
def test_a_missing_column_is_named(run, suite, row, column, tmp_path):
    path = write_csv(tmp_path / "table.csv", [{name: value for name, value in row.items() if name != column}])
    with pytest.raises(InvalidSpec, match=rf"table.csv: column '{column}' is missing"):
        run(suite, path)


@pytest.mark.parametrize(("suite", "row"), [("engine-tables", SILICON), ("kv-quant", KV_QUANT), ("edge", APPLE)])
def test_a_table_without_rows(run, suite, row, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(",".join(row) + "\n")
    with pytest.raises(InvalidSpec, match="the table has no rows"):
        run(suite, path)


def test_unknown_device_as_unseen(run, tmp_path):
    with pytest.raises(UnknownName, match="unknown device 'h1000'"):
        run("edge", write_csv(tmp_path / "apple.csv", [APPLE]), as_unseen="h1000")


def test_unknown_calibration_set(tmp_path):
    from kvsim.validation import Options

    with pytest.raises(KvsimError, match="nosuchset"):
        run_suite("kernel-timings", tmp_path, Options(calibration="nosuchset"))


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("nvidia/Qwen3-32B-NVFP4", "qwen3-32b"),
        ("Llama-3.3-70B-Instruct", "llama-3.3-70b"),
        ("LLaMA-v3.1-8B", "llama-3.1-8b"),
        ("Qwen3.5-35B-A3B-FP8", "qwen3.5-35b-a3b"),
        ("Mixtral-8x7B", "mixtral-8x7b"),
        ("Llama2-7B", "llama-2-7b"),
        ("Qwen2.5-Coder-7B", "qwen2.5-7b"),
        ("Qwen3.8-27B", None),
        ("not stated", None),
        ("", None),
    ],
)
def test_models_of_tables(name, preset):
    assert find_preset(name) == preset


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA GB10 (DGX Spark, 273 GB/s LPDDR5X)", "gb10"),
        ("DGX Spark (GB10)", "gb10"),
        ("RTX PRO 6000 Server TP2", "rtx-pro-6000"),
        ("Strix Halo 395 (8060S)", "strix-halo"),
        ("b200_sxm", "b200-sxm"),
        ("apple-M9 Pro", None),
        ("RTX 5070 Ti", None),
        ("", None),
    ],
)
def test_devices_of_tables(name, device):
    assert find_device(name) == device


def _double(value: int) -> int:
    return 2 * value


def test_work_in_processes_keeps_its_order():
    shares: list[float] = []
    assert in_processes(_double, list(range(7)), 2, shares.append) == [0, 2, 4, 6, 8, 10, 12]
    assert shares[-1] == 1.0


# --- command line ----------------------------------------------------------------------------------------------------


def invoke(*arguments: str):
    return CliRunner().invoke(build_app(), ["validate", *arguments])


def test_command_prints_json_alone_on_stdout(tmp_path):
    path = write_csv(tmp_path / "apple.csv", [APPLE])
    found = invoke("edge", "--data", str(path), "--json", "--calibration", "datasheet")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["suite"] == "edge"
    assert "skipped 2: no figure in the row" in found.stderr


def test_command_prints_a_table(tmp_path):
    path = write_csv(tmp_path / "apple.csv", [APPLE])
    found = invoke("edge", "--data", str(path), "--calibration", "datasheet")
    assert "decode_tok_s" in found.stdout
    assert "device=apple-m2-pro" in found.stdout


def test_command_is_deterministic(tmp_path):
    path = write_json(tmp_path / "experiments.json", [RUN])
    first, second = (invoke("vllm-serving", "--data", str(path), "--json", "--calibration", "datasheet") for _ in "ab")
    assert first.exit_code == 0, first.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edges",), "unknown suite 'edges'"),
        (("edge", "--data", "/nowhere"), "no such file or folder"),
        (("kernel-timings", "--calibration", "nosuchset", "--data", "."), "unknown calibration set"),
    ],
)
def test_command_ends_with_status_2_and_one_line(arguments, message):
    found = invoke(*arguments)
    assert found.exit_code == 2
    assert message in found.stderr
    assert found.stdout == ""
