"""Leave each measured device out in turn, and say how wrong predictions from the others are.

    python tools/leave_one_device_out.py ../shared/data [--all-kernels]

Writes ``calibration/transfer/errors.json`` (quantiles per device, which bands of transferred predictions come from) and
the tables of docs/calibration-transfer.md. Donors are the artefacts of the default set; rows are read from the
tables, where they were left when the artefacts were fitted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402 - after the threads are set
import polars as pl  # noqa: E402

from kvsim.calibration.artefact import Artefact  # noqa: E402
from kvsim.calibration.choice import default_ids  # noqa: E402
from kvsim.calibration.fit import cold_share, shape_of  # noqa: E402
from kvsim.calibration.sets import load_set  # noqa: E402
from kvsim.calibration.shapes import BOUNDS, binding_terms  # noqa: E402
from kvsim.calibration.tables import read_tables  # noqa: E402
from kvsim.calibration.timings import KEY_COLUMNS  # noqa: E402
from kvsim.calibration.transfer import find_donors, transferred  # noqa: E402
from kvsim.calibration.transfer_errors import LEVELS, DeviceErrors, ErrorsFile, band_of, others  # noqa: E402
from kvsim.device_catalog import load_device  # noqa: E402
from kvsim.documents import write_atomic  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[1]
TABLES = ("kernel_timings", "vllm_requests/profile_RTX4090")
MAX_ROWS = 6000
"""Rows scored per kernel and format, drawn with a fixed seed."""
MARK = "<!-- From here on written by tools/leave_one_device_out.py. -->"
TARGETS = {"bandwidth": 0.12, "instructions": 0.25}
NOTE = (
    "Written by tools/leave_one_device_out.py: do not edit. log_quantiles are those of log(measured / predicted), each "
    "device predicted from all others. Computed from public tables (Apache-2.0 and MIT, see the artefacts' origins)."
)


@dataclass(frozen=True)
class Scored:
    """Rows of one kernel on a device that was left out."""

    artefact: Artefact
    predicted_s: np.ndarray
    measured_s: np.ndarray
    is_cold: np.ndarray
    bound_by: np.ndarray
    num_donors: int


def rows_by_key(data: Path) -> dict[tuple[str, ...], pl.DataFrame]:
    """Rows of every table by KEY_COLUMNS."""
    rows: dict[tuple[str, ...], pl.DataFrame] = {}
    for table in TABLES:
        for timings in read_tables(data / table):
            for key, part in timings.frame.group_by(KEY_COLUMNS, maintain_order=True):
                rows[tuple(str(value) for value in key)] = part
    return rows


def score(artefacts: Sequence[Artefact], one: Artefact, rows: pl.DataFrame) -> Scored | None:
    """Predict one kernel's rows from artefacts of other devices."""
    spec = load_device(one.device).spec
    wanted = (one.operation, one.dtype, one.kv_dtype)
    predictor = transferred(artefacts, spec, *wanted, kernel=one.kernel)
    if predictor is None:
        return None
    if len(rows) > MAX_ROWS:
        rows = rows.sample(MAX_ROWS, seed=0)
    shape = shape_of(rows, one.operation)
    is_cold = cold_share(predictor.law, shape, predictor.key, predictor.facts) >= 1.0
    donors = find_donors(artefacts, spec, *wanted, one.kernel)
    return Scored(
        one, predictor.seconds(shape), rows["seconds"].to_numpy(), is_cold, binding_terms(predictor, shape), len(donors)
    )


def score_all(artefacts: Sequence[Artefact], data: Path, all_kernels: bool) -> Iterator[Scored]:
    """Score every default kernel, or every kernel."""
    rows, defaults = rows_by_key(data), default_ids(artefacts)
    for one in artefacts:
        key = tuple(str(getattr(one, name)) for name in KEY_COLUMNS)
        if key in rows and (all_kernels or one.id in defaults):
            scored = score(artefacts, one, rows[key])
            if scored is not None:
                yield scored


def entries_of(scored: Scored) -> Iterator[DeviceErrors]:
    """Errors by domain, as they are stored."""
    ratios = np.log(scored.measured_s / scored.predicted_s)
    one = scored.artefact
    for domain, part in (("cold", scored.is_cold), ("cached", ~scored.is_cold)):
        if part.any():
            error = np.exp(-ratios[part]) - 1.0
            yield DeviceErrors(
                device=one.device, operation=one.operation, kernel=one.kernel, dtype=one.dtype, kv_dtype=one.kv_dtype,
                domain=domain, n=int(part.sum()), median_ape=_rounded(np.median(np.abs(error))),
                p90_ape=_rounded(np.quantile(np.abs(error), 0.9)), bias=_rounded(np.median(error)),
                log_quantiles=tuple(_rounded(value) for value in np.quantile(ratios[part], LEVELS)),
            )  # fmt: skip


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def print_table(results: Sequence[Scored]) -> None:
    """Markdown: one line per device, operation and format; cold calls by what binds them, then calls from cache."""
    print("| device | operation | format | kernel | donors | binds | n | median | p90 | bias | target |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for scored in results:
        one = scored.artefact
        error = scored.predicted_s / scored.measured_s - 1.0
        parts = [(bound, scored.is_cold & (scored.bound_by == bound)) for bound in BOUNDS] + [
            ("cached", ~scored.is_cold)
        ]
        for bound, part in parts:
            if not part.any():
                continue
            median, target = float(np.median(np.abs(error[part]))), TARGETS.get(bound)
            met = "" if target is None else "met" if median <= target else f"missed ({target:.0%})"
            print(
                f"| {one.device} | {one.operation} | {one.dtype}{'/' + one.kv_dtype if one.kv_dtype else ''} | "
                f"{one.kernel} | {scored.num_donors} | {bound} | {part.sum()} | {median:.1%} | "
                f"{np.quantile(np.abs(error[part]), 0.9):.1%} | {np.median(error[part]):+.1%} | {met} |"
            )


def print_summary(results: Sequence[Scored]) -> None:
    """Medians over devices and formats by operation, and how many of them meet the target."""
    print("\n| operation | binds | devices and formats | median of medians | of all rows | target | met by |")
    print("|---|---|---|---|---|---|---|")
    for operation in dict.fromkeys(scored.artefact.operation for scored in results):
        for bound in BOUNDS:
            errors = [
                np.abs(s.predicted_s / s.measured_s - 1.0)[s.is_cold & (s.bound_by == bound)]
                for s in results
                if s.artefact.operation == operation
            ]
            medians = [float(np.median(error)) for error in errors if len(error)]
            if medians:
                target = TARGETS.get(bound)
                met = sum(median <= target for median in medians) if target else None
                print(
                    f"| {operation} | {bound} | {len(medians)} | {np.median(medians):.1%} | "
                    f"{np.median(np.concatenate(errors)):.1%} | {'' if target is None else f'{target:.0%}'} | "
                    f"{'' if met is None else f'{met} of {len(medians)}'} |"
                )


def print_coverage(entries: Sequence[DeviceErrors]) -> None:
    """Share of each device's rows within the band that the others give, from stored quantiles."""
    print("\n| operation | format | domain | devices | band | coverage by device | mean |")
    print("|---|---|---|---|---|---|---|")
    everything: list[float] = []
    for key in dict.fromkeys((e.operation, e.dtype, e.kv_dtype, e.domain) for e in entries):
        mine = [e for e in entries if (e.operation, e.dtype, e.kv_dtype, e.domain) == key]
        shares = {}
        for left in mine:
            found = others(entries, *key[:3], left.device, key[3])
            if not found:
                continue
            band = band_of([np.asarray(e.log_quantiles) for e in found])
            quantiles = np.asarray(left.log_quantiles)
            shares[left.device] = float(((quantiles >= band.log_low) & (quantiles <= band.log_high)).mean())
        everything.extend(shares.values())
        if not shares:
            continue
        band = band_of([np.asarray(e.log_quantiles) for e in others(entries, *key[:3], "", key[3])])
        by_device = ", ".join(f"{device} {share:.0%}" for device, share in shares.items())
        formats = f"{key[1]}{'/' + key[2] if key[2] else ''}"
        print(
            f"| {key[0]} | {formats} | {key[3]} | {len(mine)} | "
            f"{np.exp(band.log_low):.2f}-{np.exp(band.log_high):.2f} | "
            f"{by_device} | {np.mean(list(shares.values())):.0%} |"
        )
    print(f"\nmean over all: {np.mean(everything):.1%}")


def main() -> None:
    """Score, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the public data, such as ../shared/data")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "calibration" / "transfer" / "errors.json")
    parser.add_argument("--doc", type=Path, default=CHECKOUT / "docs" / "calibration-transfer.md")
    parser.add_argument("--all-kernels", action="store_true", help="score every kernel, and write nothing")
    options = parser.parse_args()
    started = time.perf_counter()
    artefacts = load_set("default").entries
    results = list(score_all(artefacts, options.data, options.all_kernels))
    entries = tuple(entry for scored in results for entry in entries_of(scored))
    text = io.StringIO()
    with redirect_stdout(text):
        print_summary(results)
        print_coverage(entries)
        print()
        print_table(results)
    print(text.getvalue())
    if not options.all_kernels:
        document = ErrorsFile(schema_version=1, note=NOTE, entries=entries).model_dump(mode="json")
        write_atomic(options.out, (json.dumps(document, indent=1) + "\n").encode())
        before, _, _ = options.doc.read_text(encoding="utf-8").partition(MARK)
        write_atomic(options.doc, f"{before}{MARK}\n{text.getvalue()}".encode())
    print(f"{len(results)} kernels in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
