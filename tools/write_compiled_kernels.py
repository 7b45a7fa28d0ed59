"""Write calibration/compiled: what every kernel uses on each target, compiled and checked without a GPU.

``python tools/write_compiled_kernels.py [--variant PREFIX] [--jobs N] [--check]``, in an environment with torch and the
triton version to record (see .ci/run). Each figure comes from a run: correctness from Triton's interpreter, the rest
from the machine code.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton

from kernels.harness.check import CheckFailed, check
from kernels.harness.entries import build_entry, dump, file_name, kernels_by_variant
from kernels.harness.interpreter import compute_narrow_floats_by_value
from kernels.harness.probe import TARGETS, probe

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDER = CHECKOUT / "calibration" / "compiled"
CHECK_LIMIT_S = 1800
CHUNK = 4


def main() -> int:
    """Write the entries, or with ``--check`` compare them; exit 1 where a kernel fails or an entry differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="", help="name of the variants, or how it starts")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs")
    parser.add_argument("--run-cases", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_cases is not None:
        return run_cases(options.run_cases)

    everything = kernels_by_variant()
    names = [name for name in everything if name.startswith(options.variant)]
    chunks = [names[first : first + CHUNK] for first in range(0, len(names), CHUNK)]
    failures: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for entries, problems in pool.map(build_entries, chunks):
            failures.extend(problems)
            for name, text in entries.items():
                path = FOLDER / file_name(name)
                before = path.read_text(encoding="utf-8") if path.exists() else None
                if options.check and before != text:
                    failures.append(f"{path.relative_to(CHECKOUT)} differs from what the sources give")
                elif not options.check and before != text:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
                    print(f"wrote {path.relative_to(CHECKOUT)}", flush=True)
    if not options.variant:
        failures.extend(settle_orphans({file_name(name) for name in everything}, remove=not options.check))
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


def settle_orphans(known: set[str], *, remove: bool) -> list[str]:
    """Remove entries of variants that are no more, or name them."""
    orphans = [path for path in sorted(FOLDER.glob("*.json")) if path.name not in known]
    if remove:
        for path in orphans:
            path.unlink()
            print(f"removed {path.relative_to(CHECKOUT)}", flush=True)
        return []
    return [f"{path.relative_to(CHECKOUT)} belongs to no variant" for path in orphans]


def build_entries(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Compile and check some variants; give the text of their entries, and what failed."""
    everything = kernels_by_variant()
    rows = list(probe(names, TARGETS, all_configs=True))
    checked, failures = check_in_interpreter(names)
    entries: dict[str, str] = {}
    for name in names:
        kernel, variant = everything[name]
        try:
            entry = build_entry(kernel, variant, [row for row in rows if row["variant"] == name], checked[name])
        except (ValueError, KeyError) as error:
            failures.append(f"no entry for {name}: {error}")
        else:
            entries[name] = dump(entry)
    return entries, failures


def check_in_interpreter(names: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Run the correctness cases of some variants in a process whose kernels Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, __file__, "--run-cases", *names]
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, check=False, timeout=CHECK_LIMIT_S
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failures = [row["failure"] for row in rows if "failure" in row]
    if done.returncode:
        failures.append(f"checking {', '.join(names)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return {row.pop("variant"): row for row in rows if "failure" not in row}, failures


def run_cases(names: Sequence[str]) -> int:
    """Check variants in this process, with fresh random inputs; print a line of JSON per variant and per failure."""
    compute_narrow_floats_by_value()
    # Triton 3.6's interpreter turns one-element arrays into loop bounds.
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
    everything = kernels_by_variant()
    for name in names:
        variant = everything[name][1]
        passed = 0
        for case in variant.correctness_cases:
            seed = random.SystemRandom().randrange(1 << 30)
            try:
                check(variant, case, seed=seed, device="cpu", config=variant.configs("sm_90", case)[0])
            except CheckFailed as failure:
                print(json.dumps({"failure": f"{failure}; seed {seed}"}), flush=True)
            else:
                passed += 1
        outcome = {"where": "interpreter", "triton": triton.__version__, "passed": passed}
        print(json.dumps({"variant": name, **outcome, "cases": len(variant.correctness_cases)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
