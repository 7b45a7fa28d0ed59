"""What a child process does: check variants, take times block by block, write each row as it is taken."""

import gc
import json
import random
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from ..contract import Variant
from ..harness.check import CheckFailed, check
from ..launches import Launch, LaunchConfig
from . import records
from .gpu import Machine, Reading, Sensors, sensor_columns
from .plan import Item, Pace, best_config, blocks
from .rules import PEAKS, Limits, Summary, flags, is_noisy, reasons_to_reject, stream_bandwidth, summarise
from .timing import GRAPH_LIMIT_S, DeviceTimer, HostTimer, Work, run_all, runs_per_round

ROUNDS = 3
MEMORY_SHARE = 0.8
_BLOCK_MEMORY_SHARE = 0.4
_SPARE_BYTES = 1 << 30
_LARGE_CHECK_BYTES = 1 << 30
_LARGE_CHECK_S = 3.0
_COMPILE_CASE_BYTES = 1 << 30
_COMPILE_ITEMS = 12
"""Of a variant, ahead of the times: later shapes mostly need what the first ones did."""
_PART_RUNS = 10
_MOST_PARTS = 4
_FIRST_GUESS_S = {"cuda": 2.0, "cpu": 0.5}
_POWER_BATCH_S = 0.05
_IDLE_S = 2.0

Emit = Callable[[str, Mapping[str, Any]], None]


class Poisoned(Exception):
    """The GPU context of this process is lost: nothing more can run in it."""


@dataclass(frozen=True)
class Job:
    """What one child is to do.

    Attributes
    ----------
    mode : {'check', 'time', 'power'}
        Check correctness and compile what the items need; take times; take power.
    deadline_unix_s : float or None
        Nothing is begun that would not be done by then.
    alone : tuple of str
        Keys of items that get a block of their own, because a process died over them.
    """

    mode: Literal["check", "time", "power"]
    items: tuple[Item, ...]
    out: str
    machine: Machine
    deadline_unix_s: float | None = None
    alone: tuple[str, ...] = ()
    power_s: float = 0.0

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return Job(
            **fields
            | {
                "items": tuple(Item(**item) for item in fields["items"]),
                "machine": Machine(**fields["machine"]),
                "alone": tuple(fields["alone"]),
            }
        )


@dataclass
class Prepared:
    """An item that is in memory and ready to run, and the seconds of its rounds so far."""

    item: Item
    variant: Variant
    case: Any
    config: LaunchConfig
    buffers: Mapping[str, torch.Tensor]
    work: Work
    runs: int
    enqueue_s: float
    rounds: list[list[float]] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)


class Worker:
    """One job over variants by name, the hash of each one's source, and the cases that may be timed for each."""

    def __init__(
        self,
        job: Job,
        variants: Mapping[str, Variant],
        sources: Mapping[str, str],
        cases_of: Callable[[Variant], Sequence[Any]],
        emit: Emit,
    ) -> None:
        self.job, self.variants, self.sources, self.emit = job, variants, sources, emit
        self.machine = job.machine
        self.out = Path(job.out)
        self.on_gpu = self.machine.device == "cuda"
        self.sensors = Sensors(self.machine.gpu_uuid if self.on_gpu else None)
        self.peak = PEAKS.get(self.machine.gpu)
        self.cases = {name: {case.name: case for case in cases_of(variant)} for name, variant in variants.items()}
        self.rows = [row for row in records.read(self.out, "rows.csv") if row["gpu"] == self.machine.gpu]
        self.verdicts: dict[str, bool] = {}

    # What is common to all modes.

    def left_s(self) -> float:
        """Seconds until the deadline."""
        deadline = self.job.deadline_unix_s
        return float("inf") if deadline is None else deadline - time.time()

    def where(self, variant: str) -> dict[str, Any]:
        """Give the columns that say where and from which source a row comes."""
        return {
            **self.machine.columns(),
            "source_sha256": self.sources.get(variant, ""),
            "taken_unix_s": f"{time.time():.0f}",
        }

    def survived(self, error: Exception) -> None:
        """Raise Poisoned if an error took the GPU's context with it."""
        if not self.on_gpu:
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise Poisoned(records.one_line(error)) from lost

    def log(self, what: str, error: Exception) -> None:
        """Report an exception with the end of its traceback."""
        lines = traceback.format_exception(error, limit=-4)
        self.emit("log", {"what": what, "error": records.one_line(error)[:500], "traceback": "".join(lines)[-3000:]})

    def run(self) -> None:
        """Do the job."""
        {"check": self.check_all, "time": self.time_all, "power": self.power_all}[self.job.mode]()

    # Correctness.

    def is_correct(self, name: str) -> bool:
        """Whether every correctness case of a variant passes in this process; checked once."""
        if name not in self.verdicts:
            self.emit("checking", {"variant": name})
            self.verdicts[name] = self._check(self.variants[name])
            self.free()
            self.emit("checked", {"variant": name, "passed": self.verdicts[name]})
        return self.verdicts[name]

    def _check(self, variant: Variant) -> bool:
        """Check all cases with the default configuration, the largest with the others, and one of real size with all.

        All of them, also after a failure: the rows say how far it reaches.
        """
        if reason := variant.unsupported(self.machine.target):
            self._record(variant, {"status": "unsupported", "message": reason})
            return False
        verdicts = [self._check_case(variant, case, 0) for case in variant.correctness_cases]
        largest = max(variant.correctness_cases, key=lambda case: _moved_bytes(variant, case))
        others = range(1, len(variant.configs(self.machine.target, largest)))
        verdicts += [self._check_case(variant, largest, index) for index in others]
        if all(verdicts) and self.on_gpu and (large := self._large_case(variant, largest)):
            indices = range(len(variant.configs(self.machine.target, large)))
            verdicts += [self._check_case(variant, large, index, may_not_fit=True) for index in indices]
        return all(verdicts)

    def _large_case(self, variant: Variant, small: Any) -> Any:
        """Give the largest timing case whose reference should be done soon, or None.

        Offsets beyond 32 bits and full waves show at real sizes only; but some references loop over tokens in Python.
        """
        inputs = variant.make_inputs(small, seed=0, device=self.machine.device)
        start = time.perf_counter()
        variant.reference(small, inputs)
        torch.cuda.synchronize()
        growth = _LARGE_CHECK_S / (time.perf_counter() - start)
        limit = min(_LARGE_CHECK_BYTES, growth * _moved_bytes(variant, small))
        fitting = [case for case in self.cases[variant.name].values() if _moved_bytes(variant, case) <= limit]
        return max(fitting, key=lambda case: _moved_bytes(variant, case), default=None)

    def _check_case(self, variant: Variant, case: Any, config_index: int, *, may_not_fit: bool = False) -> bool:
        """Check one case with one configuration; record the outcome.

        A configuration other than the default that cannot run is no wrong result: its timing fails in the same way.
        """
        seed = random.SystemRandom().randrange(1 << 30)
        row: dict[str, Any] = {"case": case.name, "seed": seed}
        try:
            config = variant.configs(self.machine.target, case)[config_index]
            row["config"] = records.config_text(config)
            outcomes = check(variant, case, seed=seed, device=self.machine.device, config=config)
            if self.on_gpu:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError as error:
            self._record(variant, row | {"status": "out of memory", "message": records.one_line(error)[:500]})
            return may_not_fit
        except CheckFailed as failure:
            self._record(variant, row | {"status": "failed", "message": records.one_line(failure)})
            return False
        except Exception as error:
            self.log(f"{variant.name}, {case.name}: check", error)
            self._record(variant, row | {"status": "error", "message": records.one_line(error)[:500]})
            self.survived(error)
            return config_index > 0
        for outcome in outcomes:
            self._record(variant, row | asdict(outcome) | {"status": "passed"})
        return True

    def _record(self, variant: Variant, row: Mapping[str, Any]) -> None:
        records.append(self.out, "correctness.csv", [self.where(variant.name) | {"variant": variant.name} | row])

    def check_all(self) -> None:
        """Check each variant of the job, then compile what its items need, so that timing need not wait for it."""
        for name in dict.fromkeys(item.variant for item in self.job.items):
            if self.left_s() <= 0:
                return
            self.emit("start", {"keys": [name]})
            if self.is_correct(name) and self.on_gpu:
                self._compile([item for item in self.job.items if item.variant == name][:_COMPILE_ITEMS])
            self.emit("finish", {"keys": [name]})

    def _compile(self, items: Iterable[Item]) -> None:
        for item in items:
            if item.num_bytes > _COMPILE_CASE_BYTES or self.left_s() <= 0:
                continue
            variant, case = self.variants[item.variant], self.cases[item.variant][item.case]
            try:
                config = variant.configs(self.machine.target, case)[item.config_index or 0]
                inputs = variant.make_inputs(case, seed=0, device=self.machine.device)
                for launch in variant.plan(case, inputs, variant.allocate(case, inputs, config), config):
                    if isinstance(launch, Launch):
                        launch.compile()
            except Exception as error:
                self.log(f"{item.key}: compile", error)
                self.survived(error)
            self.emit("compiled", {"key": item.key})

    # Times.

    @cached_property
    def timer(self) -> DeviceTimer | HostTimer:
        """Give the timer, made when first needed: on a GPU it holds the flush buffer."""
        return DeviceTimer(self.machine.l2_bytes) if self.on_gpu else HostTimer()

    def free(self) -> None:
        """Give memory back between blocks."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Bytes that a block may use."""
        if not self.on_gpu:
            return 1 << 30
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused

    def time_all(self) -> None:
        """Time the items of the job, block by block, until the deadline."""
        pace = Pace(_FIRST_GUESS_S[self.machine.device])
        limit_bytes = int(_BLOCK_MEMORY_SHARE * self.free_bytes())
        for block in blocks(self.job.items, limit_bytes, self.job.alone):
            if not pace.fits(len(block), self.left_s()):
                self.emit("budget", {"left_s": self.left_s()})
                return
            start = time.perf_counter()
            self.emit("start", {"keys": [item.key for item in block]})
            for item in self._time_block(block):
                self._time_block([item])
            self.emit("finish", {"keys": [item.key for item in block]})
            pace.learn(time.perf_counter() - start, len(block))

    def _time_block(self, block: Sequence[Item]) -> list[Item]:
        """Time a block; give the items that did not fit in memory beside the others."""
        self.free()
        shared: dict[tuple[str, str], Mapping[str, Any]] = {}
        prepared: list[Prepared] = []
        too_large: list[Item] = []
        for item in block:
            if not self.is_correct(item.variant):
                continue
            try:
                prepared += self._prepare(item, shared)
            except torch.OutOfMemoryError as error:
                if len(block) > 1:
                    too_large.append(item)
                else:
                    self._reject(item, None, f"out of memory: {records.one_line(error)[:200]}")
        self._rounds(prepared)
        if noisy := [one for one in prepared if self.on_gpu and is_noisy(summarise(one.rounds))]:
            for one in noisy:
                one.rounds, one.host_s, one.readings = [], [], []
            self._rounds(noisy)
        for one in prepared:
            self._finish(one)
        return too_large

    def _prepare(self, item: Item, shared: dict[tuple[str, str], Mapping[str, Any]]) -> list[Prepared]:
        """Make inputs, plan and warm up; record why where that fails, and give nothing."""
        variant, case = self.variants[item.variant], self.cases[item.variant][item.case]
        config: LaunchConfig | None = None
        try:
            config = self._config(variant, case, item)
            if self._is_done(item, config):
                return []
            inputs = shared.get((item.variant, item.case))
            if inputs is None:
                need, free = item.num_bytes + _SPARE_BYTES, self.free_bytes()
                if self.on_gpu and need > MEMORY_SHARE * free:
                    self._reject(item, config, f"needs about {need:,} bytes, more than {MEMORY_SHARE:.0%} of {free:,}")
                    return []
                seed = random.SystemRandom().randrange(1 << 30)
                inputs = shared[item.variant, item.case] = variant.make_inputs(
                    case, seed=seed, device=self.machine.device
                )
            buffers = variant.allocate(case, inputs, config)
            work = variant.plan(case, inputs, buffers, config)
            first = self.timer.warm_up(work)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.log(f"{item.key}: prepare", error)
            self._reject(item, config, f"{type(error).__name__}: {records.one_line(error)[:300]}")
            self.survived(error)
            return []
        runs = runs_per_round(first.device_s) if self.on_gpu else 1
        return [Prepared(item, variant, case, config, buffers, work, runs, first.host_s)]

    def _config(self, variant: Variant, case: Any, item: Item) -> LaunchConfig:
        configs = variant.configs(self.machine.target, case)
        if item.config_index is not None:
            return configs[item.config_index]
        source = self.sources.get(variant.name, "")
        pilots: dict[str, list[tuple[str, float]]] = {}
        for row in self.rows:
            if (
                row["variant"] == variant.name
                and row["source_sha256"] == source
                and (row["method"], row["part"]) == ("events", "total")
            ):
                pilots.setdefault(row["case"], []).append((row["config"], float(row["median_s"])))
        # Only shapes that several configurations were timed on say which is better.
        compared = {name: pairs for name, pairs in pilots.items() if len(pairs) > 1}
        return configs[best_config([records.config_text(config) for config in configs], compared)]

    def _is_done(self, item: Item, config: LaunchConfig) -> bool:
        """Whether the configuration that turned out best was timed on this shape before."""
        wanted = (
            item.variant,
            item.case,
            records.config_text(config),
            self.sources.get(item.variant, ""),
            self.machine.gpu,
        )
        return any(
            records.identity(row) == wanted and (row["method"], row["part"]) == ("events", "total") for row in self.rows
        )

    def _rounds(self, prepared: Sequence[Prepared]) -> None:
        """Time the items in interleaved rounds: in a random order, in the reverse of it, and in another."""
        order = list(prepared)
        shuffle = random.SystemRandom().shuffle
        shuffle(order)
        gc.disable()
        try:
            for index in range(ROUNDS):
                if index == 1:
                    order.reverse()
                elif index == ROUNDS - 1:
                    shuffle(order)
                for one in order:
                    runs = self.timer.runs(one.work, one.runs, one.enqueue_s, partial(self._look, one))
                    one.rounds.append([run.device_s for run in runs])
                    one.host_s.extend(run.host_s for run in runs)
        finally:
            gc.enable()

    def _look(self, one: Prepared) -> None:
        one.readings.append(self.sensors.read())

    def _finish(self, one: Prepared) -> None:
        """Write the rows of an item: the total, the same in a graph where it is short, and each kernel apart."""
        summary = summarise(one.rounds)
        self._write(one, summary, "events", "total", host_s=median(one.host_s))
        timer = self.timer
        try:
            if (
                isinstance(timer, DeviceTimer)
                and summary.median_s < GRAPH_LIMIT_S
                and all(isinstance(launch, Launch) for launch in one.work)
            ):
                self._write(one, summarise(timer.graph_rounds(one.work, ROUNDS)), "graph", "total")
            if 1 < len(one.work) <= _MOST_PARTS:
                runs = timer.parts(one.work, _PART_RUNS if self.on_gpu else 1, one.enqueue_s)
                for index, launch in enumerate(one.work):
                    seconds = [[run[index] for run in runs]]
                    self._write(one, summarise(seconds), "events_apart", f"{index}:{launch_name(launch)}")
        except Exception as error:
            self.log(f"{one.item.key}: graph or parts", error)
            self.survived(error)

    def _write(self, one: Prepared, summary: Summary, method: str, part: str, host_s: float | None = None) -> None:
        whole = part == "total"
        traffic = one.variant.traffic(one.case)
        lse = one.buffers.get("lse")
        row = {
            **self.where(one.variant.name),
            **what_columns(one.variant, one.case, one.config),
            "num_splits": lse.shape[-1] if isinstance(lse, torch.Tensor) else "",
            "method": method,
            "part": part,
            **(
                {name: getattr(traffic, name) for name in ("read_bytes", "written_bytes", "flops", "units")}
                if whole
                else {}
            ),
            "cost_unit": one.variant.cost_unit,
            **{name: getattr(summary, name) for name in ("median_s", "p10_s", "p90_s", "rounds", "runs", "spread")},
            "host_s": "" if host_s is None else host_s,
            **sensor_columns(one.readings),
        }
        row["flags"] = ";".join(flags(row, summary))
        reasons = reasons_to_reject(row, summary, self._limits())
        if reasons:
            records.append(self.out, "rejected.csv", [row | {"reason": "; ".join(reasons)}])
        else:
            records.append(self.out, "rows.csv", [row])
            self.rows.append({name: str(row.get(name, "")) for name in records.ROW_COLUMNS})
        event = {name: row[name] for name in ("variant", "case", "config", "method", "part", "median_s")}
        self.emit("row", event | {"read_bytes": row.get("read_bytes", 0), "rejected": reasons})

    def _limits(self) -> Limits:
        return Limits(self.peak, self.machine.l2_bytes, stream_bandwidth(self.rows, self.machine.gpu))

    def _reject(self, item: Item, config: LaunchConfig | None, reason: str) -> None:
        """Record why an item was not timed."""
        variant = self.variants[item.variant]
        row = {
            **self.where(item.variant),
            **what_columns(variant, self.cases[item.variant][item.case], config),
            "reason": reason,
        }
        records.append(self.out, "rejected.csv", [row])
        self.emit("row", {"variant": item.variant, "case": item.case, "rejected": [reason]})

    # Power.

    def power_all(self) -> None:
        """Run each variant's first shape for a while and record what the GPU draws."""
        idle_w = self._idle_power_w()
        for item in self.job.items:
            if self.left_s() < self.job.power_s + _FIRST_GUESS_S[self.machine.device]:
                self.emit("budget", {"left_s": self.left_s()})
                return
            self.emit("start", {"keys": [item.key]})
            if self.is_correct(item.variant):
                try:
                    self._power(item, idle_w)
                except Exception as error:
                    self.log(f"{item.key}: power", error)
                    self.survived(error)
            self.emit("finish", {"keys": [item.key]})
            self.free()

    def _idle_power_w(self) -> float | None:
        time.sleep(_IDLE_S if self.on_gpu else 0.0)
        return self.sensors.read().power_w

    def _power(self, item: Item, idle_w: float | None) -> None:
        variant, case = self.variants[item.variant], self.cases[item.variant][item.case]
        config = self._config(variant, case, item)
        inputs = variant.make_inputs(case, seed=random.SystemRandom().randrange(1 << 30), device=self.machine.device)
        buffers = variant.allocate(case, inputs, config)
        work = variant.plan(case, inputs, buffers, config)
        seconds = self.timer.warm_up(work).device_s
        batch = max(1, int(_POWER_BATCH_S / max(seconds, 1e-6)))
        readings, runs = [self.sensors.read()], 0
        start = time.perf_counter()
        while time.perf_counter() - start < self.job.power_s:
            for _ in range(batch):
                run_all(work)
            readings.append(self.sensors.read())
            if self.on_gpu:
                torch.cuda.synchronize()
            runs += batch
        taken_s = time.perf_counter() - start
        last = self.sensors.read()
        # The driver's power is a mean over the past second: the first readings still see what ran before.
        powers = [reading.power_w for reading in readings[len(readings) // 2 :] if reading.power_w is not None]
        lse = buffers.get("lse")
        row = {
            **self.where(variant.name),
            **what_columns(variant, case, config),
            "num_splits": lse.shape[-1] if isinstance(lse, torch.Tensor) else "",
            "seconds": taken_s,
            "runs": runs,
            "mean_power_w": sum(powers) / len(powers) if powers else "",
            "energy_j": "" if last.energy_j is None else last.energy_j - (readings[0].energy_j or 0.0),
            "idle_power_w": "" if idle_w is None else idle_w,
            **sensor_columns(readings),
        }
        records.append(self.out, "power.csv", [row])
        self.emit("power", {"variant": variant.name, "case": case.name, "mean_power_w": row["mean_power_w"]})


def what_columns(variant: Variant, case: Any, config: LaunchConfig | None) -> dict[str, Any]:
    """Give the columns that say what was run."""
    return {
        "variant": variant.name,
        "operation": variant.operation,
        "kv_format": variant.kv_format.name if variant.kv_format else "",
        "form": variant.form,
        "case": case.name,
        "role": getattr(case, "role", ""),
        "shape": json.dumps(records.shape_of(case)),
        "config": "" if config is None else records.config_text(config),
    }


def launch_name(launch: Any) -> str:
    """Give the name of a launch's kernel or call."""
    return launch.kernel.__name__ if isinstance(launch, Launch) else launch.name


def _moved_bytes(variant: Variant, case: Any) -> int:
    traffic = variant.traffic(case)
    return traffic.read_bytes + traffic.written_bytes
