"""Fit engine-level parameters of devices without kernel tables into calibration/engine.

    python tools/fit_engine_tables.py ../shared/data [--out calibration/engine]

The rows are those of ``engine_tables`` and ``edge``; at most half of a device's rows are used, by model where it has
several, chosen by hash, and each file names them. The cost model itself is the law: a step is priced with its priors,
and the share of bandwidth, the share of FLOPs and an overhead per layer are fitted to measured times.
Rows stay where they are; parameters and errors come here. Equal tables and equal code give equal files.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from kvsim import __version__
from kvsim.calibration.engine_fits import (
    EngineErrors,
    EngineFit,
    SecondsRange,
    ShareRange,
    TableRow,
    apply_engine_fit,
)
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import ELEMENTWISE_KERNELS_PER_LAYER, StepModel
from kvsim.deployment import Deployment
from kvsim.device_catalog import load_device
from kvsim.specs.base import Basis
from kvsim.specs.engine import EngineSpec
from kvsim.validation.deployments import Setup, deploy, find_device, find_preset
from kvsim.validation.edge import ENGINE as LLAMA_CPP
from kvsim.validation.edge import _format_of
from kvsim.validation.suite import Options
from kvsim.validation.tables import header_of, number, read_rows, whole

CHECKOUT = Path(__file__).resolve().parents[1]
COVERAGE = 0.8
SMALLEST_BAND_LOG = 0.10
"""No band is narrower than this factor (natural logarithm) on time: engines of other versions differ by as much."""
PRIOR_WIDTHS = {"stream": 0.25, "overhead": 1.5, "prefill": 0.7}
"""How far (natural logarithm) parameters are expected from the middle of what other devices show."""
PRIOR_MIDDLES = {"stream": 0.75, "overhead": 3e-5, "prefill": 0.45}
ERROR_LOG = 0.1
"""Error of a row (natural logarithm) that weighs as much as one width of a prior."""
LOWEST = {"stream": 0.05, "overhead": 1e-7, "prefill": 0.005}
HIGHEST = {"stream": 1.0, "overhead": 1e-3, "prefill": 1.0}
NAMES = ("stream", "overhead", "prefill")


@dataclass(frozen=True)
class Measured:
    """Seconds of one kind of work in one row."""

    row: TableRow
    model: str
    phase: str
    """``decode`` or ``prefill``."""
    seconds: float
    setup: Setup
    work: Callable[[StepModel], float]
    source: str

    @cached_property
    def deployment(self) -> Deployment:
        """The row's deployment, priced by priors alone."""
        return deploy(self.setup, Options(calibration="datasheet"))

    def predicted_s(self, parameters: Mapping[str, float]) -> float:
        """Seconds with these parameters in the priors' place."""
        device = self.deployment.device
        rates = build_rates(device, self.deployment.priors, Edge.CENTRAL)
        fit = _trial(device.name, parameters)
        return self.work(StepModel(self.deployment, apply_engine_fit(rates, fit, ELEMENTWISE_KERNELS_PER_LAYER)))


def _trial(device: str, parameters: Mapping[str, float]) -> EngineFit:
    def share(value: float) -> ShareRange:
        return ShareRange(value=value, low=value, high=value)

    overhead = parameters["overhead"]
    return EngineFit(
        device=device, basis=Basis.FITTED, note="engine level", stream_efficiency=share(parameters["stream"]),
        layer_overhead_s=SecondsRange(value=overhead, low=overhead, high=overhead),
        prefill_efficiency=share(parameters["prefill"]), coverage=COVERAGE, left_one_out={}, other_rows={}, rows=(),
        origins=(), software={},
    )  # fmt: skip


def edge_rows(path: Path) -> Iterator[Measured]:
    """Decode and prefill times of an edge table, as suite edge reads it."""
    columns, cases_of = _format_of(header_of(path), path)
    for index, row in enumerate(read_rows(path, columns)):
        for case in cases_of(row):
            device, model = find_device(case.device), find_preset(case.model)
            if case.rate is None or device is None or model is None or case.weights is None:
                continue
            stated = load_device(device).spec.bandwidth_bytes_per_s
            if case.bandwidth_bytes_per_s is not None and abs(case.bandwidth_bytes_per_s / stated - 1.0) > 0.03:
                continue
            is_decode = case.metric == "decode_tok_s"
            yield Measured(
                row=TableRow(file=path.name, row=index + 1),
                model=model,
                phase="decode" if is_decode else "prefill",
                seconds=(case.batch if is_decode else case.prompt) / case.rate,
                setup=Setup(model, device, "native", case.weights, 1, LLAMA_CPP),
                work=_decoding(case.batch, case.depth, case.generated)
                if is_decode
                else _prefilling(case.prompt, case.depth),
                source=row["source"],
            )


def mi300x_rows(path: Path) -> Iterator[Measured]:
    """Latency of whole batches: prompts, then decoding."""
    for index, row in enumerate(read_rows(path, ("model", "tp", "metric", "value"))):
        model, seconds = find_preset(row["model"].partition(" ")[0]), number(row, "value")
        if not row["metric"].startswith("batch latency") or model is None or seconds is None:
            continue
        isl, osl, batch = (whole(row, name) or 1 for name in ("isl", "osl", "num_prompts_or_batch"))
        setup = Setup(model, "mi300x", "fp8", "fp8", whole(row, "tp", 1) or 1, EngineSpec(gpu_memory_utilization=0.9))
        yield Measured(
            TableRow(file=path.name, row=index + 1),
            model,
            "decode",
            seconds,
            setup,
            _batch(batch, isl, osl),
            row["source"],
        )


def tpu_rows(path: Path) -> Iterator[Measured]:
    """Time per output token of a closed loop: a decode step and the prompts that come between two."""
    for index, row in enumerate(read_rows(path, ("tpu", "chips", "model", "mean_tpot_ms"))):
        model, device, seconds = find_preset(row["model"]), find_device(row["tpu"]), number(row, "mean_tpot_ms")
        chips, batch = whole(row, "chips"), whole(row, "concurrency")
        if model is None or device is None or not seconds or not chips or not batch:
            continue
        isl, osl = whole(row, "isl") or 1, whole(row, "osl") or 1
        setup = Setup(model, device, "native", None, chips, EngineSpec(gpu_memory_utilization=0.9))
        row_at = TableRow(file=path.name, row=index + 1)
        yield Measured(row_at, model, "decode", seconds / 1e3, setup, _closed_loop(batch, isl, osl), row["source"])


TRN2_CHIPS = 16
"""The tutorials that the tables are from run on one trn2.48xlarge, which has 16 chips."""
NEURON_MODELS = {
    "neuron_llama70b_perf_comparison.csv": "llama-3.3-70b",
    "neuron_llama405b_perf_comparison.csv": "llama-3.1-405b",
}
NEURON_SOURCE = "AWS Neuron documentation, NxD Inference tutorials for Trn2 (one trn2.48xlarge, batch 1, bf16)"
NEURON_CONTEXT = 1024


def neuron_rows(path: Path) -> Iterator[Measured]:
    """Time per output token without speculation, one sequence; the prompt's length is not stated and hardly matters."""
    for index, row in enumerate(read_rows(path, ("TPOT (P50 in ms)",))):
        seconds = number(row, "TPOT (P50 in ms)")
        if not next(iter(row.values())).lower().startswith("no speculative") or seconds is None:
            continue
        model = NEURON_MODELS[path.name]
        setup = Setup(model, "trainium2", "native", "bf16", TRN2_CHIPS, EngineSpec(gpu_memory_utilization=0.9))
        row_at = TableRow(file=path.name, row=index + 1)
        yield Measured(row_at, model, "decode", seconds / 1e3, setup, _decoding(1, NEURON_CONTEXT, 128), NEURON_SOURCE)


def _decoding(batch: int, depth: int, generated: int) -> Callable[[StepModel], float]:
    return lambda step: _mean_decode_s(step, batch, depth, generated)


def _prefilling(prompt: int, cached: int) -> Callable[[StepModel], float]:
    def work(step: StepModel) -> float:
        before_s = total_seconds(prefill_split(step, cached)) if cached else 0.0
        return total_seconds(prefill_split(step, cached + prompt)) - before_s

    return work


def _batch(batch: int, prompt: int, generated: int) -> Callable[[StepModel], float]:
    def work(step: StepModel) -> float:
        first_s = batch * total_seconds(prefill_split(step, prompt)) if batch * prompt > 8192 else total_seconds(
            prefill_split(step, batch * prompt)
        )  # fmt: skip
        return first_s + (generated - 1) * _mean_decode_s(step, batch, prompt, generated)

    return work


def _closed_loop(batch: int, prompt: int, generated: int) -> Callable[[StepModel], float]:
    def work(step: StepModel) -> float:
        prompts_per_step = batch / generated
        return _mean_decode_s(step, batch, prompt, generated) + prompts_per_step * total_seconds(
            prefill_split(step, prompt)
        )

    return work


def _mean_decode_s(step: StepModel, batch: int, depth: int, generated: int) -> float:
    at = np.linspace(0, max(generated - 1, 0), 3)
    return float(np.mean([total_seconds(decode_split(step, batch, depth + int(one), 0)) for one in at]))


def half_of(rows: Sequence[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Split by hash: (rows to fit, the others). By model where there are several, never more than half of the rows."""
    models = sorted({one.model for one in rows}, key=_digest)
    names = {one.model if len(models) > 1 else _row_name(one) for one in rows}
    count_of = {name: len({_row_name(one) for one in rows if name in (one.model, _row_name(one))}) for name in names}
    chosen: set[str] = set()
    for name in sorted(names, key=_digest):
        if sum(count_of[one] for one in (*chosen, name)) * 2 <= sum(count_of.values()):
            chosen.add(name)
    used = [one for one in rows if one.model in chosen or _row_name(one) in chosen]
    return used, [one for one in rows if one not in used]


def _row_name(one: Measured) -> str:
    return f"{one.row.file}#{one.row.row}"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def fit_parameters(rows: Sequence[Measured], middles: Mapping[str, float]) -> dict[str, float]:
    """Most likely parameters: soft-L1 errors of logarithms and priors that hold what the rows do not show."""
    low, high = (np.log([side[name] for name in NAMES]) for side in (LOWEST, HIGHEST))
    centre = np.log([middles[name] for name in NAMES])
    widths = np.asarray([PRIOR_WIDTHS[name] for name in NAMES])

    def named(values: np.ndarray) -> dict[str, float]:
        return {name: float(np.exp(value)) for name, value in zip(NAMES, values, strict=True)}

    def errors(values: np.ndarray) -> np.ndarray:
        parameters = named(values)
        misfit = np.asarray([np.log(one.predicted_s(parameters) / one.seconds) / ERROR_LOG for one in rows])
        softened = np.sign(misfit) * np.sqrt(2.0 * (np.sqrt(1.0 + misfit**2) - 1.0))
        return np.concatenate([softened, (values - centre) / widths])

    found = least_squares(
        errors, np.clip(centre, low + 1e-6, high - 1e-6), bounds=(low, high), diff_step=[1e-3] * len(NAMES), xtol=1e-5
    )
    return named(found.x)


def log_ratios(rows: Sequence[Measured], parameters: Mapping[str, float]) -> np.ndarray:
    """Logarithm of measured over predicted time."""
    return np.asarray([np.log(one.seconds / one.predicted_s(parameters)) for one in rows])


def leave_one_out(rows: Sequence[Measured], middles: Mapping[str, float]) -> np.ndarray:
    """Logarithm of measured over predicted time of each row, predicted from the others."""
    names = [_row_name(one) for one in rows]
    result = np.full(len(rows), np.nan)
    for name in dict.fromkeys(names):
        rest = [one for one, other in zip(rows, names, strict=True) if other != name]
        mine = [index for index, other in enumerate(names) if other == name]
        result[mine] = log_ratios([rows[index] for index in mine], fit_parameters(rest, middles))
    return result


def errors_of(ratios: np.ndarray) -> EngineErrors:
    """Errors of times from logarithms of measured over predicted."""
    if not len(ratios):
        return EngineErrors(n=0, median_ape=None, p90_ape=None, bias=None)
    ape = np.exp(-ratios) - 1.0
    return EngineErrors(
        n=len(ratios),
        median_ape=_rounded(np.median(np.abs(ape))),
        p90_ape=_rounded(np.quantile(np.abs(ape), 0.9)),
        bias=_rounded(np.median(ape)),
    )


MIN_BAND_ROWS = 5
FEW_ROWS_LOG = 0.30
"""Half-width (natural logarithm) where fewer than five rows are left to say how wide it is."""


def band_log(ratios: np.ndarray) -> float:
    """Half-width that holds the coverage of rows left out, widened for their number; a prior's without any."""
    if not len(ratios):
        return PRIOR_WIDTHS["prefill"]
    if len(ratios) < MIN_BAND_ROWS:
        return float(max(FEW_ROWS_LOG, 1.5 * np.max(np.abs(ratios), initial=0.0)))
    reach = min(1.0, COVERAGE * (len(ratios) + 1) / len(ratios))
    return float(max(SMALLEST_BAND_LOG, np.quantile(np.abs(ratios), reach)))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Group:
    """Devices that share one fit, and their rows."""

    name: str
    devices: tuple[str, ...]
    relatives: tuple[str, ...]
    """Devices without rows that take the fit over, with a wider band."""
    note: str
    tables: tuple[str, ...] = ()
    """Files to take rows from; all where empty. Others have another runtime on another part of the same chip."""


METAL = "llama.cpp Metal, 7B, batch 1"
APPLE_TABLES = ("apple_silicon_llama7b.csv",)
GROUPS = (
    Group("apple-m1", ("apple-m1", "apple-m1-pro", "apple-m1-max", "apple-m1-ultra"), (), METAL, APPLE_TABLES),
    Group("apple-m2", ("apple-m2", "apple-m2-pro", "apple-m2-max", "apple-m2-ultra"), (), METAL, APPLE_TABLES),
    Group(
        "apple-m3", ("apple-m3", "apple-m3-pro", "apple-m3-max", "apple-m3-ultra"),
        ("apple-m4", "apple-m4-pro", "apple-m4-max", "apple-m5", "apple-m5-max"), METAL, APPLE_TABLES,
    ),
    Group("gb10", ("gb10",), (), "llama.cpp CUDA"),
    Group("snapdragon-8-gen-3", ("snapdragon-8-gen-3",), (), "CPU kernels (ExecuTorch, llama.cpp), not the GPU"),
    Group("mi300x", ("mi300x",), ("mi250x", "mi325x", "mi355x"), "vLLM 0.9.1, tensor parallel over 8, fp8"),
    Group("tpu-v6e", ("tpu-v6e",), ("tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v7x"), "vLLM, tensor parallel over 8 chips"),
    Group("trainium2", ("trainium2",), ("trainium1", "trainium3", "inferentia2"), "NxD Inference, 16 chips, batch 1"),
)  # fmt: skip
TRANSFER_WIDENING = 2.0
"""Factor on a band's logarithm where a device takes over a relative's fit: none of them was ever checked."""


def read_all(data: Path) -> list[Measured]:
    """Every row that a fit could use."""
    edge, engines = data / "edge", data / "engine_tables"
    rows: list[Measured] = []
    for path in sorted(edge.glob("*.csv")):
        if "measured_gb_s" not in header_of(path):
            rows.extend(edge_rows(path))
    rows.extend(mi300x_rows(engines / "mi300x_vllm.csv"))
    rows.extend(tpu_rows(engines / "tpu_recipes_inference.csv"))
    for name in NEURON_MODELS:
        rows.extend(neuron_rows(engines / name))
    return rows


def fit_group(group: Group, rows: Sequence[Measured]) -> list[EngineFit]:
    """Fit a group's devices, and hand the fit on to its relatives."""
    used, others = half_of(rows)
    parameters = fit_parameters(used, PRIOR_MIDDLES)
    left_out = leave_one_out(used, PRIOR_MIDDLES)
    never_used = log_ratios(others, parameters)
    bands, left_one_out, other_rows = {}, {}, {}
    for phase in ("decode", "prefill"):
        mine = left_out[[one.phase == phase for one in used]] if used else left_out
        bands[phase] = band_log(mine)
        left_one_out[phase] = errors_of(mine)
        other_rows[phase] = errors_of(never_used[[one.phase == phase for one in others]])
    print(f"{group.name}: {len(used)} times of {len({_row_name(one) for one in used})} rows, {parameters}")
    for phase, width_log in bands.items():
        print(f"  {phase}: band {width_log:.2f} left one out {left_one_out[phase]} others {other_rows[phase]}")
        inside = np.abs(never_used[[one.phase == phase for one in others]]) <= width_log
        print(f"  {phase}: {inside.mean() if len(inside) else float('nan'):.2f} of {len(inside)} other rows in band")
    fits = []
    for device in (*group.devices, *group.relatives):
        own = device in group.devices
        widening = 1.0 if own else TRANSFER_WIDENING
        note = f"engine level: {group.note}" if own else f"engine level, taken over from {group.name}: {group.note}"
        fits.append(
            EngineFit(
                device=device,
                basis=Basis.FITTED if own else Basis.TRANSFERRED,
                note=note,
                stream_efficiency=_share(parameters["stream"], widening * bands["decode"]),
                layer_overhead_s=_seconds(parameters["overhead"], widening * bands["decode"]),
                prefill_efficiency=_share(parameters["prefill"], widening * bands["prefill"]),
                coverage=COVERAGE,
                left_one_out=left_one_out,
                other_rows=other_rows,
                rows=tuple(
                    sorted(
                        {(one.row.file, one.row.row): one.row for one in used}.values(), key=lambda r: (r.file, r.row)
                    )
                ),
                origins=tuple(sorted({one.source for one in used})),
                software={"kvsim": __version__, "numpy": version("numpy"), "scipy": version("scipy")},
            )
        )
    return fits


def _share(value: float, width_log: float) -> ShareRange:
    low, high = value * np.exp(-width_log), min(1.0, value * np.exp(width_log))
    return ShareRange(value=_rounded(value), low=_rounded(low), high=max(_rounded(high), _rounded(value)))


def _seconds(value: float, width_log: float) -> SecondsRange:
    return SecondsRange(
        value=_rounded(value), low=_rounded(value * np.exp(-width_log)), high=_rounded(value * np.exp(width_log))
    )


def main() -> None:
    """Fit, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the public data, such as ../shared/data")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "calibration" / "engine")
    parser.add_argument("--only", help="name of one group")
    options = parser.parse_args()
    rows = read_all(options.data)
    fits = []
    for group in GROUPS:
        if options.only not in (None, group.name):
            continue
        mine = [
            one
            for one in rows
            if one.setup.device in group.devices and (not group.tables or one.row.file in group.tables)
        ]
        fits.extend(fit_group(group, mine))
    if options.only is None:
        for path in options.out.glob("*.json"):
            path.unlink()
    for fit in fits:
        fit.save(options.out)
    print(f"{len(fits)} fits in {options.out}")


if __name__ == "__main__":
    main()
