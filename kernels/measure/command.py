"""The command line: arguments, and what happens in which order."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog import Catalog
    from .gpu import Machine
    from .plan import Item
    from .worker import Job

EXIT_FAILURES, EXIT_USAGE, EXIT_NO_GPU, EXIT_POISONED, EXIT_INTERRUPTED = 1, 2, 3, 70, 130
_CHECK_SHARE = 0.35
"""Of the budget, at most, for checking and compiling ahead of the times."""
_MOST_JOBS = 8
_TIME_FIRST = "microbenchmark"


class _Stop(Exception):
    """The command ends here: its exit status, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def main(argv: Sequence[str]) -> int:
    """Run the command; give its exit status.

    0: done, as far as the budget reached; 1: done, but a kernel failed (named at the end); 2: wrong usage; 3: no GPU.
    """
    options = _parser().parse_args(argv)
    if options.worker:
        return _worker()
    # So that no child outlives a command that is told to end.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options, time.time())
    except _Stop as stop:
        sys.stderr.write(f"{stop}\n")
        return stop.status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command goes on where this one was\n")
        return EXIT_INTERRUPTED


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(options: argparse.Namespace, start: float) -> int:
    if options.device == "cpu":
        # Before a kernel is defined; children inherit it.
        os.environ["TRITON_INTERPRET"] = "1"
    from .catalog import cases_on, load
    from .plan import make_plan

    problems: list[str] = []

    def note(what: str, error: Exception) -> None:
        problems.append(f"{what}: {type(error).__name__}: {error}")

    catalog = load(options.ops or (), note)
    if not catalog.variants:
        raise _Stop(EXIT_USAGE, "\n".join(["no variant's name starts so; --list shows all", *problems]))
    if options.list:
        for name, variant in catalog.variants.items():
            counts = (len(variant.correctness_cases), len(variant.timing_cases))
            sys.stdout.write(f"{name:58s} {counts[0]:4d} correctness cases {counts[1]:4d} timing cases\n")
        return _tell(problems)
    machine = _machine(options)
    items = make_plan(catalog.variants.values(), machine.target, cases_on(options.device), note)
    if options.dry_run:
        _show(items)
        return _tell(problems)
    if options.out is None:
        raise _Stop(EXIT_USAGE, "--out DIR is needed")
    return _Campaign(options, catalog, items, machine, start, problems).run()


def _machine(options: argparse.Namespace) -> "Machine":
    """Describe where to measure; where there is no GPU, only a plan can be made."""
    from .gpu import Machine, describe

    if options.device == "cpu" or _has_gpu():
        return describe(options.device)
    if options.dry_run:
        return Machine("cuda", "none", "", "", options.target, 0, 0)
    raise _Stop(
        EXIT_NO_GPU,
        "No GPU: torch sees neither a CUDA nor a ROCm device, so there is nothing to time. Use --dry-run for the plan, "
        "or --device cpu to try the script in Triton's interpreter.",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.measure",
        description="Check every kernel against its reference on this GPU, then time those that agree.",
    )
    parser.add_argument("--out", type=Path, help="folder for the rows; an interrupted run goes on where it was")
    parser.add_argument("--ops", nargs="+", metavar="PREFIX", help="only variants whose name starts so")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="wall time to stop within")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to try the script")
    parser.add_argument("--jobs", type=int, help="processes that check and compile ahead of the times; 0: none")
    parser.add_argument("--power", type=float, default=0.0, metavar="SECONDS", help="then run each kernel so long")
    parser.add_argument("--check-only", action="store_true", help="correctness, and no times")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--target", default="sm_90", help="whose tilings --dry-run plans where there is no GPU")
    parser.add_argument("--list", action="store_true", help="print the variants and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _tell(problems: Sequence[str]) -> int:
    for problem in problems:
        sys.stderr.write(problem + "\n")
    return EXIT_FAILURES if problems else 0


def _show(items: Sequence["Item"]) -> None:
    for item in items:
        config = "best" if item.config_index is None else f"#{item.config_index}"
        sys.stdout.write(f"{item.rank:7.2f} {item.num_bytes / 1e9:9.4f} GB  {item.variant:50s} {item.case} {config}\n")
    total = sum(item.num_bytes for item in items)
    sys.stdout.write(f"{len(items)} timings, {total / 1e9:.1f} GB read and written once\n")


class _Campaign:
    """One run of the command with a device."""

    def __init__(
        self,
        options: argparse.Namespace,
        catalog: "Catalog",
        items: "list[Item]",
        machine: "Machine",
        start: float,
        problems: list[str],
    ) -> None:
        self.options, self.catalog, self.items, self.machine = options, catalog, items, machine
        self.start, self.problems = start, problems
        self.out: Path = options.out
        self.deadline = None if options.budget is None else start + options.budget
        self.taken = 0
        self.rejected: list[str] = []
        self.total = 0

    def run(self) -> int:
        from . import records

        self.out.mkdir(parents=True, exist_ok=True)
        try:
            known = {name: records.read(self.out, name) for name in records.FILES}["rows.csv"]
        except records.ForeignFile as error:
            raise _Stop(EXIT_USAGE, str(error)) from error
        self._write_environment()
        for problem in self.problems:
            self._log(problem)
        done = self._done_keys(known)
        items = [item for item in self.items if item.key not in done]
        self._say(f"{len(self.items)} timings planned, {len(self.items) - len(items)} already there")
        self.total = len(items)
        first = [item for item in items if item.variant.startswith(_TIME_FIRST)]
        if not self.options.check_only:
            self._time(first)
        wrong = self._check(items)
        if not self.options.check_only:
            self._time([item for item in items if item not in first and item.variant not in wrong])
        if self.options.power > 0:
            self._power(wrong)
        return self._finish()

    def _done_keys(self, rows: Iterable[Mapping[str, str]]) -> set[str]:
        """Give the keys of planned items that rows of this GPU and of the same source already hold."""
        from .records import config_text, identity

        found = {identity(row) for row in rows if (row["method"], row["part"]) == ("events", "total")}
        timed = {names[:2] + names[3:] for names in found}
        done = set()
        for item in self.items:
            where = (self.catalog.sources[item.variant], self.machine.gpu)
            if item.config_index is None:
                # Which configuration is best is known to the child only; it looks again.
                if (item.variant, item.case, *where) in timed:
                    done.add(item.key)
                continue
            variant = self.catalog.variants[item.variant]
            case = next(case for case in self._cases(variant) if case.name == item.case)
            config = variant.configs(self.machine.target, case)[item.config_index]
            if (item.variant, item.case, config_text(config), *where) in found:
                done.add(item.key)
        return done

    def _cases(self, variant: Any) -> Sequence[Any]:
        from .catalog import cases_on

        return cases_on(self.machine.device)(variant)

    def _job(self, mode: Any, items: "Sequence[Item]", **more: Any) -> "Job":
        from .worker import Job

        fields = {"deadline_unix_s": self.deadline} | more
        return Job(mode=mode, items=tuple(items), out=str(self.out), machine=self.machine, **fields)

    def _check(self, items: "Sequence[Item]") -> set[str]:
        """Check variants in several processes at once, which also compiles ahead; give those that must not be timed.

        Each is checked once more by the process that times it. The microbenchmarks, timed by then, are left out.
        """
        from .supervise import run_jobs

        names = list(dict.fromkeys(item.variant for item in items if not item.variant.startswith(_TIME_FIRST)))
        jobs = self.options.jobs
        if jobs is None:
            jobs = min(_MOST_JOBS, (os.cpu_count() or 2) // 2) if self.machine.device == "cuda" else 0
        if self.options.check_only:
            names, jobs = list(dict.fromkeys(item.variant for item in self.items)), max(1, jobs)
        if not jobs or not names:
            return set()
        deadline = self.deadline
        if deadline is not None and not self.options.check_only:
            deadline = time.time() + _CHECK_SHARE * (deadline - time.time())
        groups = [set(names[index::jobs]) for index in range(jobs)]
        source = self.items if self.options.check_only else items
        split = [
            self._job("check", [item for item in source if item.variant in group], deadline_unix_s=deadline)
            for group in groups
        ]
        self._say(f"checking {len(names)} variants in {jobs} processes")
        wrong: set[str] = set()

        def on_event(event: Mapping[str, Any]) -> None:
            self._on_event(event)
            if event["event"] == "checked" and not event["passed"]:
                wrong.add(event["variant"])

        lost = run_jobs(split, on_event)
        for name, why in lost.items():
            self._lost(name, why)
        return wrong | set(lost)

    def _time(self, items: "Sequence[Item]") -> None:
        from .supervise import run_job

        lost = run_job(self._job("time", items), self._on_event)
        self._record_lost(lost)

    def _power(self, wrong: set[str]) -> None:
        from .plan import Item
        from .supervise import run_job

        first: dict[str, Item] = {}
        for item in self.items:
            if item.variant not in wrong:
                first.setdefault(item.variant, Item(item.variant, item.case, None, item.num_bytes, item.rank))
        job = self._job("power", list(first.values()), power_s=self.options.power)
        self._record_lost(run_job(job, self._on_event))

    def _record_lost(self, lost: Any) -> None:
        from . import records

        for name, why in lost.variants.items():
            self._lost(name, why)
        rows = []
        for key, why in lost.items.items():
            variant, case, config = key.split("|")
            reason = f"its process died: {why}"
            rows.append(
                {**self.machine.columns(), "variant": variant, "case": case, "config": config, "reason": reason}
            )
            self.problems.append(f"{key}: {reason}")
        if rows:
            records.append(self.out, "rejected.csv", rows)

    def _lost(self, variant: str, why: str) -> None:
        from . import records

        named = {"variant": variant, "status": "crashed", "message": why, "taken_unix_s": f"{time.time():.0f}"}
        row = self.machine.columns() | named
        records.append(self.out, "correctness.csv", [row])
        self.problems.append(f"{variant}: given up: {why}")

    def _on_event(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "checked" if not event["passed"]:
                # Which case and by how much is in correctness.csv; unsupported ones are there too.
                self._say(f"{event['variant']}: not timed, see correctness.csv")
            case "log":
                self.problems.append(f"{event['what']}: {event['error']}")
                self._log(f"{event['what']}\n{event['traceback']}")
            case "row" if event["rejected"]:
                self.rejected.append(f"{event['variant']}, {event['case']}: {'; '.join(event['rejected'])}")
                self._say(f"rejected {self.rejected[-1]}")
            case "row":
                if (event["method"], event["part"]) == ("events", "total"):
                    self.taken += 1
                    self._say(
                        f"{event['variant']} {event['case']} {event['config']}: {event['median_s'] * 1e6:.1f} us, "
                        f"{event['read_bytes'] / event['median_s'] / 1e9:.0f} GB/s read"
                    )
            case "power":
                self._say(f"{event['variant']} {event['case']}: {event['mean_power_w']} W")
            case "budget":
                self._say("the budget does not reach for more")
            case "exit" if event["status"]:
                self._say(f"a process ended: {event['status']}")

    def _say(self, text: str) -> None:
        elapsed = time.time() - self.start
        left = "" if self.deadline is None else f", {self.deadline - time.time():.0f} s left"
        sys.stdout.write(f"[{self.taken}/{self.total} rows, {elapsed:.0f} s{left}] {text}\n")
        sys.stdout.flush()

    def _log(self, text: str) -> None:
        with (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")

    def _write_environment(self) -> None:
        """Append this session to environment.json."""
        path = self.out / "environment.json"
        sessions = json.loads(path.read_text()) if path.exists() else []
        session = {
            **self.machine.columns(),
            "l2_bytes": self.machine.l2_bytes,
            "total_bytes": self.machine.total_bytes,
            **self.machine.facts,
            "arguments": {name: str(value) for name, value in vars(self.options).items()},
        }
        path.write_text(json.dumps([*sessions, session], indent=1) + "\n")

    def _finish(self) -> int:
        """Print what was found, shortest last; a failure is named, and makes the exit status 1."""
        from . import records
        from .rules import stream_bandwidth

        rows = [row for row in records.read(self.out, "rows.csv") if row["gpu"] == self.machine.gpu]
        checks = [row for row in records.read(self.out, "correctness.csv") if row["gpu"] == self.machine.gpu]
        failed = sorted(
            {
                f"{row['variant']}, {row['case']}: {row['status']}: {row['message']}"
                for row in checks
                if row["status"] in {"failed", "error", "crashed"}
                and float(row["taken_unix_s"] or "inf") >= int(self.start)
            }
        )
        for title, lines in (("problems", self.problems), ("failed checks", failed), ("rejected", self.rejected)):
            for line in lines:
                self._say(f"{title}: {line[:300]}")
        stream = stream_bandwidth(rows, self.machine.gpu)
        self._say(f"read-only stream: {stream / 1e12:.3f} TB/s" if stream else "read-only stream: not measured")
        for line in summary_lines(rows, stream):
            sys.stdout.write(line + "\n")
        return EXIT_FAILURES if self.problems or failed else 0


def summary_lines(rows: Iterable[Mapping[str, str]], stream: float | None) -> list[str]:
    """Give a line per variant: rows, and least bytes per second, median and highest, as a share of the stream."""
    rates: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if (row["method"], row["part"]) == ("events", "total"):
            rates[row["variant"]].append(float(row["read_bytes"]) / float(row["median_s"]))
    unit, scale = ("of the stream", 100 / stream) if stream else ("GB/s", 1e-9)
    percent = "%" if stream else ""
    return [
        f"{name:58s} {len(found):4d} rows  median {median(found) * scale:6.1f}{percent}"
        f"  best {max(found) * scale:6.1f}{percent} {unit}"
        for name, found in rates.items()
    ]


def _worker() -> int:
    """Run one job, given on standard input; events go to standard output."""
    from .catalog import cases_on, load
    from .worker import Job, Poisoned, Worker

    out = os.fdopen(os.dup(1), "w")
    # What a library prints must not be taken for an event.
    os.dup2(2, 1)

    def emit(name: str, fields: Mapping[str, Any]) -> None:
        out.write(json.dumps({"event": name, **fields}) + "\n")
        out.flush()

    job = Job.from_json(sys.stdin.read())
    if job.machine.device == "cpu":
        from ..harness.interpreter import compute_narrow_floats_by_value

        compute_narrow_floats_by_value()
    catalog = load(sorted({item.variant for item in job.items}), lambda *_: None)
    try:
        Worker(job, catalog.variants, catalog.sources, cases_on(job.machine.device), emit).run()
    except Poisoned:
        traceback.print_exc()
        out.flush()
        # Tearing down a lost context can hang.
        os._exit(EXIT_POISONED)
    return 0
