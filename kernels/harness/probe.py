"""Compile variants for targets without a GPU and print what the machine code uses, a JSON object per line.

``python -m kernels.harness.probe --variant PREFIX --target sm_90 [--target gfx942 ...] [--all-configs]``

Each target is compiled in a process of its own, because an instruction that a target lacks can kill the compiler. Rows
are documented in the README beside this file.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CHILD_LIMIT_S = 1800
_SHOWN_CHARACTERS = 2000
_CHECKOUT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Print a row per kernel, configuration and target; exit 1 if a row is an error."""
    parser = argparse.ArgumentParser(prog="python -m kernels.harness.probe", description=__doc__)
    parser.add_argument("--variant", default="", help="name of the variants, or how it starts")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; all of them if left out")
    parser.add_argument("--all-configs", action="store_true", help="every configuration, not only the default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--names", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_this_process:
        for row in probe_here(options.names, options.target[0], all_configs=options.all_configs):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
        return 0
    from .catalog import all_variants

    names = [variant.name for variant in all_variants(options.variant)]
    if not names:
        sys.stderr.write(f"no variant's name starts with {options.variant!r}\n")
        return 2
    failed = False
    for row in probe(names, options.target or TARGETS, all_configs=options.all_configs, jobs=options.jobs):
        failed = failed or "error" in row
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    return int(failed)


def probe(names: Sequence[str], targets: Sequence[str], *, all_configs: bool, jobs: int = 1) -> Iterator[Row]:
    """Compile variants, by name, for targets in child processes; yield rows, targets in the order given."""
    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(lambda target: _probe_target(names, target, all_configs=all_configs), targets):
            yield from rows


def _probe_target(names: Sequence[str], target: str, *, all_configs: bool) -> list[Row]:
    """Compile in children until none is left: a variant that kills its child gets an error row."""
    rows: list[Row] = []
    left = list(names)
    while left:
        found, stderr, status = _child(left, target, all_configs=all_configs)
        rows.extend(row for row in found if "finished" not in row)
        left = left[sum("finished" in row for row in found) :]
        if left and status != 0:
            rows.append(_died(left.pop(0), target, status, stderr))
        elif left:
            msg = f"the compiling process for {target} ended before {left[0]}"
            raise RuntimeError(msg)
    return rows


def _died(name: str, target: str, status: int, stderr: str) -> Row:
    """Judge a variant whose compilation killed its process by what the compiler wrote."""
    from .catalog import all_variants

    reason = next(variant for variant in all_variants(name) if variant.name == name).unsupported(target)
    row: Row = {"variant": name, "target": target}
    if reason is not None and reason in stderr:
        return row | {"unsupported": reason}
    return row | {"error": f"the compiler ended with status {status}: {stderr[-_SHOWN_CHARACTERS:]}"}


def _child(names: Sequence[str], target: str, *, all_configs: bool) -> tuple[list[Row], str, int]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    package = __name__ if __name__ != "__main__" else "kernels.harness.probe"
    command = [sys.executable, "-m", package, "--in-this-process", "--target", target, "--names", *names]
    if all_configs:
        command.append("--all-configs")
    with tempfile.TemporaryDirectory(prefix="triton-") as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(_CHECKOUT)}
        done = subprocess.run(  # noqa: S603
            command, env=environment, capture_output=True, text=True, check=False, timeout=CHILD_LIMIT_S
        )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows, done.stderr, done.returncode


def probe_here(names: Iterable[str], target: str, *, all_configs: bool) -> Iterator[Row]:
    """Compile variants for one target in this process, which must not run Triton's interpreter."""
    from .catalog import all_variants
    from .targets import compile_for

    compile_for(target)
    by_name = {variant.name: variant for variant in all_variants()}
    for name in names:
        yield from _probe_variant(by_name[name], target, all_configs=all_configs)
        yield {"finished": name}


def _probe_variant(variant: Any, target: str, *, all_configs: bool) -> Iterator[Row]:
    row: Row = {"variant": variant.name, "target": target}
    reason = variant.unsupported(target)
    case = variant.compile_case
    inputs = variant.make_inputs(case, seed=1, device="cpu")
    try:
        configs = variant.configs(target, case)
    except Exception as error:
        yield row | _failure(reason, f"{type(error).__name__}: {error}")
        return
    for config in configs if all_configs and reason is None else configs[:1]:
        row["config"] = asdict(config)
        kernels: list[tuple[str, Row]] = []
        with _captured_stderr() as written:
            try:
                kernels.extend(_compile(variant, case, inputs, config, target))
            except Exception as error:
                message = f"{type(error).__name__}: {_causes(error)}"
            else:
                message = ""
        if reason is not None and kernels and all("skipped" in details for _, details in kernels):
            # A library refuses when it runs, which only a GPU shows.
            yield row | {"unsupported": reason}
        elif message or reason is not None:
            yield row | _failure(reason, message + "\n" + written[0] if message else "")
        else:
            yield from (row | {"kernel": name} | details for name, details in kernels)


def _failure(reason: str | None, message: str) -> Row:
    """Judge a failure by the reason that the variant gives for a target, or None where it should have compiled."""
    if reason is None:
        return {"error": message[-_SHOWN_CHARACTERS:]}
    if not message:
        return {"error": f"compiles, although the variant says that it cannot: {reason}"}
    if reason not in message:
        return {"error": f"fails, but not for the reason given ({reason}): {message[-_SHOWN_CHARACTERS:]}"}
    return {"unsupported": reason}


def _causes(error: BaseException | None) -> str:
    """Give the messages of an error and of what caused it: Triton wraps the message that says why."""
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "; caused by ".join(texts)


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Catch what the compiler's C++ writes to file descriptor 2; the text is there after the block."""
    written: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as stream:
        os.dup2(stream.fileno(), 2)
        try:
            yield written
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            stream.seek(0)
            written.append(stream.read().decode(errors="replace"))


def _compile(variant: Any, case: Any, inputs: Any, config: Any, target: str) -> Iterator[tuple[str, Row]]:
    """Compile the launches of a plan; give each kernel's name and figures, once per specialisation."""
    from ..launches import HostCall
    from .resources import read_resources

    buffers = variant.allocate(case, inputs, config)
    counted = variant.counted_loop(case, config)
    compiled: dict[str, set[str]] = {}
    for launch in variant.plan(case, inputs, buffers, config):
        if isinstance(launch, HostCall):
            yield launch.name, {"skipped": "not a Triton kernel: nothing to compile"}
            continue
        name, kernel = launch.kernel.__name__, launch.compile()
        if kernel.hash in compiled.get(name, ()):
            continue
        details = asdict(read_resources(kernel))
        if name == counted.kernel and name not in compiled:
            details |= _count(kernel, counted, target)
        compiled.setdefault(name, set()).add(kernel.hash)
        yield name, details
    if compiled and counted.kernel not in compiled:
        msg = f"counted_loop names the kernel {counted.kernel}, but the plan has {', '.join(compiled)}"
        raise ValueError(msg)


def _count(kernel: Any, counted: Any, target: str) -> Row:
    """Give clocks per cost unit by pipe for the counted body of a kernel."""
    from . import amdgcn, ptx, sass
    from .machine_code import counted_body
    from .resources import read_listing

    dialect: Any = amdgcn if target.startswith("gfx") else sass
    listing = read_listing(kernel)
    body = counted_body(listing, counted.body, dialect.is_matrix)
    priced = dialect.clocks_by_pipe(body.instructions, target, kernel.metadata.num_warps)
    unrolled_by = ptx.unrolled_by(kernel.asm["ptx"], counted.body, body) if "ptx" in kernel.asm else 1
    units = counted.units * unrolled_by
    clocks = {pipe: float(f"{value / units:.4g}") for pipe, value in sorted(priced.clocks.items())}
    return {
        "matrix_instructions": sorted({one.opcode for one in listing.instructions if dialect.is_matrix(one)}),
        "body": counted.body,
        "units": units,
        "unrolled_by": unrolled_by,
        "instructions": len(body.instructions),
        "loops_counted_once": body.inner_loops,
        "clocks": clocks,
        "busiest_pipe": max(clocks, key=lambda pipe: clocks[pipe]),
        "unpriced": list(priced.unpriced),
    }


if __name__ == "__main__":
    sys.exit(main())
