from __future__ import annotations

from pathlib import Path

import pytest
from made_up_data import fit_set, gemm_rows, write_gemm

from kvsim.validation import Options, Result, run_suite

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared measurements; tests that read them are skipped where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared measurements are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def gemm_tables(tmp_path_factory) -> Path:
    """A made-up GEMM table, in a folder that holds other suites' data too."""
    data = tmp_path_factory.mktemp("data")
    write_gemm(data / "kernel_timings", gemm_rows())
    return data


@pytest.fixture(scope="session")
def gemm_set(gemm_tables, tmp_path_factory) -> Path:
    """A calibration set fitted to that table."""
    pytest.importorskip("scipy")
    return fit_set(gemm_tables / "kernel_timings", tmp_path_factory.mktemp("calibration"))


@pytest.fixture
def run():
    """Run a suite without any calibration, in this process."""

    def run_uncalibrated(suite: str, data: Path, as_unseen: str | None = None) -> Result:
        return run_suite(suite, data, Options(as_unseen=as_unseen, calibration="datasheet"))

    return run_uncalibrated
