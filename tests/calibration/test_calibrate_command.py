from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_tables import GEMM, layout, measured_row, write_rows
from typer.testing import CliRunner

from kvsim.calibration import measuring
from kvsim.calibration.sets import load_set
from kvsim.cli import build_app
from kvsim.errors import CalibrationError, InvalidSpec

pytest.importorskip("scipy")
PLACE = "h100_sxm/gemm/sglang/0.5.14"


@pytest.fixture
def invoke():
    runner, app = CliRunner(), build_app()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def tables(tmp_path):
    """48 GEMM rows in aiconfigurator's layout."""
    return gemm_tables(tmp_path / "tables")


def gemm_tables(root, *, versions=("0.5.14",), slowness=1.0):
    for version in versions:
        rows = [
            {**GEMM, "version": version, "m": m, "n": n, "latency": slowness * (0.005 + n * (3e-6 + 1e-8 * m))}
            for m in (1, 4, 16, 64, 256, 1024)
            for n in (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288)
        ]  # fmt: skip
        layout(root, "gemm_perf", rows, place=f"h100_sxm/gemm/sglang/{version}")
    return root


def files_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_refused(result, status, *words):
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    for word in words:
        assert word in line
    assert "Traceback" not in result.output


def test_tables_become_a_set_that_a_scenario_can_name(invoke, tables, tmp_path):
    out = tmp_path / "out"
    result = invoke("calibrate", "--from", tables, "--out", out)
    assert result.exit_code == 0, result.output
    path = out / "sets" / "h100-sxm.yaml"
    assert f"calibration: {path}" in result.stdout
    assert "sglang/sglang" in result.stdout
    found = load_set(str(path))
    fitted = found.find("h100-sxm", "gemm", dtype="bf16")
    assert (fitted.kernel, fitted.version, fitted.rows) == ("sglang/sglang", "0.5.14", 48)
    # What the shipped set has for the device came along, so that the rest of a step is still calibrated.
    assert found.find("h100-sxm", "decode_attention", dtype="bf16", kv_dtype="bf16") is not None
    assert all((out / "fitted" / pin.file).is_file() for pin in found.pins)
    used = invoke(
        "estimate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat",
        "--set", f"calibration={path}", "--json",
    )  # fmt: skip
    assert used.exit_code == 0, used.output
    assert json.loads(used.stdout)["provenance"]["calibration"] == "h100-sxm"


def test_equal_tables_give_equal_bytes(invoke, tables, tmp_path):
    for name in ("a", "b"):
        assert invoke("calibrate", "--from", tables, "--out", tmp_path / name).exit_code == 0
    first = files_under(tmp_path / "a")
    assert first
    assert first == files_under(tmp_path / "b")
    assert invoke("calibrate", "--from", tables, "--out", tmp_path / "a").exit_code == 0
    assert files_under(tmp_path / "a") == first


def test_a_set_is_not_changed_silently(invoke, tables, tmp_path):
    out, other = tmp_path / "out", gemm_tables(tmp_path / "other", slowness=1.5)
    assert invoke("calibrate", "--from", tables, "--out", out).exit_code == 0
    before = files_under(out)
    check_refused(invoke("calibrate", "--from", other, "--out", out), 4, "h100-sxm.yaml", "--set", "--replace")
    assert files_under(out) == before
    assert invoke("calibrate", "--from", other, "--out", out, "--set", "second").exit_code == 0
    assert invoke("calibrate", "--from", other, "--out", out, "--replace").exit_code == 0
    after = files_under(out)
    assert {name for name in before if name.startswith("fitted/")} < set(after)
    assert after["sets/h100-sxm.yaml"] != before["sets/h100-sxm.yaml"]


def test_a_full_disk_leaves_no_set(invoke, tables, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kvsim.calibration.sealed.write_atomic", full)
    check_refused(invoke("calibrate", "--from", tables, "--out", tmp_path / "out"), 2, "No space left on device")
    assert not list((tmp_path).rglob("*.yaml"))


def test_json_has_errors_and_origins(invoke, tables, tmp_path):
    result = invoke("calibrate", "--from", tables, "--out", tmp_path / "out", "--json")
    (entry,) = json.loads(result.stdout)["artefacts"]
    assert entry["held_out"]["cold"]["n"] == 48
    assert entry["default"] is True
    (origin,) = entry["origins"]
    assert origin.endswith("(Apache-2.0)")


def test_a_dry_run_shows_the_plan_and_writes_nothing(invoke, tmp_path):
    tables = gemm_tables(tmp_path / "tables", versions=("0.5.9", "0.5.14"))
    layout(tables, "moe_perf", [{"latency": 1.0}], place="h100_sxm/moe/sglang/0.5.14")
    result = invoke("calibrate", "--from", tables, "--out", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert [(one["kernel"], one["version"], one["rows"]) for one in plan["fits"]] == [("sglang/sglang", "0.5.14", 48)]
    assert plan["left_out"] == {"older version of the same kernel": 48, "table of another operation": 1}
    shown = invoke("calibrate", "--from", tables, "--out", tmp_path / "out", "--dry-run")
    assert "0.5.14" in shown.stdout
    assert "left out: older version of the same kernel: 48 rows" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_only_the_device_and_operations_asked_for(invoke, tables, tmp_path):
    out = tmp_path / "out"
    check_refused(
        invoke("calibrate", "--from", tables, "--gpu", "l40s", "--out", out),
        4,
        "nothing to fit",
        "no rows of that device",
    )
    check_refused(invoke("calibrate", "--from", tables, "--ops", "decode_attention", "--out", out), 4, "nothing to fit")
    check_refused(invoke("calibrate", "--from", tables, "--ops", "gem", "--out", out), 2, "--ops", "'gemm'")
    assert not out.exists()


def test_too_few_rows_are_counted(invoke, tmp_path):
    layout(tmp_path / "t", "gemm_perf", [{**GEMM, "m": m} for m in range(1, 11)], place=PLACE)
    check_refused(
        invoke("calibrate", "--from", tmp_path / "t", "--out", tmp_path / "out"),
        4,
        "nothing to fit",
        "fewer than 24 rows: 10",
    )
    assert not (tmp_path / "out").exists()


def test_a_table_in_another_unit_is_refused(invoke, tmp_path):
    tables = gemm_tables(tmp_path / "t", slowness=1000.0)
    check_refused(invoke("calibrate", "--from", tables, "--out", tmp_path / "out"), 4, "unit")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, ("--gpu", "--from")),
        (["--from", "nowhere"], 4, ("nowhere", "no such file or folder")),
        (["--from", "."], 4, ("holds no table that is known",)),
        (["--from", ".", "--format", "aiconfig"], 2, ("--format", "'aiconfigurator'")),
        (["--from", ".", "--set", "../x"], 2, ("--set", "letters, digits")),
        (["--gpu", "h1000"], 2, ("unknown device 'h1000'", "did you mean")),
        (["--from", ".", "--gpu", "h1000"], 2, ("unknown device",)),
        (["--gpu", "h100", "--out", "file/deeper"], 2, ("--out", "is a file")),
    ],
)
def test_what_cannot_be_done_is_one_line(invoke, tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    check_refused(invoke("calibrate", *arguments), status, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_gpu_both_ways_out_are_named(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "gpu_name", lambda: None)
    result = invoke("calibrate", "--gpu", "a100", "--out", tmp_path / "out")
    check_refused(result, 4, "'a100' (a100-sxm-80gb)", "no GPU", "--from PATH")
    assert not (tmp_path / "out").exists()


def test_another_gpu_is_named_beside_the_one_asked_for(invoke, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    result = invoke("calibrate", "--gpu", "a100", "--out", tmp_path / "out")
    check_refused(result, 4, "'a100' (a100-sxm-80gb)", "'NVIDIA H100 80GB HBM3' (h100-sxm)", "--gpu h100-sxm")
    monkeypatch.setattr(measuring, "gpu_name", lambda: "NVIDIA X9000")
    check_refused(invoke("calibrate", "--gpu", "a100", "--out", tmp_path / "out"), 4, "'NVIDIA X9000'", "aliases")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "driver", "device"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("a100", "NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("h100-sxm", "NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("H200", "NVIDIA H200", "h200-sxm"),
    ],
)
def test_the_gpu_that_is_there_is_taken(monkeypatch, asked, driver, device):
    monkeypatch.setattr(measuring, "gpu_name", lambda: driver)
    assert measuring.device_present(asked).name == device


def test_a_named_part_is_not_its_neighbour(monkeypatch):
    monkeypatch.setattr(measuring, "gpu_name", lambda: "NVIDIA A100-SXM4-40GB")
    with pytest.raises(CalibrationError, match="a100-sxm-40gb"):
        measuring.device_present("a100-sxm-80gb")


@pytest.fixture
def h100_here(monkeypatch):
    """An H100 that is not there: the measuring package is replaced by a function of its arguments."""
    monkeypatch.setattr(measuring, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")

    def install(run):
        monkeypatch.setattr(measuring, "_run", run)

    return install


def own_rows(folder):
    rows = [
        measured_row(
            case=f"b{batch}-c{context}-h{heads}",
            shape=json.dumps(
                {"num_query_heads": heads, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16",
                 "context_lens": {"value": context, "count": batch}}
            ),
            median_s=5e-6 + batch * context * 4096 / 2.8e12,
        )
        for batch in (1, 8, 64)
        for context in (1024, 4096, 16384)
        for heads in (8, 16, 32, 64)
    ]  # fmt: skip
    write_rows(folder, rows)


def test_measuring_stores_rows_then_fits_them(invoke, tmp_path, h100_here):
    out, asked = tmp_path / "out", []

    def run(arguments, on_line):
        asked.extend(arguments)
        on_line("[1/36 rows, 1 s] decode_attention/native/best")
        own_rows(Path(arguments[1]))
        return 1, "a kernel failed"

    h100_here(run)
    result = invoke("calibrate", "--gpu", "h100", "--out", out, "--budget", "60", "--ops", "decode_attention")
    assert result.exit_code == 0, result.output
    assert asked == ["--out", str(out / "measured" / "h100-sxm"), "--budget", "60", "--ops", "decode_attention"]
    assert (out / "measured" / "h100-sxm" / "rows.csv").is_file()
    assert "[1/36 rows, 1 s]" in result.stderr
    assert "some kernels failed" in result.stderr
    found = load_set(str(out / "sets" / "h100-sxm.yaml"))
    own = found.find("h100-sxm", "decode_attention", kernel="kvsim/best", dtype="bf16", kv_dtype=own_format(found))
    assert own.rows == 36
    assert own.kernel_source_sha256 == own.version


def own_format(found):
    (pin,) = [pin for pin in found.pins if pin.kernel == "kvsim/best"]
    return pin.kv_dtype


@pytest.mark.parametrize(("status", "code", "word"), [(2, 4, "no variant"), (3, 4, "No GPU"), (-9, 4, "status -9")])
def test_a_failed_measurement_is_one_line_and_no_set(invoke, tmp_path, h100_here, status, code, word):
    h100_here(lambda arguments, on_line: (status, word))
    check_refused(invoke("calibrate", "--gpu", "h100", "--out", tmp_path / "out"), code, word)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_measurement_ends_as_one(invoke, tmp_path, h100_here):
    h100_here(lambda arguments, on_line: (130, "interrupted"))
    result = invoke("calibrate", "--gpu", "h100", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert not (tmp_path / "out").exists()


def test_the_package_runs_as_a_child_whose_errors_are_seen(tmp_path, monkeypatch):
    package = tmp_path / "kvsim_kernels" / "measure"
    package.mkdir(parents=True)
    (tmp_path / "kvsim_kernels" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import sys\nprint('asked', *sys.argv[1:], flush=True)\nprint('no such GPU', file=sys.stderr)\nsys.exit(3)\n"
    )
    monkeypatch.setattr(measuring, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: object())
    lines = []
    with pytest.raises(CalibrationError, match="status 3: no such GPU"):
        measuring.measure(measuring.Request(tmp_path / "rows", ("append",), 9.0), lines.append)
    assert lines == [f"asked --out {tmp_path / 'rows'} --budget 9 --ops append", "no such GPU"]


def test_what_measuring_needs_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidSpec, match=r"measuring needs torch: pip install 'kvsim\[kernels\]'"):
        measuring.measure(measuring.Request(tmp_path), print)
    monkeypatch.setattr(measuring.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(measuring, "_CHECKOUT", tmp_path)
    with pytest.raises(CalibrationError, match="holds no kernels to measure"):
        measuring.measure(measuring.Request(tmp_path), print)


def test_a_measuring_plan_needs_no_gpu(invoke, tmp_path, monkeypatch):
    asked = []

    def run(arguments, on_line):
        asked.extend(arguments)
        on_line("3 timings, 0.1 GB read and written once")
        return 0, ""

    monkeypatch.setattr(measuring, "_run", run)
    result = invoke("calibrate", "--gpu", "h100", "--dry-run", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert asked == ["--dry-run", "--target", "sm_90"]
    assert "3 timings" in result.stdout
    assert not (tmp_path / "out").exists()


def test_the_list_shows_errors_and_defaults(invoke):
    result = invoke("list", "calibrations", "--device", "h100", "--json")
    entries = json.loads(result.stdout)
    assert {entry["device"] for entry in entries} == {"h100-sxm"}
    assert any(entry["default"] and entry["held_out"]["cold"]["median_ape"] is not None for entry in entries)
    assert {"id", "operation", "kernel", "dtype", "kv_dtype", "basis", "rows", "stale", "origins"} <= set(entries[0])
    shown = invoke("list", "calibrations")
    assert shown.exit_code == 0
    assert entries[0]["id"] in shown.stdout
    check_refused(invoke("list", "calibrations", "defualt"), 2, "did you mean 'default'")
