"""``kvsim simulate`` and ``kvsim estimate``: one scenario, one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.boundary import naming_file
from kvsim.cli.console import print_json, print_notes, print_result, progress_bar, timed
from kvsim.cli.flags import ScenarioFlags, read_scenario, takes_scenario
from kvsim.cli.watched import check_watch_outputs, observer_for, write_watched
from kvsim.errors import InvalidSpec, SloMissed

if TYPE_CHECKING:
    from kvsim.report import Report

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]
VllmFlag = Annotated[bool, typer.Option("--vllm-bench", help="Print JSON in the keys of `vllm bench serve`.")]
OutFile = Annotated[
    Path | None, typer.Option("--out", "-o", help="Also write the report: .json, or one row as .parquet or .csv.")
]
REPORT_SUFFIXES = (".json", ".parquet", ".csv")


@takes_scenario
def simulate_command(
    flags: ScenarioFlags,
    as_json: JsonFlag = False,
    vllm_bench: VllmFlag = False,
    out: OutFile = None,
    fail_on_slo: Annotated[
        bool, typer.Option("--fail-on-slo", help="Exit with status 3 where too few requests meet the SLO.")
    ] = False,
    min_attainment: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of requests that --fail-on-slo asks for.")
    ] = 0.99,
    trace_out: Annotated[
        Path | None,
        typer.Option("--trace-out", help="Also write the run's timeline: .json of trace events, for Perfetto."),
    ] = None,
    metrics_out: Annotated[
        Path | None, typer.Option("--metrics-out", help="Also write series as OpenMetrics text: .txt or .prom.")
    ] = None,
) -> None:
    """Play a workload through the engine, request by request, and report what comes out."""
    scenario = read_scenario(flags)
    _check_outputs(out, as_json=as_json, vllm_bench=vllm_bench)
    if fail_on_slo and not scenario.slo.is_set:
        msg = "--fail-on-slo needs an SLO: --goodput ttft:500, or slo.ttft_s in the scenario"
        raise InvalidSpec(msg)
    check_watch_outputs(trace_out, metrics_out, out)
    from kvsim.simulate import simulate

    observer = observer_for(trace_out, metrics_out)
    with naming_file(flags.file), timed("simulated"), progress_bar("simulating") as progress:
        report = simulate(scenario, base_dir=flags.base_dir, progress=progress, observer=observer)
    if observer is not None:
        write_watched(observer, report.provenance.model, trace_out, metrics_out)
    _deliver(report, out, as_json=as_json, vllm_bench=vllm_bench)
    attainment = report.throughput.slo_attainment.value
    if fail_on_slo and (attainment is None or attainment < min_attainment):
        reached = "unknown" if attainment is None else f"{attainment:.2%}"
        msg = f"SLO missed: {reached} of the requests meet it, {min_attainment:.2%} are asked for"
        raise SloMissed(msg)


@takes_scenario
def estimate_command(
    flags: ScenarioFlags, as_json: JsonFlag = False, vllm_bench: VllmFlag = False, out: OutFile = None
) -> None:
    """Answer in closed form, without a queue: milliseconds instead of a simulation."""
    scenario = read_scenario(flags)
    _check_outputs(out, as_json=as_json, vllm_bench=vllm_bench)
    from kvsim.simulate import estimate

    with naming_file(flags.file), timed("estimated"):
        report = estimate(scenario, base_dir=flags.base_dir)
    _deliver(report, out, as_json=as_json, vllm_bench=vllm_bench)


def _check_outputs(out: Path | None, *, as_json: bool, vllm_bench: bool) -> None:
    from kvsim.documents import check_output_path

    if as_json and vllm_bench:
        msg = "--json and --vllm-bench exclude each other"
        raise InvalidSpec(msg)
    if out is not None:
        check_output_path(out, REPORT_SUFFIXES)


def _deliver(report: Report, out: Path | None, *, as_json: bool, vllm_bench: bool) -> None:
    if out is not None:
        _write(report, out)
    if as_json or vllm_bench:
        from kvsim.vllm_bench import to_vllm_bench

        print_notes(report.provenance.notes)
        print_json(to_vllm_bench(report) if vllm_bench else report.model_dump(mode="json"))
    else:
        from kvsim.rendering.terminal import report_view

        print_result(report_view(report))


def _write(report: Report, out: Path) -> None:
    if out.suffix == ".json":
        from kvsim.documents import write_output

        write_output(out, (report.model_dump_json(indent=2) + "\n").encode())
        return
    from kvsim.batch import report_row, to_frame, write_results

    write_results(to_frame([report_row(report, report.scenario, {})]), out)
