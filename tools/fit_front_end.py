"""Fit a request's time outside the engine (prior ``request_overhead_s``, kind vllm) on half of the vLLM runs.

    python tools/fit_front_end.py ../shared/data

Each stage of the runs in ``FITTED_RUNS`` is simulated without a front end; what its mean TTFT then lacks is the front
end's. The value is the median over the stages, low and high are the extremes. The other runs are not looked at, and
nothing else is fitted on any of them. Prints the line for calibration/priors/datasheet.yaml.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

from kvsim.validation.deployments import deploy, play
from kvsim.validation.suite import Options
from kvsim.validation.vllm_serving import FITTED_RUNS, Run, latencies, read_runs, requests_of, setup_of

FILE = "vllm_serving/experiments.json"


def fitted_seconds(data: Path) -> list[float]:
    """Seconds that the mean TTFT of each stage of the fitted runs has beyond a simulation without a front end."""
    runs = [run for run in read_runs(data / FILE) if run.id in FITTED_RUNS]
    return [lacking for run in runs for lacking in _lacking_s(run)]


def _lacking_s(run: Run) -> Iterator[float]:
    setup = setup_of(run, request_overhead_s=0.0)
    requests, stage_of = requests_of(run)
    played = play(deploy(setup, Options()), requests)
    for stage in range(int(stage_of.max()) + 1):
        simulated_s = float(latencies(played, stage_of == stage).ttft.mean())
        measured_ms = run.measured_ms[f"stage_{stage}"]["ttft_mean"]
        if measured_ms is not None:
            yield measured_ms / 1e3 - simulated_s


def main() -> None:
    """Print the prior."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the public data, such as ../shared/data")
    seconds = sorted(fitted_seconds(parser.parse_args().data))
    value, low, high = (f"{1e3 * one:.1f}e-3" for one in (statistics.median(seconds), seconds[0], seconds[-1]))
    source = (
        f"fitted by tools/fit_front_end.py to mean TTFT of vLLM 0.15.1 over HTTP: {len(seconds)} stages of runs "
        f"{', '.join(sorted(FITTED_RUNS))} (inference-sim, Apache-2.0); the other runs were held out"
    )
    print(f'  vllm: {{value: {value}, low: {low}, high: {high}, source: "{source}"}}')


if __name__ == "__main__":
    main()
