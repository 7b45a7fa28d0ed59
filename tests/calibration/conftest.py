from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared measurements; tests that read them are skipped where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared measurements are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def kernel_timings(shared_data: Path) -> Path:
    """The measured kernel tables."""
    return shared_data / "kernel_timings"
