"""Suite kv-quant: what a KV-cache format changes, as a ratio to the plain cache of the same rows.

A row's ratio is its value over that of the 16-bit row with the same GPU, engine, model, workload and metric, on either
side: measured over measured, predicted over predicted. ``direction`` is the share of rows where predicted and measured
lie on the same side of one; capacities, which can only rise, and differences within the noise are left out of it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvsim.errors import InvalidSpec, KvsimError
from kvsim.specs.engine import EngineSpec
from kvsim.specs.workload import BurstArrivals, ConcurrencyArrivals, ConstantLengths, SyntheticWorkload
from kvsim.validation.deployments import Setup, SingleStream, deploy, find_device, find_preset, kv_tokens, play
from kvsim.validation.engine_rows import OTHER_TABLE
from kvsim.validation.pool import predictions
from kvsim.validation.suite import DIRECTION, NO_FIGURE, Options, Result, Tally, locate
from kvsim.validation.tables import Row, header_of, number, read_rows
from kvsim.workloads import build_requests

UNKNOWN_DEVICE: Final = "device without a spec, or not stated"
UNKNOWN_MODEL: Final = "model without a preset, or not stated"
OTHER_UNSEEN: Final = "device other than the one treated as unseen"
WEIGHTS_TOO: Final = "scheme that changes the weights as well"
UNKNOWN_SCHEME: Final = "KV format that is not modelled"
UNKNOWN_WORKLOAD: Final = "workload not stated in full"
UNKNOWN_METRIC: Final = "metric that is not modelled"
NO_BASE: Final = "no 16-bit row to compare with"
NO_PREDICTION: Final = "figure that the simulated load does not have, such as a TPOT of one token"
BASE_ROW: Final = "16-bit row that others are compared with"
NO_DIFFERENCE: Final = "measured difference within 2 %: no direction to be right about (row counts in ratio)"
NOISE: Final = 0.02
BASE_SCHEMES: Final = ("bf16", "fp16", "baseline", "auto", "f16/f16")
SCHEMES: Final[Mapping[str, str]] = {
    "fp8": "fp8", "fp8kv": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8_e5m2",
    "fp8_per_token_head": "fp8_per_token_head", "int8_per_token_head": "int8_per_token_head",
    "int4_per_token_head": "int4_per_token_head", "turboquant_k8v4": "turboquant_k8v4",
    "turboquant_4bit_nc": "turboquant_4bit_nc", "turboquant_k3v4_nc": "turboquant_k3v4_nc",
    "turboquant_3bit_nc": "turboquant_3bit_nc", "nvfp4": "nvfp4", "mxfp4": "mxfp4", "kivi-2": "kivi-2",
    "kivi-4": "kivi-4",
}  # fmt: skip
"""Strategy of kvsim by the first word of a scheme."""
CAPACITY: Final = ("kv capacity",)
METRICS: Final[Mapping[str, str]] = {
    "kv capacity": "capacity", "request throughput": "rate", "output throughput": "rate", "duration": "duration",
    "mean TPOT": "tpot", "TPOT": "tpot", "mean TTFT": "ttft", "median TTFT": "ttft_median", "median ITL": "itl_median",
    "ITL slope": "itl_slope", "ITL intercept": "itl_intercept",
}  # fmt: skip
"""What predicts a metric, by its name in the table."""
SHORT_TOKENS, LONG_TOKENS = 1024, 32_768
"""Contexts between which slopes of the time between tokens are taken."""
MAX_REQUESTS: Final = 2048
_COLUMNS: Final = ("gpu", "engine", "model", "workload", "kv_scheme", "metric", "value")


@dataclass(frozen=True)
class Load:
    """Requests of a workload's description; None where it states no such thing."""

    isl: int
    osl: int
    concurrency: int | None
    requests: int


@dataclass(frozen=True)
class _Pair:
    """A row and its base."""

    setup: Setup
    base: Setup
    quantity: str
    load: Load | None
    ratio: float
    groups: Mapping[str, str]


def read_load(text: str) -> Load | None:
    """Read a workload such as ``random 512->128, 1500 prompts, conc 80``; None where lengths or load are missing."""
    lower = text.lower().replace("~", "")
    lengths = (
        re.search(r"([\d.]+k?)\s*(?:->|/)\s*([\d.]+k?)(?![\d.]*\s*(?:req|prompt))", lower)
        or re.search(r"isl\s*([\d.]+k?)\D+osl\s*([\d.]+k?)", lower)
        or re.search(r"([\d.]+k?) in\s*/\s*([\d.]+k?) out", lower)
    )
    clients = re.search(r"(?:conc(?:urrency)?|\bc)\s*(\d+)", lower)
    if lengths is None or clients is None:
        return None
    requests = re.search(r"(\d+)\s*(?:prompts|req)", lower) or re.search(r"\bn(\d+)", lower)
    concurrency = int(clients[1])
    count = int(requests[1]) if requests else 4 * concurrency
    return Load(_tokens(lengths[1]), _tokens(lengths[2]), concurrency, min(max(count, concurrency), MAX_REQUESTS))


def _tokens(text: str) -> int:
    return round(float(text[:-1]) * 1024) if text.endswith("k") else round(float(text))


@dataclass(frozen=True)
class KvQuant:
    """Ratios of KV formats to the plain cache."""

    name: str = "kv-quant"
    metrics: tuple[str, ...] = ("ratio", DIRECTION)

    def run(self, data: Path, options: Options) -> Result:
        """Score every table; see `kvsim.validation.suite.Suite`."""
        tally = Tally()
        pairs = []
        paths = locate(data, self.name, ("engine_tables",), ("*.csv",))
        for path in paths:
            pairs += _pairs(_read_table(path, tally, alone=len(paths) == 1), tally, options)
        if not pairs and not tally.result(self).skipped:
            msg = f"--data: {data}: no row to score"
            raise InvalidSpec(msg)
        for pair, answer in predictions(tally, _predicted, pairs, options):
            tally.rows += 1
            tally.add("ratio", pair.ratio, answer, **pair.groups)
            if pair.quantity == "capacity":
                continue
            if abs(pair.ratio - 1.0) < NOISE:
                tally.skip(NO_DIFFERENCE)
            else:
                tally.add(DIRECTION, pair.ratio, answer, **pair.groups)
        return tally.result(self)


SUITE: Final = KvQuant()


def _read_table(path: Path, tally: Tally, *, alone: bool) -> list[Row]:
    """Rows in the columns of the engine table; llama.cpp's table of KV types is brought into them.

    A table of another kind is skipped among others, and an error where it is the only one.
    """
    header = header_of(path)
    if "kv_scheme" in header:
        return read_rows(path, _COLUMNS)
    if "kv_type_k/v" in header:
        rows = read_rows(path, ("gpu", "engine", "model", "kv_type_k/v", "depth", "value", "metric"))
        return [row | {"kv_scheme": row["kv_type_k/v"], "workload": f"depth {row['depth']}"} for row in rows]
    if alone:
        wanted, found = ", ".join(_COLUMNS), ", ".join(header[:8])
        msg = f"{path}: column 'kv_scheme' is missing; this table needs {wanted} (got {found})"
        raise InvalidSpec(msg)
    tally.skip(OTHER_TABLE, len(read_rows(path, ())))
    return []


def _pairs(rows: list[Row], tally: Tally, options: Options) -> list[_Pair]:
    """Match rows with their base; the others are skipped by name."""
    members: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        members[tuple(row[name] for name in ("gpu", "engine", "model", "workload", "metric"))].append(row)
    pairs = []
    for group in members.values():
        bases = [row for row in group if row["kv_scheme"].lower() in BASE_SCHEMES]
        base = number(bases[0], "value") if bases else None
        tally.skip(BASE_ROW, len(bases))
        for row in group:
            if row in bases:
                continue
            mapped = _pair(row, base, options)
            if isinstance(mapped, str):
                tally.skip(mapped)
            else:
                pairs.append(mapped)
    return pairs


def _pair(row: Row, base: float | None, options: Options) -> _Pair | str:
    scheme, value = row["kv_scheme"].strip().lower(), number(row, "value")
    device, model = find_device(row["gpu"]), find_preset(row["model"])
    quantity = METRICS.get(row["metric"].removesuffix(" s"))
    load = read_load(row["workload"])
    reasons = (
        (re.search(r"fp8 model|w\d+a\d+", scheme) is not None or scheme.endswith("-fp16"), WEIGHTS_TOO),
        (scheme.split()[0] not in SCHEMES, UNKNOWN_SCHEME),
        (device is None, UNKNOWN_DEVICE),
        (options.as_unseen not in (None, device), OTHER_UNSEEN),
        (model is None, UNKNOWN_MODEL),
        (value is None, NO_FIGURE),
        (base is None, NO_BASE),
        (quantity is None, UNKNOWN_METRIC),
        (load is None and quantity not in ("capacity", "itl_slope", "itl_intercept"), UNKNOWN_WORKLOAD),
    )
    for applies, reason in reasons:
        if applies:
            return reason
    ranks = int(found[1]) if (found := re.search(r"\bTP(\d+)\b", row["gpu"])) else 1
    weights = "fp8" if row["model"].upper().endswith("-FP8") else None
    seats = max(256, load.concurrency or 0) if load else 256
    engine = EngineSpec(gpu_memory_utilization=0.9, max_num_seqs=seats)
    plain = Setup(str(model), str(device), "native", weights, ranks, engine)
    coded = Setup(str(model), str(device), SCHEMES[scheme.split()[0]], weights, ranks, engine)
    groups = {"device": plain.device, "scheme": coded.strategy, "quantity": str(quantity), "model": plain.model}
    return _Pair(coded, plain, str(quantity), load, float(value or 0.0) / float(base or 1.0), groups)


def _predicted(job: tuple[_Pair, str, str | None]) -> float | str:
    """Predicted ratio, or why there is none."""
    pair, calibration, as_unseen = job
    options = Options(as_unseen, calibration)
    try:
        mine, plain = (_quantity(setup, pair.quantity, pair.load, options) for setup in (pair.setup, pair.base))
    except KvsimError as error:
        return f"cannot be deployed: {type(error).__name__}"
    return mine / plain if mine and plain else NO_PREDICTION


def _quantity(setup: Setup, quantity: str, load: Load | None, options: Options) -> float:
    deployment = deploy(setup, options)
    if quantity == "capacity":
        return kv_tokens(deployment)
    if quantity in ("itl_slope", "itl_intercept"):
        stream = SingleStream.of(deployment)
        short_s, long_s = stream.decode_s(1, SHORT_TOKENS), stream.decode_s(1, LONG_TOKENS)
        slope_s = (long_s - short_s) / (LONG_TOKENS - SHORT_TOKENS)
        return slope_s if quantity == "itl_slope" else short_s - slope_s * SHORT_TOKENS
    if load is None:
        raise ValueError(UNKNOWN_WORKLOAD)
    found = play(deployment, build_requests(_workload(load), seed=0)).outcome
    value = {
        "rate": found.output_tokens / found.duration_s, "duration": found.duration_s, "tpot": found.tpot.mean_s,
        "ttft": found.ttft.mean_s, "ttft_median": found.ttft.median_s, "itl_median": found.itl.median_s,
    }[quantity]  # fmt: skip
    return float(value or 0.0)


def _workload(load: Load) -> SyntheticWorkload:
    arrivals = ConcurrencyArrivals(max_concurrency=load.concurrency) if load.concurrency else BurstArrivals()
    return SyntheticWorkload(
        num_prompts=load.requests,
        input_len=ConstantLengths(tokens=load.isl),
        output_len=ConstantLengths(tokens=load.osl),
        arrivals=arrivals,
    )
