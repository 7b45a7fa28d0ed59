"""The dashboard's package lies beside its script, where Streamlit finds it; the tests put that folder on the path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("streamlit", reason="the app extra is not installed")
pytest.importorskip("plotly", reason="the app extra is not installed")

APP = Path(__file__).resolve().parents[2] / "app"
if str(APP) not in sys.path:
    sys.path.insert(0, str(APP))

OpenPage = Callable[..., Any]


@pytest.fixture
def app_folder() -> Path:
    return APP


@pytest.fixture
def open_page() -> Iterator[OpenPage]:
    """Open the dashboard at a share link, with an empty store of answers before and after."""
    from kvsim_dashboard.answers import answer_store
    from streamlit.testing.v1 import AppTest

    def open_at(**link: str | list[str]) -> Any:
        page = AppTest.from_file(str(APP / "main.py"), default_timeout=60)
        for name, value in link.items():
            page.query_params[name] = value
        return page.run()

    answer_store.clear()
    yield open_at
    answer_store.clear()
