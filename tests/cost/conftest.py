from __future__ import annotations

from pathlib import Path

import pytest
from cost_cases import SHARED_DATA


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared measurements; tests that read them are skipped where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the shared measurements are not beside this checkout (../shared/data)")
    return SHARED_DATA
