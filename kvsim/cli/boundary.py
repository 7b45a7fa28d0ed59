"""Where errors end: user errors become one line and a status, bugs keep their traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError, UnknownName

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_NOT_INSTALLED = 2
PACKAGES_OF_QUALITY = frozenset({"constriction", "ml_dtypes", "safetensors", "zstandard"})
"""What running formats on tensors takes, and pricing them does not."""


@contextmanager
def naming_file(file: Path | None) -> Iterator[None]:
    """Name the scenario file in errors about what it says."""
    try:
        yield
    except (UnknownName, IncompatibleScenario, InvalidSpec) as error:
        if file is not None:
            error.locate(str(file))
        raise


class BoundaryGroup(TyperGroup):
    """The root command: turns kvsim's errors, Ctrl-C and a closed pipe into exit statuses."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except KvsimError as error:
            _say_error(error)
            raise typer.Exit(error.exit_code) from None
        except ModuleNotFoundError as error:
            if error.name not in PACKAGES_OF_QUALITY:
                raise
            _say_error(f"{error.name} is not installed, and this command needs it: pip install 'kvsim[quality]'")
            raise typer.Exit(EXIT_NOT_INSTALLED) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was written", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader has gone: what is still buffered must not fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        return result


def _say_error(error: object) -> None:
    typer.secho("error:", fg=typer.colors.RED, bold=True, err=True, nl=False)
    typer.echo(f" {error}", err=True)
