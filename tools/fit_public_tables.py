"""Fit every public table into calibration/fitted, and pin the fits in calibration/sets/default.yaml.

    python tools/fit_public_tables.py ../shared/data [--workers 4] [--out calibration]

The tables are those of ``../shared/data`` (kernel_timings and the RTX 4090 profile of vllm_requests); rows stay there,
coefficients and errors come here, with origin and licence of each table in the artefact. Equal tables and equal code
give equal files; what no set pins any more is removed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

# One thread per process: the pool has the cores already, and sums then have one order.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
    os.environ.setdefault(name, "1")

from kvsim.calibration.artefact import Artefact  # noqa: E402 - after the threads are set
from kvsim.calibration.build import fit_artefacts  # noqa: E402
from kvsim.calibration.calibrate import NO_LAW, plan_fits  # noqa: E402
from kvsim.calibration.choice import default_ids  # noqa: E402
from kvsim.calibration.sets import FITTED, SETS, load_set, pins_of, set_text  # noqa: E402
from kvsim.calibration.tables import read_tables  # noqa: E402
from kvsim.calibration.timings import Excluded, Timings  # noqa: E402
from kvsim.device_catalog import load_device  # noqa: E402
from kvsim.documents import write_atomic  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[1]
TABLES = ("kernel_timings", "vllm_requests/profile_RTX4090")
SET_NAME = "default"
HEADER = """Written by tools/fit_public_tables.py: do not edit. One version per kernel, the newest not quarantined.
default: what `auto` takes, the kernel that vLLM runs on the device, else another engine's or a library's."""


def main() -> None:
    """Fit, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the public data, such as ../shared/data")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "calibration")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    started = time.perf_counter()
    plan = plan_fits(one for table in TABLES for one in read_tables(options.data / table))
    read_s = time.perf_counter() - started
    print(f"{len(plan.parts)} keys to fit, read in {read_s:.0f} s", file=sys.stderr)
    artefacts = fit_all(plan.parts, options.workers)
    write(artefacts, options.out)
    print_table(artefacts)
    print_excluded(plan.excluded)
    folder = options.out / FITTED
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*.json"))
    print(f"{len(artefacts)} artefacts, {size_bytes / 1e6:.2f} MB, in {time.perf_counter() - started:.0f} s")


def fit_all(parts: Sequence[Timings], workers: int) -> list[Artefact]:
    """Fit in several processes, the largest tables first."""
    artefacts: list[Artefact] = []
    order = sorted(parts, key=lambda part: -len(part.frame))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, future in enumerate(as_completed([pool.submit(fit_one, part) for part in order]), 1):
            artefacts += future.result()
            print(f"\r{done}/{len(parts)} fitted ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return sorted(artefacts, key=lambda one: (one.device, one.operation, one.kernel, one.dtype, one.kv_dtype))


def fit_one(part: Timings) -> list[Artefact]:
    """Fit one key."""
    fitted, _ = fit_artefacts(part, load_device(part.frame["device"][0]).spec)
    return fitted


def write(artefacts: Sequence[Artefact], out: Path) -> None:
    """Write artefacts, then the set, then remove what no set pins any more."""
    for one in artefacts:
        one.save(out / FITTED)
    text = set_text(SET_NAME, pins_of(artefacts, default_ids(artefacts)), HEADER)
    write_atomic(out / SETS / f"{SET_NAME}.yaml", text.encode())
    sets = [load_set(str(path)) for path in sorted((out / SETS).glob("*.yaml"))]
    kept = {out / FITTED / pin.file for one in sets for pin in one.pins}
    for path in (out / FITTED).rglob("*.json"):
        if path not in kept:
            path.unlink()


def print_table(artefacts: Sequence[Artefact]) -> None:
    """Print held-out errors, one line per artefact; * marks a default."""
    defaults = default_ids(artefacts)
    for one in artefacts:
        errors = "  ".join(
            f"{domain} {found.median_ape:6.1%} {found.p90_ape:6.1%} (n {found.n})"
            for domain, found in one.held_out.items()
            if found.median_ape is not None and found.p90_ape is not None
        )
        name = f"{one.device} {one.operation} {one.kernel} {one.version} {one.dtype} {one.kv_dtype}"
        print(f"{'*' if one.id in defaults else ' '} {name:100s} {one.rows:6d}  {errors}")


def print_excluded(excluded: Iterable[Excluded]) -> None:
    """Print what was left out, by reason."""
    counts: dict[str, int] = {}
    for one in excluded:
        name = f"{one.reason} ({one.example})" if one.reason == NO_LAW else one.reason
        counts[name] = counts.get(name, 0) + one.count
    for reason, count in sorted(counts.items()):
        print(f"left out: {reason}: {count} rows")


if __name__ == "__main__":
    main()
