"""The command line as a real process: streams, statuses, start-up time, pipes and signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(*arguments, **options):
    command = [sys.executable, "-m", "kvsim", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # fmt: skip


def run(*arguments):
    with start(*arguments) as process:
        stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


def test_user_errors_have_no_traceback(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: llama-3.1-8b\ndevice: h100-sxm\nworkload: {kind: trace, format: azur, path: x}\n")
    status, stdout, stderr = run("simulate", path)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"error: {path}: workload.format: 'azur' is not allowed")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("ml_dtypes", ("limit", "-s", "fp8", "--ensemble", "llama-like(num_layers=1,num_tokens=128)")),
        (
            "constriction",
            ("quality", "run", "-s", "kivi-2+rans", "--ensemble", "llama-like(num_layers=1,num_tokens=256)"),
        ),
    ],
)
def test_a_package_of_an_extra_that_is_missing_is_named(package, arguments):
    without = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_module('kvsim', run_name='__main__')"
    command = [sys.executable, "-c", without, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {package} is not installed")
    assert "pip install 'kvsim[quality]'" in done.stderr


def test_unknown_options_are_status_2():
    status, stdout, _ = run("simulate", "--no-such-flag")
    assert (status, stdout) == (2, "")


def test_missing_app_extra_is_explained():
    block = (
        "import sys\nsys.modules['streamlit'] = None\n"
        "from kvsim.cli import main\nsys.argv = ['kvsim', 'dashboard']\nmain()"
    )
    finished = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "pip install 'kvsim[app]'" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_help_imports_nothing_heavy():
    script = (
        "import sys\nfrom kvsim.cli import build_app\nbuild_app()\n"
        "print([m for m in ('numpy', 'polars', 'simpy', 'pydantic', 'yaml', 'scipy', 'altair') if m in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_a_closed_pipe_is_no_error():
    with start("list", "devices", "--json") as process:
        process.stdout.close()
        stderr = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 141
    assert stderr == ""


def _first_worker_is_there(pid):
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text().rpartition(")")[2].split()[1]
            if parent == str(pid) and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                return True
        except OSError:
            # It has ended meanwhile.
            continue
    return False


def _await_first_worker(pid):
    for _ in range(2000):
        if _first_worker_is_there(pid):
            return
        time.sleep(0.02)
    pytest.fail("no worker was started")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
@pytest.mark.parametrize("later_s", [0.0, 0.4, 2.0], ids=["as it starts", "as it imports", "as it works"])
def test_ctrl_c_ends_the_workers_and_leaves_no_file(later_s, tmp_path):
    plan = tmp_path / "sweep.yaml"
    rates = list(range(1, 400))
    plan.write_text(
        "base: {model: llama-3.1-8b, device: h100-sxm, workload: azure-conv}\n"
        f"grid: {{workload.arrivals.request_rate: {rates}, workload.num_prompts: [20000]}}\n"
    )
    out = tmp_path / "out.parquet"
    process = start("sweep", plan, "-o", out, "--workers", "2", start_new_session=True)
    _await_first_worker(process.pid)
    time.sleep(later_s)
    assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stdout == ""
    # From nobody a traceback, nor from workers that have only just begun.
    assert stderr.endswith("interrupted; nothing was written\n")
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == [plan]
