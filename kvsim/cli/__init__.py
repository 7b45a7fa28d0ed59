"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Nothing heavy is imported here: ``kvsim --help`` has to answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from kvsim.cli.boundary import BoundaryGroup
from kvsim.cli.calibrate import calibrate_command
from kvsim.cli.calibrations import list_calibrations_command
from kvsim.cli.check import check_command
from kvsim.cli.compare import compare_command
from kvsim.cli.dashboard import dashboard_command
from kvsim.cli.edge import edge_command
from kvsim.cli.explain import explain_command
from kvsim.cli.flags import ScenarioCommand
from kvsim.cli.limit import limit_command
from kvsim.cli.listing import list_app
from kvsim.cli.plan import plan_command
from kvsim.cli.quality import quality_app
from kvsim.cli.quality_compare import compare_command as compare_quality_command
from kvsim.cli.quality_compare import train_command
from kvsim.cli.quality_plan import plan_layers_command
from kvsim.cli.risk import risk_command
from kvsim.cli.single import estimate_command, simulate_command
from kvsim.cli.strategies import list_strategies_command
from kvsim.cli.sweep import sweep_command
from kvsim.cli.validate import validate_command

EPILOG = (
    "Exit status: 0 done, 2 wrong input, 3 infeasible (or an SLO missed, with --fail-on-slo; or a log that differs, "
    "with check), 4 a calibration is missing or not to be trusted, 130 interrupted."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvsim import __version__

        typer.echo(f"kvsim {__version__}")
        raise typer.Exit


def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    """Say which KV-cache compression, on which hardware, at what throughput, latency, memory, cost and energy."""


def build_app() -> typer.Typer:
    """Put the commands together."""
    app = typer.Typer(
        name="kvsim", cls=BoundaryGroup, no_args_is_help=True, pretty_exceptions_enable=False, epilog=EPILOG,
        add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(_root)
    app.command("simulate", cls=ScenarioCommand)(simulate_command)
    app.command("estimate", cls=ScenarioCommand)(estimate_command)
    app.command("compare", cls=ScenarioCommand)(compare_command)
    app.command("sweep")(sweep_command)
    app.command("explain", cls=ScenarioCommand)(explain_command)
    app.command("edge")(edge_command)
    app.command("limit")(limit_command)
    app.command("risk")(risk_command)
    app.command("plan")(plan_command)
    app.command("check", cls=ScenarioCommand)(check_command)
    app.command("validate")(validate_command)
    app.command("calibrate")(calibrate_command)
    app.command("dashboard")(dashboard_command)
    list_app.command("strategies")(list_strategies_command)
    list_app.command("calibrations")(list_calibrations_command)
    app.add_typer(list_app, name="list")
    quality_app.command("compare")(compare_quality_command)
    quality_app.command("train")(train_command)
    quality_app.command("plan")(plan_layers_command)
    app.add_typer(quality_app, name="quality")
    return app


def main() -> None:
    """Entry point ``kvsim``."""
    build_app()()
