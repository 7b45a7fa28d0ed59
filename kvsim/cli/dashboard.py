"""``kvsim dashboard``: start the browser application."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvsim.errors import InvalidSpec

ADDRESS = "127.0.0.1"
MAIN_FILE = "main.py"


def dashboard_command(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 8501,
    headless: Annotated[bool, typer.Option("--headless", help="Do not open a browser.")] = False,
) -> None:
    """Open the dashboard in a browser; it listens on this machine only."""
    if importlib.util.find_spec("streamlit") is None:
        msg = "the dashboard needs the app extra: pip install 'kvsim[app]'"
        raise InvalidSpec(msg)
    command = [
        sys.executable, "-m", "streamlit", "run", str(dashboard_file()),
        "--server.address", ADDRESS, "--server.port", str(port),
        "--server.headless", "true" if headless else "false", "--browser.gatherUsageStats", "false",
    ]  # fmt: skip
    if os.name == "posix":
        # The server takes this process's place, so that a signal to kvsim stops it.
        os.execv(sys.executable, command)  # noqa: S606 - fixed arguments, no shell
    status = subprocess.run(command, check=False).returncode  # noqa: S603 - fixed arguments, no shell
    raise typer.Exit(status)


def dashboard_file() -> Path:
    """Path of the application's main file: ``kvsim_app`` in a wheel, ``app`` at the top of a checkout."""
    package = importlib.util.find_spec("kvsim_app")
    folders = [Path(folder) for folder in (package.submodule_search_locations or ())] if package else []
    folders.append(Path(__file__).resolve().parents[2] / "app")
    for folder in folders:
        if (folder / MAIN_FILE).is_file():
            return folder / MAIN_FILE
    msg = "the dashboard's files are missing from this installation; reinstall with pip install 'kvsim[app]'"
    raise InvalidSpec(msg)
