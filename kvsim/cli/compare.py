"""``kvsim compare``: strategies side by side on the same requests."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvsim.cli.boundary import naming_file
from kvsim.cli.console import (
    MIN_WIDTH_FOR_BANDS,
    print_json,
    print_notes,
    print_result,
    progress_bar,
    stdout_width,
    timed,
)
from kvsim.cli.flags import ScenarioFlags, read_scenario, takes_scenario
from kvsim.errors import InfeasibleScenario, InvalidSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvsim.scenario import Scenario
    from kvsim.simulate import Comparison

Results = list[tuple["Scenario", tuple["Comparison", ...]]]
DEFAULT_STRATEGIES = (
    "native,fp8,fp8_per_token_head,int4_per_token_head,kivi-4,kivi-2,turboquant_4bit_nc,turboquant_3bit_nc,"
    "snapkv,snapkv+fp8,streaming_llm,quest"
)
_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^()]*\))")


@takes_scenario
def compare_command(
    flags: ScenarioFlags,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="SCENARIO.yaml", help="A further scenario for the same strategies. Repeatable."),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies",
            "-s",
            help="Names with commas between them, or all; adaptive and static:LEVEL of an adaptive scenario.",
            show_default=DEFAULT_STRATEGIES,
        ),
    ] = None,
    use_estimate: Annotated[
        bool, typer.Option("--estimate", help="Closed form without a queue instead of a simulation.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write one row per strategy: .parquet or .csv.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with picture and table: .html.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the picture: .png (picture extra).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Compare strategies on the same requests; those that cannot run are listed with the reason."""
    asked = [flags, *(replace(flags, file=path) for path in also or ())]
    cases = [(one, read_scenario(one)) for one in asked]
    names = parse_strategies(strategies) if strategies is not None else _default_strategies(cases[0][1])
    _check_outputs(out, html, png, as_json=as_json, as_markdown=as_markdown)
    method: Literal["simulation", "estimate"] = "estimate" if use_estimate else "simulation"
    results = _compare_all(cases, names, method)
    _write_files(results, method, out, html, png)
    _show(results, as_json=as_json, as_markdown=as_markdown)
    everything = [comparison for _, comparisons in results for comparison in comparisons]
    if all(comparison.report is None for comparison in everything):
        msg = f"none of the {len(everything)} strategies can run: {everything[0].reason}"
        raise InfeasibleScenario(msg)


def _compare_all(
    cases: list[tuple[ScenarioFlags, Scenario]], names: tuple[str, ...], method: Literal["simulation", "estimate"]
) -> Results:
    from kvsim.simulate import compare

    results = []
    with timed(f"compared {len(names)} strategies on {len(cases)} scenario(s)"), progress_bar("comparing") as progress:
        for position, (flags, scenario) in enumerate(cases):
            part = partial(_advance, progress, position, len(cases)) if progress is not None else None
            with naming_file(flags.file):
                comparisons = compare(scenario, names, base_dir=flags.base_dir, method=method, progress=part)
            results.append((scenario, comparisons))
    return results


def _advance(progress: Callable[[float], None], position: int, parts: int, share: float) -> None:
    progress((position + share) / parts)


def _default_strategies(scenario: Scenario) -> tuple[str, ...]:
    """The policy and each of its levels held, of an adaptive scenario; else the best known strategies."""
    from kvsim.scenario import ADAPTIVE, STATIC

    if scenario.adaptive is None:
        return parse_strategies(DEFAULT_STRATEGIES)
    return (ADAPTIVE, *(f"{STATIC}{level}" for level in range(len(scenario.adaptive.levels))))


def split_names(text: str) -> tuple[str, ...]:
    """Split at commas outside parentheses."""
    return tuple(name.strip() for name in _COMMA_OUTSIDE_PARENTHESES.split(text) if name.strip())


def parse_strategies(text: str) -> tuple[str, ...]:
    """Split names at commas outside parentheses, and read plan files, before any work is done.

    Raises
    ------
    UnknownName, InvalidSpec
        A name is of no strategy, or a file no plan.
    """
    from kvsim.compression import STRATEGIES, parse_compression
    from kvsim.compression.plan_file import named_strategy
    from kvsim.scenario import ADAPTIVE, STATIC

    names = tuple(named_strategy(name) for name in split_names(text))
    if names == ("all",):
        return tuple(STRATEGIES)
    if not names:
        msg = "--strategies: no name given, such as native,fp8,kivi-2"
        raise InvalidSpec(msg)
    for name in names:
        if name != ADAPTIVE and not name.startswith(STATIC):
            parse_compression(name)
    return tuple(dict.fromkeys(names))


def _check_outputs(out: Path | None, html: Path | None, png: Path | None, *, as_json: bool, as_markdown: bool) -> None:
    from kvsim.documents import check_output_path

    if as_json and as_markdown:
        msg = "--json and --markdown exclude each other"
        raise InvalidSpec(msg)
    for path, suffixes in ((out, (".parquet", ".csv")), (html, (".html",)), (png, (".png",))):
        if path is not None:
            check_output_path(path, suffixes)


def _title(scenario: Scenario) -> str:
    from kvsim.batch.rows import workload_label

    devices = scenario.num_devices
    return f"{scenario.model} on {devices} x {scenario.device}, workload {workload_label(scenario)}"


def _write_files(results: Results, method: str, out: Path | None, html: Path | None, png: Path | None) -> None:
    if out is not None:
        from kvsim.batch import write_results
        from kvsim.batch.rows import comparison_rows, to_frame

        rows = [row for scenario, comparisons in results for row in comparison_rows(comparisons, scenario, method)]
        write_results(to_frame(rows), out)
    if html is not None or png is not None:
        from kvsim.rendering import write_gallery

        write_gallery([(_title(scenario), comparisons) for scenario, comparisons in results], html, png)


def _show(results: Results, *, as_json: bool, as_markdown: bool) -> None:
    from kvsim.rendering.cells import moved_cost_note, shared_notes

    def notes(comparisons: Sequence[Comparison]) -> None:
        moved = moved_cost_note(comparisons)
        print_notes([*shared_notes(comparisons), *([moved] if moved else [])])

    if as_json:
        for _, comparisons in results:
            notes(comparisons)
        print_json(
            [
                {"strategy": c.strategy, "reason": c.reason, "report": c.report and c.report.model_dump(mode="json")}
                for _, comparisons in results
                for c in comparisons
            ]
        )
        return
    for scenario, comparisons in results:
        notes(comparisons)
        if as_markdown:
            from kvsim.rendering import comparison_markdown, quality_markdown

            typer.echo(comparison_markdown(comparisons), nl=False)
            if scores := quality_markdown(comparisons):
                typer.echo(f"\n{scores}", nl=False)
        else:
            from kvsim.rendering.terminal import comparison_table

            show_bands = stdout_width() >= MIN_WIDTH_FOR_BANDS
            print_result(comparison_table(comparisons, _title(scenario), show_bands=show_bands))
