"""A wheel, unpacked away from the checkout, carries everything that the commands need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
COMMON_NAMES = {"app", "calibration", "hardware_specs", "kernels", "tests", "examples", "tools"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)],
        check=True,
        capture_output=True,
        cwd=out,
    )
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_top_level_names_cannot_collide(site: Path) -> None:
    top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"kvsim", "kvsim_app", "kvsim_kernels"}
    assert not top & COMMON_NAMES


def test_the_unpacked_package_is_the_one_that_runs(site: Path, tmp_path: Path) -> None:
    done = run(
        site, tmp_path, "-c", "import kvsim, kvsim_kernels; print(kvsim.__file__); print(kvsim_kernels.__file__)"
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(site)) for line in done.stdout.split())


@pytest.mark.parametrize(
    "command",
    [
        ["list", "devices"],
        ["list", "models", "--json"],
        ["list", "strategies"],
        ["list", "workloads"],
        ["list", "calibrations", "--device", "h100-sxm"],
        ["estimate", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat", "--json"],
        ["explain", "--model", "llama-3.1-8b", "--device", "h100-sxm", "--workload", "chat"],
        ["simulate", "--model", "llama-3.2-1b", "--device", "snapdragon-8-gen-3", "--workload", "phone-assistant",
         "--json"],
        ["compare", "--model", "llama-3.1-8b", "--device", "tpu-v6e", "--workload", "chat", "-s", "native,fp8",
         "--estimate", "-o", "rows.parquet", "--html", "page.html"],
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_commands_run_from_the_wheel(site: Path, tmp_path: Path, command: list[str]) -> None:
    done = run(site, tmp_path, "-m", "kvsim", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--json" in command:
        json.loads(done.stdout)
    if "compare" in command:
        assert {path.name for path in tmp_path.iterdir()} == {"rows.parquet", "page.html"}


def test_the_dashboard_is_found(site: Path, tmp_path: Path) -> None:
    code = "from kvsim.cli.dashboard import dashboard_file; print(dashboard_file())"
    done = run(site, tmp_path, "-c", code)
    assert done.stdout.strip() == str(site / "kvsim_app" / "main.py"), done.stderr


def test_no_public_data_travels(wheel: Path) -> None:
    tables = ("results", "layer_plans", "layer_plans_ensembles")
    measured_by_us = {f"kvsim/presets/small_model/{name}.csv" for name in tables}
    names = set(zipfile.ZipFile(wheel).namelist()) - measured_by_us
    assert not [name for name in names if name.endswith((".csv", ".jsonl", ".gz", ".parquet"))]


def test_base_install_is_light() -> None:
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {requirement.split(">")[0].split("=")[0].strip() for requirement in project["dependencies"]}
    assert base == {"numpy", "polars", "pydantic", "pyyaml", "rich", "simpy", "typer"}
    assert {"app", "kernels", "service", "hub", "entropy", "cluster", "dev"} <= set(project["optional-dependencies"])
