"""``kvsim plan`` as a person calls it."""

from __future__ import annotations

import json

import polars as pl
import pytest

QUICK = (
    "plan", "--model", "llama-3.1-8b", "--device", "h100-sxm,mi300x", "--workload", "chat", "--max-concurrency", "32",
    "--num-prompts", "120", "-s", "native,fp8,knorm:0.9", "--max-devices", "2", "--simulate", "2",
    "--set", "search.max_num_seqs=[64]", "--set", "search.max_num_batched_tokens=[8192]",
)  # fmt: skip


def test_the_table_says_what_decides_and_how_to_run_it(invoke):
    result = invoke(*QUICK, "--floor", "retrieval=0.5", "--slo", "tpot:100")
    assert result.exit_code == 0, result.stderr
    for words in ("P99 TTFT", "h100-sxm: NVIDIA", "limit and", "runs today:", "$ vllm serve meta-llama/", "crossover:",
                  "against ", "published: long-context retrieval"):  # fmt: skip
        assert words in result.stdout
    assert "neither stands for the other" in result.stderr


def test_json_markdown_and_files_hold_the_same_points(invoke, tmp_path):
    answer = json.loads(invoke(*QUICK, "--json", "--out", tmp_path / "plan.parquet").stdout)
    frame = pl.read_parquet(tmp_path / "plan.parquet")
    assert frame["strategy"].to_list() == [point["strategy"] for point in answer["points"]]
    assert frame["estimated_output_throughput"].to_list() == [
        point["estimated"]["output_throughput"] for point in answer["points"]
    ]
    markdown = invoke(*QUICK, "--markdown", "--out", tmp_path / "plan.json").stdout
    assert json.loads((tmp_path / "plan.json").read_text()) == answer
    assert markdown.count("\n| P") == min(16, len(answer["points"]))
    assert invoke(*QUICK, "--out", tmp_path / "plan.csv").exit_code == 0
    assert invoke(*QUICK, "--out", tmp_path / "plan.md").exit_code == 0
    assert (tmp_path / "plan.md").read_text() == markdown


def test_a_file_says_the_same_as_flags(invoke, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "model: llama-3.1-8b\ndevices: [h100-sxm]\nworkload: chat\nsimulate: 0\nfloors: {retrieval: 0.9}\n"
        "slo: {tpot_s: 50 ms}\nbudget: {usd_per_hour: 10 USD/h}\nsearch: {strategies: [native, fp8], max_devices: 2}\n"
    )
    by_file = json.loads(invoke("plan", path, "--json").stdout)
    by_flags = json.loads(
        invoke("plan", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--simulate", "0",
               "--floor", "retrieval=0.9", "--slo", "tpot:50", "--budget-usd-per-hour", "10", "-s", "native,fp8",
               "--max-devices", "2", "--json").stdout
    )  # fmt: skip
    assert by_file == by_flags


def test_a_layer_plan_takes_part_by_its_file(invoke, tmp_path):
    (tmp_path / "layers.yaml").write_text(
        "schema_version: 1\nname: halves\nsource: a test\ndepth: relative\nselections: ['knorm:0.9', 'knorm:0.5']\n"
    )
    (tmp_path / "plan.yaml").write_text(
        "model: llama-3.1-8b\ndevices: [h100-sxm]\nworkload: chat\nsimulate: 0\n"
        "search: {strategies: [native], also: [layers.yaml], max_devices: 1}\n"
    )
    by_file = json.loads(invoke("plan", tmp_path / "plan.yaml", "--json").stdout)
    assert by_file["request"]["search"]["also"] == ["layer_plan:relative[knorm:0.9;knorm]"]
    by_flag = invoke(*QUICK, "--also", f"{tmp_path / 'layers.yaml'}", "--json")
    assert "layer_plan:relative[knorm:0.9;knorm]" in by_flag.stdout
    missing = invoke(*QUICK, "--also", "nowhere.yaml")
    assert (missing.exit_code, "nowhere.yaml: cannot read" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("plan", "--device", "h100-sxm"), 2, "--model, --workload"),
        ((*QUICK, "--workload", "assistant"), 2, "did you mean 'phone-assistant'"),
        ((*QUICK, "--floor", "retreival=0.9"), 2, "did you mean 'retrieval'"),
        ((*QUICK, "--floor", "retrieval=98"), 2, "a share above 0 and at most 1"),
        ((*QUICK, "--slo", "ttf:5"), 2, "ttft, tpot, e2el"),
        ((*QUICK, "--unknown-quality", "maybe"), 2, "allow"),
        ((*QUICK, "--budget-device-memory", "80"), 2, "unit"),
        ((*QUICK, "--budget-usd-per-hour", "-3"), 2, "positive"),
        ((*QUICK, "--set", "search.max_seqs=3"), 2, "max_num_seqs"),
        ((*QUICK, "--set", "nonsense"), 2, "key=value"),
        ((*QUICK, "--request-rate", "3"), 2, "exclude each other"),
        ((*QUICK, "--json", "--markdown"), 2, "exclude each other"),
        ((*QUICK, "--out", "plan.txt"), 2, ".parquet"),
        ((*QUICK, "-s", "fp9"), 2, "fp8"),
        ((*QUICK, "--device", "h100-sxm,h100-sxm"), 2, "stands there twice"),
        ((*QUICK, "--budget-watts", "1"), 3, "watts"),
    ],
)
def test_errors_are_one_line_with_what_is_allowed(invoke, arguments, status, words):
    result = invoke(*arguments)
    assert result.exit_code == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr
