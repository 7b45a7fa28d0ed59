"""``kvsim explain``: every term behind one step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from kvsim.cli.boundary import naming_file
from kvsim.cli.console import print_json, print_result
from kvsim.cli.flags import ScenarioFlags, read_scenario, takes_scenario


@takes_scenario
def explain_command(
    flags: ScenarioFlags,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show every term of memory, prefill and one decode step with its formula, basis and source."""
    scenario = read_scenario(flags)
    from kvsim.simulate import explain

    with naming_file(flags.file):
        explanation = explain(scenario, base_dir=flags.base_dir)
    if as_json:
        print_json(asdict(explanation))
        return
    from kvsim.rendering.terminal import explanation_view

    print_result(explanation_view(explanation))
