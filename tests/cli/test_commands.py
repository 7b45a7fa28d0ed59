import json
import re

import polars as pl
import pytest

from kvsim.batch import read_metadata, schema
from kvsim.cli.compare import parse_strategies
from kvsim.errors import CalibrationError, InvariantViolation, UnknownName

BASE = ("--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat")


def test_json_is_the_report_and_nothing_else(invoke, fake_simulate, scenario_path):
    result = invoke("simulate", scenario_path, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["scenario"]["model"] == "llama-3.1-8b"
    assert "note: a note" in result.stderr
    assert re.search(r"simulated in [\d.]+ s", result.stderr)


@pytest.mark.parametrize("arguments", [("simulate",), ("simulate", "--json"), ("compare", "-s", "native,fp8")])
def test_stdout_is_the_same_for_the_same_input(invoke, fake_simulate, scenario_path, arguments):
    command, *options = arguments
    first, second = (invoke(command, scenario_path, *options) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert first.stdout == second.stdout
    assert first.stdout


def test_flags_build_a_scenario_without_a_file(invoke, fake_simulate):
    result = invoke(
        "estimate", *BASE, "--compression", "fp8", "--tensor-parallel-size", "2", "--max-num-seqs", "64",
        "--max-num-batched-tokens", "4096", "--gpu-memory-utilization", "0.8", "--block-size", "32",
        "--max-model-len", "8192", "--request-rate", "4", "--num-prompts", "50", "--seed", "7",
        "--goodput", "ttft:500", "tpot:50",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (scenario,) = fake_simulate.scenarios
    engine = scenario.engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.block_size) == (64, 4096, 32)
    assert (engine.gpu_memory_utilization, engine.max_model_len) == (0.8, 8192)
    assert (scenario.tensor_parallel_size, scenario.seed, scenario.compression.name) == (2, 7, "fp8")
    assert (scenario.workload.num_prompts, scenario.workload.arrivals.request_rate) == (50, 4.0)
    assert (scenario.slo.ttft_s, scenario.slo.tpot_s, scenario.slo.e2el_s) == (0.5, 0.05, None)


def test_flags_override_the_file_and_set_overrides_flags(invoke, fake_simulate, scenario_path):
    invoke("simulate", scenario_path, "--compression", "fp8", "--seed", "1", "--set", "seed=2")
    (scenario,) = fake_simulate.scenarios
    assert (scenario.compression.name, scenario.seed) == ("fp8", 2)
    assert fake_simulate.base_dir == scenario_path.parent


@pytest.mark.parametrize(
    ("options", "kind"),
    [(("--request-rate", "inf"), "burst"), (("--max-concurrency", "8"), "concurrency")],
)
def test_load_flags_choose_the_arrivals(invoke, fake_simulate, options, kind):
    invoke("simulate", *BASE, *options)
    assert fake_simulate.scenarios[0].workload.arrivals.kind == kind


def test_number_of_requests_of_a_trace_is_its_head(invoke, fake_simulate, scenario_path):
    scenario_path.write_text("model: m\ndevice: d\nworkload: {kind: trace, format: azure, path: t.csv}\n")
    result = invoke("simulate", scenario_path, "--num-prompts", "10")
    assert result.exit_code == 0, result.stderr
    assert fake_simulate.scenarios[0].workload.max_requests == 10


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("simulate", "--model", "m"), "give --device, --workload"),
        (("simulate", *BASE, "--goodput", "ttfb:3"), "'ttfb:3' is not NAME:MS"),
        (("simulate", *BASE, "--goodput", "ttft:nan"), "is not NAME:MS"),
        (("simulate", *BASE, "--request-rate", "1", "--max-concurrency", "1"), "exclude each other"),
        (("simulate", *BASE, "--request-rate", "-1"), "workload.arrivals.request_rate"),
        (("simulate", *BASE, "--set", "engine.max_num_seq=1"), "did you mean 'max_num_seqs'?"),
        (("simulate", *BASE, "--compression", "fpp8"), "unknown strategy 'fpp8'; did you mean 'fp8'"),
        (("simulate", *BASE, "--json", "--vllm-bench"), "exclude each other"),
        (("simulate", *BASE, "--out", "report.txt"), "must end in .json or .parquet or .csv"),
        (("simulate", *BASE, "--fail-on-slo"), "needs an SLO"),
        (("compare", *BASE, "-s", "native,fpp8"), "unknown strategy 'fpp8'"),
        (("compare", *BASE, "-s", ","), "no name given"),
        (("sweep", "nope.yaml", "-o", "out.parquet"), "nope.yaml: cannot read"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_error(invoke, fake_simulate, arguments, expected):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert fake_simulate.scenarios == []


def test_infeasible_is_status_3(invoke, fake_simulate, scenario_path):
    result = invoke("simulate", scenario_path, "--compression", "nvfp4")
    assert result.exit_code == 3
    assert result.stderr == "error: h100-sxm has no fp4\n"


def test_calibration_is_status_4(invoke, fake_simulate, scenario_path):
    fake_simulate.error = CalibrationError("measure first")
    assert invoke("simulate", scenario_path).exit_code == 4


def test_a_bug_keeps_its_traceback(invoke, fake_simulate, scenario_path):
    fake_simulate.error = InvariantViolation("tokens lost")
    result = invoke("simulate", scenario_path)
    assert isinstance(result.exception, InvariantViolation)


def test_interrupt_is_status_130(invoke, fake_simulate, scenario_path, tmp_path):
    fake_simulate.error = KeyboardInterrupt()
    result = invoke("simulate", scenario_path, "-o", tmp_path / "r.json")
    assert result.exit_code == 130
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize(("attainment", "status"), [(1.0, 0), (0.99, 0), (0.5, 3), (None, 3)])
def test_a_missed_slo_fails_only_on_request_and_after_the_report(
    invoke, fake_simulate, scenario_path, attainment, status
):
    fake_simulate.attainment = attainment
    arguments = ("simulate", scenario_path, "--goodput", "ttft:500", "--json")
    assert invoke(*arguments).exit_code == 0
    result = invoke(*arguments, "--fail-on-slo")
    assert result.exit_code == status
    assert json.loads(result.stdout)


def test_report_files(invoke, fake_simulate, scenario_path, tmp_path):
    for name in ("r.json", "r.parquet", "r.csv"):
        assert invoke("simulate", scenario_path, "--out", tmp_path / "new" / name).exit_code == 0
    report = json.loads((tmp_path / "new" / "r.json").read_text())
    row = pl.read_parquet(tmp_path / "new" / "r.parquet").row(0, named=True)
    assert row["kv_fold"] == report["kv"]["fold"]
    assert row["scenario_sha256"] == report["provenance"]["scenario_sha256"]


def test_vllm_bench_output(invoke, fake_simulate, scenario_path):
    result = json.loads(invoke("simulate", scenario_path, "--vllm-bench").stdout)
    assert result["mean_ttft_ms"] == pytest.approx(105.0)


def test_compare_writes_all_its_files_and_lists_what_cannot_run(invoke, fake_simulate, scenario_path, tmp_path):
    out, page = tmp_path / "c.parquet", tmp_path / "c.html"
    result = invoke("compare", scenario_path, "-s", "native,fp8,nvfp4", "-o", out, "--html", page)
    assert result.exit_code == 0
    assert "nvfp4 cannot run: h100-sxm has no fp4" in result.stdout
    frame = pl.read_parquet(out)
    assert frame.schema == pl.Schema(schema())
    assert frame["status"].to_list() == ["ok", "ok", "infeasible"]
    assert frame["strategy"].to_list() == ["native", "fp8", "nvfp4"]
    assert read_metadata(out)["kvsim.schema_version"] == "1"
    assert "<svg" in page.read_text()


def test_compare_json_and_markdown(invoke, fake_simulate, scenario_path):
    rows = json.loads(invoke("compare", scenario_path, "-s", "native,nvfp4", "--json").stdout)
    assert [(row["strategy"], row["report"] is None) for row in rows] == [("native", False), ("nvfp4", True)]
    table = invoke("compare", scenario_path, "-s", "native", "--markdown").stdout
    assert table.startswith("| Strategy | KV fold [x] |")


def test_compare_is_infeasible_where_nothing_can_run(invoke, fake_simulate, scenario_path):
    result = invoke("compare", scenario_path, "-s", "nvfp4")
    assert result.exit_code == 3
    assert "none of the 1 strategies can run" in result.stderr


def test_strategies_split_outside_parentheses():
    assert parse_strategies("native, fp8,kivi-2(residual_length=64),fp8") == (
        "native", "fp8", "kivi-2(residual_length=64)",
    )  # fmt: skip
    assert len(parse_strategies("all")) > 10
    with pytest.raises(UnknownName):
        parse_strategies("native,nonsense-press")


def test_sweep_counts_rows_by_status(invoke, fake_simulate, scenario_path, tmp_path):
    plan = tmp_path / "sweep.yaml"
    plan.write_text("base: s.yaml\ngrid: {compression: [native, nvfp4, fp8]}\n")
    out = tmp_path / "out.parquet"
    result = invoke("sweep", plan, "-o", out, "--workers", "1")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"ok": 2, "infeasible": 1, "error": 0, "out": str(out)}
    assert "InfeasibleScenario: h100-sxm has no fp4" in result.stderr
    assert pl.read_parquet(out)["status"].to_list() == ["ok", "infeasible", "ok"]


@pytest.mark.parametrize(
    ("grid", "error", "status"),
    [
        ("{compression: [nvfp4]}", None, 3),
        ("{engine.max_num_seqs: [-1]}", None, 2),
        ("{seed: [1]}", ZeroDivisionError("division by zero"), 1),
    ],
)
def test_sweep_status_where_no_point_could_run(invoke, fake_simulate, scenario_path, tmp_path, grid, error, status):
    fake_simulate.error = error
    plan = tmp_path / "sweep.yaml"
    plan.write_text(f"base: s.yaml\ngrid: {grid}\n")
    result = invoke("sweep", plan, "-o", tmp_path / "out.csv", "--workers", "1")
    assert result.exit_code == status
    assert (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("what", ["models", "devices", "strategies", "workloads"])
def test_lists(invoke, what):
    entries = json.loads(invoke("list", what, "--json").stdout)
    assert len(entries) >= 8
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    shown = invoke("list", what).stdout
    assert all(name in shown for name in names)


def test_version(invoke):
    assert invoke("--version").stdout.startswith("kvsim 0.")
