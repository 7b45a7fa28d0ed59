"""Suite kernel-timings: out of fold where the table was fitted, directly where it is new, by transfer where unseen."""

from __future__ import annotations

import shutil

import pytest
from made_up_data import gemm_rows, write_gemm

from kvsim.errors import CalibrationError, InvalidSpec, KvsimError
from kvsim.validation import Options, kernel_timings, run_suite
from kvsim.validation.kernel_timings import DIRECT, FOLDS, NO_ARTEFACT, OTHER_LAYOUT, OTHER_VERSION, TRANSFERRED


def validate(data, calibration, as_unseen=None):
    return run_suite("kernel-timings", data, Options(as_unseen=as_unseen, calibration=str(calibration)))


def ways(result) -> set[str]:
    return {name.partition("=")[2] for name in result.groups if name.startswith("predicted by=")}


@pytest.mark.parametrize("inner", ["", "kernel_timings", "kernel_timings/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"])
def test_fitted_tables_are_scored_out_of_fold(gemm_tables, gemm_set, inner):
    found = validate(gemm_tables / inner, gemm_set)
    assert ways(found) == {FOLDS}
    assert (found.rows, set(found.overall)) == (80, {"gemm"})
    assert found.overall["gemm"].n == 80
    assert found.overall["gemm"].median_ape < 0.1
    assert found.skipped == ()


def test_links_to_folders_are_followed(gemm_tables, gemm_set, tmp_path):
    (tmp_path / "kernel_timings").symlink_to(gemm_tables / "kernel_timings")
    assert validate(tmp_path, gemm_set).rows == 80


def test_new_rows_are_predicted_by_the_artefact(gemm_set, tmp_path):
    write_gemm(tmp_path, gemm_rows(slowness=1.5))
    found = validate(tmp_path, gemm_set)
    assert ways(found) == {DIRECT}
    assert found.overall["gemm"].bias == pytest.approx(1 / 1.5 - 1, abs=0.05)


def test_another_version_of_a_kernel_is_told_apart(gemm_set, tmp_path):
    rows = [row | {"version": "0.23.0"} for row in gemm_rows()]
    write_gemm(tmp_path, rows, "h100_sxm/gemm/vllm/0.23.0")
    assert ways(validate(tmp_path, gemm_set)) == {OTHER_VERSION}


def test_groups_name_device_kernel_format_domain_and_binding(gemm_tables, gemm_set):
    groups = set(validate(gemm_tables, gemm_set).groups)
    assert {"device=h100-sxm", "kernel=vllm/default@0.24.0", "format=bf16", "domain=cold", "operation=gemm"} <= groups
    assert {"bound by=bandwidth", "device and bound=h100-sxm, bandwidth"} <= groups


def test_a_device_without_rows_of_its_own_is_predicted_by_transfer(gemm_set, tmp_path):
    write_gemm(tmp_path, gemm_rows(device="NVIDIA A100-SXM4-80GB", slowness=1.6), "a100_sxm/gemm/vllm/0.24.0")
    found = validate(tmp_path, gemm_set)
    assert ways(found) == {TRANSFERRED}
    assert found.overall["gemm"].median_ape < 0.5


def test_as_unseen_ignores_the_device_itself(gemm_tables, gemm_set, tmp_path):
    shutil.copytree(gemm_tables / "kernel_timings", tmp_path / "kernel_timings")
    found = validate(tmp_path, gemm_set, as_unseen="h100")
    assert (found.rows, found.overall) == (0, {})
    assert [(one.reason, one.count) for one in found.skipped] == [(NO_ARTEFACT, 80)]


def test_as_unseen_without_rows_of_the_device(gemm_tables, gemm_set):
    with pytest.raises(InvalidSpec, match="no row to score of l40s"):
        validate(gemm_tables, gemm_set, as_unseen="l40s")


def test_bad_rows_are_counted_by_name(gemm_set, tmp_path):
    rows = gemm_rows()
    bad = [rows[0] | {"latency": -1.0}, rows[1] | {"latency": 0.0}, rows[2] | {"m": 0}]
    write_gemm(tmp_path, [*rows, *bad])
    (tmp_path / "other.csv").write_text("a,b\n")
    found = validate(tmp_path, gemm_set)
    counts = {one.reason: one.count for one in found.skipped}
    assert found.rows == 80
    assert counts == {OTHER_LAYOUT: 1, "impossible shape": 1, "seconds not finite and positive": 2}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no Parquet table"),
        (lambda path: path.write_bytes(b"PAR1 but not really"), "cannot be read as Parquet"),
    ],
)
def test_wrong_folders_and_files(gemm_set, tmp_path, make, message):
    path = tmp_path / "gemm_perf.parquet" if "Parquet:" in message or "read" in message else tmp_path / "data"
    make(path)
    with pytest.raises(KvsimError, match=message):
        validate(path, gemm_set)


def test_a_missing_column_and_an_unknown_device(gemm_set, tmp_path):
    write_gemm(tmp_path / "a", [{k: v for k, v in row.items() if k != "latency"} for row in gemm_rows()])
    with pytest.raises(InvalidSpec, match="column 'latency' is missing"):
        validate(tmp_path / "a", gemm_set)
    write_gemm(tmp_path / "b", gemm_rows(device="Some GPU"), "some_gpu/gemm/vllm/1")
    with pytest.raises(KvsimError, match="unknown device 'Some GPU'"):
        validate(tmp_path / "b", gemm_set)


def test_times_in_another_unit_are_refused(gemm_set, tmp_path):
    write_gemm(tmp_path, [row | {"latency": row["latency"] * 1e3} for row in gemm_rows()])
    with pytest.raises(CalibrationError, match="unit"):
        validate(tmp_path, gemm_set)


def test_folds_without_scipy_say_how_to_get_it(gemm_tables, gemm_set, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_timings, "find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"pip install 'kvsim\[calibration\]'"):
        validate(gemm_tables, gemm_set)
    write_gemm(tmp_path, gemm_rows(slowness=1.5))
    assert validate(tmp_path, gemm_set).rows == 80


def test_several_processes_give_the_same_result(gemm_set, tmp_path):
    write_gemm(tmp_path, gemm_rows(slowness=1.2))
    write_gemm(tmp_path, [row | {"gemm_dtype": "fp8"} for row in gemm_rows()], "h100_sxm/gemm/sglang/0.5")
    alone, together = (
        run_suite("kernel-timings", tmp_path, Options(calibration=str(gemm_set), workers=workers)) for workers in (1, 2)
    )
    assert alone == together
