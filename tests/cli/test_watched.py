"""``simulate --trace-out --metrics-out``: files whole or not at all, and the report as without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from typer.testing import CliRunner

from kvsim.cli import build_app

SCENARIO = ("--model", "llama-3.2-1b", "--device", "l4", "--workload", "chat", "--num-prompts", "20")
QUICK = (*SCENARIO, "--set", "bands=false")


def simulate(*arguments: str) -> Any:
    return CliRunner().invoke(build_app(), ["simulate", *QUICK, *arguments])


def test_both_files_are_written_and_the_report_is_the_same(tmp_path: Path) -> None:
    trace, metrics = tmp_path / "deep" / "trace.json", tmp_path / "metrics.txt"
    plain = simulate("--json")
    watched = simulate("--json", "--trace-out", str(trace), "--metrics-out", str(metrics))
    assert watched.exit_code == 0, watched.output
    assert watched.stdout == plain.stdout
    document = json.loads(trace.read_text())
    assert document["otherData"]["title"] == "llama-3.2-1b"
    lives = {event["id"] for event in document["traceEvents"] if event["ph"] == "b"}
    assert len(lives) == 20
    families = {family.name for family in text_string_to_metric_families(metrics.read_text())}
    assert {"kvsim_num_requests_running", "kvsim_time_to_first_token_seconds", "kvsim_prompt_tokens"} <= families


def test_bands_do_not_enter_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    assert simulate("--trace-out", str(trace)).exit_code == 0
    once = trace.read_bytes()
    banded = CliRunner().invoke(build_app(), ["simulate", *SCENARIO, "--trace-out", str(trace)])
    assert banded.exit_code == 0
    assert trace.read_bytes() == once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace-out", "trace.txt"), "the name must end in .json"),
        (("--metrics-out", "metrics.json"), "the name must end in .txt or .prom"),
        (("--trace-out", "."), "the name must end in .json"),
        (("--trace-out", "x.json", "--out", "x.json"), "--trace-out and --out name the same file"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_the_run(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = simulate(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "trace.json").mkdir()
    result = simulate("--trace-out", str(tmp_path / "trace.json"))
    assert result.exit_code == 2
    assert "is a folder" in result.stderr
