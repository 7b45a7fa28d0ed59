"""Suite edge: decode and prefill rates of llama.cpp and phone runtimes, one sequence or a batch, without a queue."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from kvsim.errors import InvalidSpec, KvsimError
from kvsim.specs.engine import EngineSpec
from kvsim.validation.deployments import Setup, SingleStream, deploy, find_device, find_preset, fitted_rows
from kvsim.validation.suite import NO_FIGURE, Options, Result, Tally, locate
from kvsim.validation.tables import Row, header_of, number, read_rows, whole

UNKNOWN_DEVICE: Final = "device without a spec"
UNKNOWN_MODEL: Final = "model without a preset"
UNKNOWN_WEIGHTS: Final = "weight format that is not modelled"
OTHER_UNSEEN: Final = "device other than the one treated as unseen"
NOT_RATES: Final = "bandwidth table, no token rates"
OTHER_BANDWIDTH: Final = "part of the chip's name with another bandwidth than the spec's"
FITTED: Final = "row that an engine-level fit was made from"
ENGINE: Final = EngineSpec(kind="llamacpp", max_num_batched_tokens=2048)
"""llama.cpp's default logical batch (``-b 2048``)."""
_SHORT = 512


@dataclass(frozen=True)
class Case:
    """One measured rate: tokens per second over all sequences, decoding at or prefilling after `depth` tokens."""

    model: str
    weights: str | None
    device: str
    metric: str
    rate: float | None
    runtime: str
    prompt: int
    generated: int
    depth: int = 0
    batch: int = 1
    bandwidth_bytes_per_s: float | None = None


def _apple(row: Row) -> Iterator[Case]:
    bandwidth = number(row, "bw_gb_s")
    for weights in ("f16", "q8_0", "q4_0"):
        for metric, column in (("prefill_tok_s", f"{weights}_pp512"), ("decode_tok_s", f"{weights}_tg128")):
            yield Case(
                _llama_2(row["model"]), weights, f"apple-{row['chip']}", metric, number(row, column),
                "llama.cpp", 512, 128, bandwidth_bytes_per_s=bandwidth and bandwidth * 1e9,
            )  # fmt: skip


def _llama_2(model: str) -> str:
    return "llama-2-7b" if re.search(r"llama[ -]*2?[ -]*7b", model.lower()) else model


def _scoreboard(row: Row) -> Iterator[Case]:
    weights = _weights(row["model"])
    for metric, column in (("prefill_tok_s", "pp512"), ("decode_tok_s", "tg128")):
        yield Case(
            _llama_2(row["model"]), weights, row["gpu"], metric, number(row, column),
            f"llama.cpp {row['backend']}", 512, 128,
        )  # fmt: skip


def _spark_depth(row: Row) -> Iterator[Case]:
    model, weights, depth = _name(row["model"]), _weights(row["model"]), whole(row, "depth", 0) or 0
    for metric, column in (("prefill_tok_s", "pp2048_t_s"), ("decode_tok_s", "tg32_t_s")):
        yield Case(model, weights, row["device"], metric, number(row, column), "llama.cpp", 2048, 32, depth)


def _spark_batched(row: Row) -> Iterator[Case]:
    model, weights = _name(row["model"]), _weights(row["model"])
    prompt, batch = whole(row, "pp", _SHORT) or _SHORT, whole(row, "batch", 1) or 1
    for metric, column in (("prefill_tok_s", "s_pp_t_s"), ("decode_tok_s", "s_tg_t_s")):
        depth = prompt if metric == "decode_tok_s" else 0
        yield Case(model, weights, row["device"], metric, number(row, column), "llama.cpp", prompt, 32, depth, batch)


def _phone(row: Row) -> Iterator[Case]:
    weights = _weights(row["quant"])
    found = re.search(r"(\d+) prefill / (\d+) decode", row.get("source", ""))
    prompt, generated = (int(found[1]), int(found[2])) if found else (64, 128)
    device = row["soc"] if find_device(row["soc"]) else row["device"]
    for metric, column in (("prefill_tok_s", "prefill_tok_s"), ("decode_tok_s", "decode_tok_s")):
        yield Case(row["model"], weights, device, metric, number(row, column), row["runtime"], prompt, generated)


def _name(model: str) -> str:
    """Model of a llama.cpp row, without its weight format."""
    return re.sub(r"\s+(q\d\S*|mxfp4|f16|bf16|iq\d\S*)\b.*$", "", model.strip(), flags=re.IGNORECASE)


def _weights(text: str) -> str | None:
    """Weight format that a row names: a key of WEIGHT_FORMATS, None where not modelled."""
    lower = text.lower()
    for sign, form in _WEIGHT_SIGNS:
        if re.search(rf"(?<![a-z0-9]){sign}(?![a-z0-9_])", lower):
            return form
    return None


_WEIGHT_SIGNS: Final = (
    ("mxfp4", "unpacked"), ("q8_0", "q8_0"), ("q4_0", "q4_0"), ("bf16", "bf16"), ("f16", "f16"), ("4-bit", "int4"),
    ("int4", "int4"), ("w4a16", "int4"), ("q4", "q4_0"),
)  # fmt: skip
_TABLES: Final[tuple[tuple[tuple[str, ...], Callable[[Row], Iterator[Case]]], ...]] = (
    (("chip", "bw_gb_s", "f16_pp512", "f16_tg128", "q8_0_pp512", "q8_0_tg128", "q4_0_tg128", "model"), _apple),
    (("gpu", "backend", "pp512", "tg128", "model"), _scoreboard),
    (("model", "depth", "pp2048_t_s", "tg32_t_s", "device"), _spark_depth),
    (("pp", "batch", "s_pp_t_s", "s_tg_t_s", "model", "device"), _spark_batched),
    (("device", "soc", "runtime", "model", "quant", "prefill_tok_s", "decode_tok_s"), _phone),
)  # fmt: skip
"""Formats by their columns."""
_BANDWIDTH_COLUMNS: Final = ("soc", "measured_gb_s")


@dataclass(frozen=True)
class EdgeSuite:
    """Tokens per second on laptops, phones, mini-PCs and single GPUs."""

    name: str = "edge"
    metrics: tuple[str, ...] = ("decode_tok_s", "prefill_tok_s")

    def run(self, data: Path, options: Options) -> Result:
        """Score every table; see `kvsim.validation.suite.Suite`."""
        paths = locate(data, self.name, ("edge",), ("*.csv",))
        tally, used = Tally(), fitted_rows(options)
        for position, path in enumerate(paths):
            _score_table(path, tally, options, used)
            if options.progress is not None:
                options.progress((position + 1) / len(paths))
        if not tally.samples and not tally.result(self).skipped:
            msg = f"--data: {data}: no row to score"
            raise InvalidSpec(msg)
        return tally.result(self)


SUITE: Final = EdgeSuite()


def _score_table(path: Path, tally: Tally, options: Options, used: frozenset[tuple[str, int]]) -> None:
    header = header_of(path)
    if all(name in header for name in _BANDWIDTH_COLUMNS):
        tally.skip(NOT_RATES, len(read_rows(path, _BANDWIDTH_COLUMNS)))
        return
    columns, cases_of = _format_of(header, path)
    for index, row in enumerate(read_rows(path, columns)):
        if (path.name, index + 1) in used:
            tally.skip(FITTED)
            continue
        before = len(tally.samples)
        for case in cases_of(row):
            _score_case(case, tally, options)
        tally.rows += len(tally.samples) > before


def _format_of(header: list[str], path: Path) -> tuple[tuple[str, ...], Callable[[Row], Iterator[Case]]]:
    columns, cases_of = max(_TABLES, key=lambda table: sum(name in header for name in table[0]) / len(table[0]))
    if sum(name in header for name in columns) * 2 < len(columns):
        msg = f"{path}: not a table of edge token rates (columns: {', '.join(header[:8])})"
        raise InvalidSpec(msg)
    return columns, cases_of


def _score_case(case: Case, tally: Tally, options: Options) -> None:
    device, model = find_device(case.device), find_preset(_name(case.model))
    if case.rate is None:
        tally.skip(NO_FIGURE)
    elif device is None:
        tally.skip(UNKNOWN_DEVICE)
    elif options.as_unseen not in (None, device):
        tally.skip(OTHER_UNSEEN)
    elif model is None:
        tally.skip(UNKNOWN_MODEL)
    elif case.weights is None:
        tally.skip(UNKNOWN_WEIGHTS)
    else:
        _predict(case, device, model, tally, options)


def _predict(case: Case, device: str, model: str, tally: Tally, options: Options) -> None:
    try:
        stream = _stream(Setup(model, device, "native", case.weights, 1, ENGINE), options)
    except KvsimError as error:
        tally.skip(f"cannot be deployed: {type(error).__name__}")
        return
    stated = stream.step.deployment.device.bandwidth_bytes_per_s
    if case.bandwidth_bytes_per_s is not None and abs(case.bandwidth_bytes_per_s / stated - 1.0) > 0.03:
        tally.skip(OTHER_BANDWIDTH)
        return
    if case.metric == "decode_tok_s":
        predicted = case.batch / stream.mean_decode_s(case.batch, case.depth, case.generated)
    else:
        # A batch of prompts is one after another: the rate is that of one.
        predicted = case.prompt / stream.prefill_s(case.prompt, case.depth)
    groups = {"device": device, "runtime": case.runtime, "weights": case.weights or "", "model": model}
    tally.add(case.metric, case.rate or 0.0, predicted, **groups)


@lru_cache(maxsize=256)
def _cached_stream(setup: Setup, calibration: str, as_unseen: str | None) -> SingleStream:
    return SingleStream.of(deploy(setup, Options(as_unseen, calibration)))


def _stream(setup: Setup, options: Options) -> SingleStream:
    return _cached_stream(setup, options.calibration, options.as_unseen)
