import json
from pathlib import Path

import polars as pl
import pytest

from kvsim import workers
from kvsim.batch import SweepSpec, schema, sweep
from kvsim.batch import run as run_module
from kvsim.metrics import METRICS
from kvsim.scenario import Scenario

BASE = {"model": "llama-3.1-8b", "device": "h100-sxm", "workload": "chat"}


def spec(**axes):
    return SweepSpec(base=BASE, **axes)


def test_one_row_per_point_in_the_grids_order(fake_simulate):
    frame = sweep(spec(grid={"engine.max_num_seqs": (5, 3, 9)}))
    assert frame["kv_fold"].to_list() == [5.0, 3.0, 9.0]
    assert frame["overrides_json"].to_list() == [f'{{"engine.max_num_seqs": {n}}}' for n in (5, 3, 9)]
    assert frame["kv_fold"].dtype == pl.Float64


def test_failures_are_rows_with_status_and_reason(fake_simulate):
    frame = sweep(spec(grid={"engine.max_num_seqs": (5, 13, 66, -1, "many")}))
    rows = frame.select("status", "error_type", "reason").rows()
    assert [row[0] for row in rows] == ["ok", "infeasible", "error", "error", "error"]
    assert [row[1] for row in rows] == [None, "WeightsDoNotFit", "ZeroDivisionError", "InvalidSpec", "InvalidSpec"]
    assert rows[1][2] == "no room"
    assert "division by zero (conftest.py:" in rows[2][2]
    assert "engine.max_num_seqs" in rows[3][2]
    assert frame["model"].to_list() == ["llama-3.1-8b"] * 5
    assert frame["kv_fold"].to_list() == [5.0, None, None, None, None]


def test_equal_scenarios_are_evaluated_once_and_still_have_their_rows(fake_simulate):
    frame = sweep(spec(grid={"compression": ("fp8", "fp8_e4m3", "native"), "seed": (0, 0)}))
    assert len(frame) == 6
    assert len(fake_simulate.calls) == frame["scenario_sha256"].n_unique() == 2
    assert json.loads(frame["overrides_json"][1]) == {"compression": "fp8", "seed": 0}
    assert frame["kv_fold"].null_count() == 0


def test_scenario_column_gives_the_scenario_back(fake_simulate):
    frame = sweep(spec(grid={"compression": ("fp8", "kivi-2")}))
    for text, digest in frame.select("scenario_json", "scenario_sha256").rows():
        assert Scenario.model_validate_json(text).fingerprint() == digest


def test_scenarios_can_be_given_directly(fake_simulate):
    scenarios = [Scenario(**BASE, seed=seed) for seed in range(3)]
    frame = sweep(scenarios, method="estimate", base_dir=Path("traces"))
    assert frame["seed"].to_list() == [0, 1, 2]
    assert {base_dir for _, base_dir in fake_simulate.calls} == {Path("traces")}


def test_an_empty_list_gives_an_empty_frame_with_the_schema(fake_simulate):
    frame = sweep([])
    assert frame.schema == pl.Schema(schema())
    assert len(frame) == 0


def test_progress_reaches_the_total(fake_simulate):
    seen = []
    sweep(spec(grid={"seed": (0, 1, 1, 2)}), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (4, 4)


def test_columns_are_the_metrics_table(fake_simulate):
    names = list(schema())
    for metric in METRICS:
        with_band = [f"{metric.tag}{suffix}" for suffix in ("", "_low", "_high", "_basis")]
        expected = with_band if metric.kind == "figure" else with_band[:1]
        start = names.index(metric.tag)
        assert names[start : start + len(expected)] == expected
        if metric.kind != "figure":
            assert f"{metric.tag}_low" not in names
    assert sweep(spec(grid={"seed": (1,)})).columns == names


def test_interrupt_is_not_swallowed(fake_simulate, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "_evaluate_point", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep(spec(grid={"seed": (1, 2)}))


def test_processes_give_the_same_rows_as_one_process():
    """The real estimator, spawned workers, more chunks than workers, one point that is wrong."""
    plan = spec(grid={"engine.max_num_seqs": (8, 0, *range(16, 48)), "compression": ("native", "fp8")})
    alone = sweep(plan, method="estimate", workers=1)
    together = sweep(plan, method="estimate", workers=2)
    assert together.equals(alone)
    assert alone["status"].value_counts(sort=True).rows() == [("ok", 66), ("error", 2)]


def test_a_dead_worker_becomes_rows(monkeypatch):
    """A worker that is killed (out of memory) must not lose the points that it held."""
    plan = spec(grid={"seed": (1, 2, 3)})
    monkeypatch.setattr(workers, "ignore_interrupt", _die)
    frame = sweep(plan, method="estimate", workers=2)
    assert frame["status"].to_list() == ["error"] * 3
    assert set(frame["error_type"]) == {"BrokenProcessPool"}
    assert frame["seed"].to_list() == [1, 2, 3]


def _die():
    import os

    os._exit(9)
