"""Output: results on stdout, notices, progress and wall time on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_WIDTH = 180
"""Columns where stdout is no terminal, so that equal input gives equal bytes."""
MIN_WIDTH_FOR_BANDS = 165


def stdout_width() -> int:
    """Columns of the terminal, or a fixed number where there is none."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH


def print_result(renderable: RenderableType) -> None:
    """Show a result on stdout; plain text where stdout is no terminal."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=stdout_width(), force_terminal=is_terminal, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    lines = (line.rstrip() for line in capture.get().splitlines())
    typer.echo("\n".join(lines))


def print_text(line: str) -> None:
    """Write a line to stdout as it is."""
    typer.echo(line)


def print_json(value: Any) -> None:
    """Write JSON to stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def notice(text: str) -> None:
    """Tell the person at the terminal something that is not a result."""
    typer.echo(text, err=True)


def print_notes(notes: Iterable[str]) -> None:
    """Put what a reader must know on stderr, each note once."""
    for note in dict.fromkeys(notes):
        notice(f"note: {note}")


def joined_names(lines: Iterable[str]) -> list[str]:
    """Put the names of lines ``NAME: reason`` that give the same reason into one line."""
    names: dict[str, list[str]] = {}
    for line in lines:
        name, _, reason = line.partition(": ")
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(same)}: {reason}" for reason, same in names.items()]


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Report wall time on stderr when the block has succeeded."""
    started = time.perf_counter()
    yield
    notice(f"{what} in {time.perf_counter() - started:.2f} s")


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float], None] | None]:
    """Yield a function that takes the share done, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    parts = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*parts, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda share: progress.update(task, completed=share)
