"""Suite engine-tables: published TTFT, TPOT and throughput of serving engines, aggregated serving only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvsim.errors import InvalidSpec, KvsimError
from kvsim.model_catalog import load_model
from kvsim.specs.workload import (
    BurstArrivals,
    ConcurrencyArrivals,
    ConstantLengths,
    Lengths,
    SyntheticWorkload,
    UniformLengths,
)
from kvsim.validation.deployments import deploy, fitted_rows, play
from kvsim.validation.engine_rows import (
    FITTED,
    OFFLINE_SEQS,
    OTHER_SUITES,
    OTHER_TABLE,
    SILICON,
    TABLES,
    Case,
    MapRow,
)
from kvsim.validation.pool import predictions
from kvsim.validation.suite import Options, Result, Tally, locate
from kvsim.validation.tables import Row, header_of, read_rows
from kvsim.workloads import build_requests

NO_PREDICTION: Final = "figure that the simulated load does not have, such as a TPOT of one token (counted in figures)"
REPEATED: Final = "measurement that another row repeats to the last digit"
SCOPE: Final = "dense, H100 and B200"
SCOPE_DEVICES: Final = ("h100-sxm", "b200-sxm")
Measurement = tuple[int, int, float, float]
"""Input length, output length, TTFT and TPOT."""
ROUNDS: Final = 10
"""Requests per client of a closed loop, as both harnesses of the silicon sample send; all of them count."""
MAX_REQUESTS: Final = 20_480
OFFLINE_ROUNDS: Final = 3
"""Offline runs send this many times what may run at once, so that start and end weigh little."""


@dataclass(frozen=True)
class EngineTables:
    """TTFT, TPOT and output tokens per second by model, device, engine, batch and ranks."""

    name: str = "engine-tables"
    metrics: tuple[str, ...] = ("ttft", "tpot", "output_tok_s")

    def run(self, data: Path, options: Options) -> Result:
        """Score every table; see `kvsim.validation.suite.Suite`."""
        tally, cases = Tally(), []
        used = fitted_rows(options)
        seen: set[Measurement] = set()
        for path in locate(data, self.name, ("engine_tables",), ("*.csv",)):
            rows, map_row = _read_table(path, tally)
            for index, row in enumerate(rows):
                mapped = FITTED if (path.name, index + 1) in used else map_row(row, options)
                if not isinstance(mapped, str):
                    mapped = REPEATED if _repeats(mapped, seen) else mapped
                if isinstance(mapped, str):
                    tally.skip(mapped)
                else:
                    cases.append(mapped)
        if not cases and not tally.result(self).skipped:
            msg = f"--data: {data}: no row to score"
            raise InvalidSpec(msg)
        for case, answer in predictions(tally, _predicted, cases, options):
            tally.rows += 1
            setup = case.setup
            groups = {**case.groups, "device": setup.device, "model": setup.model, "ranks": f"{setup.ranks}"}
            groups |= _scope(case)
            for metric, value in answer.items():
                tally.add(metric, case.measured[metric], value, **groups)
            tally.skip(NO_PREDICTION, len(case.measured) - len(answer))
        return tally.result(self)


SUITE: Final = EngineTables()


def _repeats(case: Case, seen: set[Measurement]) -> bool:
    """Whether a TTFT and a TPOT equal to the last digit were there before: one measurement, exported twice."""
    if not {"ttft", "tpot"} <= set(case.measured):
        return False
    key = (case.isl, case.osl, case.measured["ttft"], case.measured["tpot"])
    repeated = key in seen
    seen.add(key)
    return repeated


def _scope(case: Case) -> dict[str, str]:
    """Groups of the rows that the targets of this suite were set for."""
    if case.setup.device not in SCOPE_DEVICES or case.groups["table"] != SILICON:
        return {}
    if load_model(case.setup.model).moe is not None:
        return {}
    return {"scope": SCOPE, "scope and backend": f"{SCOPE}, {case.groups['backend']}"}


def _read_table(path: Path, tally: Tally) -> tuple[list[Row], MapRow]:
    header = header_of(path)
    if any(name in header for name in OTHER_SUITES):
        tally.skip(OTHER_TABLE, len(read_rows(path, ())))
        return [], TABLES[0][1]
    columns, map_row = max(TABLES, key=lambda table: sum(name in header for name in table[0]) / len(table[0]))
    if sum(name in header for name in columns) * 2 < len(columns):
        msg = f"{path}: not a table of engine latencies or rates (columns: {', '.join(header[:8])})"
        raise InvalidSpec(msg)
    return read_rows(path, columns), map_row


def _predicted(job: tuple[Case, str, str | None]) -> dict[str, float] | str:
    """Predicted values of a case's metrics, those without one left out; or why there are none."""
    case, calibration, as_unseen = job
    try:
        deployment = deploy(case.setup, Options(as_unseen, calibration))
        found = play(deployment, build_requests(_workload(case), seed=0)).outcome
    except KvsimError as error:
        return f"cannot be deployed: {type(error).__name__}"
    values = {
        "ttft": found.ttft.mean_s, "tpot": found.tpot.mean_s,
        "output_tok_s": found.output_tokens / found.duration_s if found.duration_s else None,
    }  # fmt: skip
    return {metric: value for metric in case.measured if (value := values[metric])}


def _workload(case: Case) -> SyntheticWorkload:
    if case.concurrency is None:
        count = case.requests or OFFLINE_ROUNDS * OFFLINE_SEQS
        arrivals: BurstArrivals | ConcurrencyArrivals = BurstArrivals()
    else:
        count = max(case.concurrency, min(ROUNDS * case.concurrency, MAX_REQUESTS))
        arrivals = ConcurrencyArrivals(max_concurrency=case.concurrency)
    return SyntheticWorkload(
        num_prompts=count,
        input_len=_lengths(case.isl, case.spread),
        output_len=_lengths(case.osl, case.spread),
        arrivals=arrivals,
    )


def _lengths(tokens: int, spread: float) -> Lengths:
    if spread >= 1.0:
        return ConstantLengths(tokens=tokens)
    return UniformLengths(min_tokens=max(1, int(tokens * spread)), max_tokens=tokens)
