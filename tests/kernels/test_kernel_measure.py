"""The measuring script: what it times in which order, what it refuses, and that it survives what kernels do to it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")

from kernels.contract import CountedLoop, Traffic, Variant  # noqa: E402
from kernels.launches import HostCall, Launch, LaunchConfig  # noqa: E402
from kernels.measure import records, rules, supervise, timing  # noqa: E402
from kernels.measure.catalog import cases_on, load  # noqa: E402
from kernels.measure.gpu import Machine, Reading, nearest_target, sensor_columns  # noqa: E402
from kernels.measure.plan import Item, Pace, best_config, blocks, case_order, make_plan, spread_order  # noqa: E402
from kernels.measure.worker import Job, Worker  # noqa: E402

GPU = "NVIDIA H100 80GB HBM3"
MACHINE = Machine("cuda", GPU, "uuid", "580", "sm_90", l2_bytes=50 << 20, total_bytes=80 << 30)
CONFIGS = (LaunchConfig(16, 4, 2), LaunchConfig(32, 4, 2))


@dataclass(frozen=True)
class StubCase:
    name: str
    num_bytes: int


class StubVariant(Variant):
    """Copies a tensor; a subclass does it wrongly, or not at all."""

    operation = "append/stub"
    cost_unit = "byte"
    correctness_cases = (StubCase("tiny", 4), StubCase("small", 8))
    timing_cases = tuple(StubCase(f"{1 << power}B", 1 << power) for power in range(4, 9))
    seconds = 1e-3

    def __init__(self, operation="append/stub", clock=None):
        self.operation = operation
        self.clock = clock or SimpleNamespace(now=0.0)

    def make_inputs(self, case, *, seed, device):
        return {"x": torch.randint(0, 256, (case.num_bytes,), dtype=torch.uint8)}

    def reference(self, case, inputs):
        return {"y": inputs["x"]}

    def allocate(self, case, inputs, config):
        return {"y": torch.empty_like(inputs["x"])}

    def plan(self, case, inputs, buffers, config):
        return (Launch(StubKernel(self, config), (1,), (inputs["x"], buffers["y"]), {}),)

    def work(self, x, y):
        y.copy_(x)

    def configs(self, target, case):
        return CONFIGS

    def compute_dtype(self, case):
        return "float32"

    def comparison(self, result):
        return "exact"

    def counted_loop(self, case, config):
        return CountedLoop("none", "whole", 1)

    def traffic(self, case):
        return Traffic(case.num_bytes, 0, 0, case.num_bytes)


class StubKernel:
    __name__ = "stub_kernel"

    def __init__(self, variant, config):
        self.variant, self.config = variant, config

    def __getitem__(self, grid):
        return self.launch

    def launch(self, x, y):
        self.variant.work(x, y)
        # The second configuration is the faster one.
        self.variant.clock.now += self.variant.seconds / (1 + CONFIGS.index(self.config))

    def warmup(self, *arguments, grid):
        return None


# What is timed, in which order.


@given(st.integers(0, 300))
def test_every_index_is_visited_once(count):
    assert sorted(spread_order(count)) == list(range(count))


@given(st.integers(3, 300), st.data())
def test_every_beginning_of_an_order_covers_the_range(count, data):
    length = data.draw(st.integers(3, count))
    seen = sorted(spread_order(count)[:length])
    assert seen[0] == 0
    assert seen[-1] == count - 1
    widest = max(after - before for before, after in pairwise(seen))
    assert widest <= 4 * (count - 1) / (length - 1) + 1


@given(st.lists(st.sampled_from(["fit", "small", "held_out"]), min_size=1, max_size=60))
def test_every_beginning_of_an_order_holds_each_role_by_its_share(roles):
    cases = [SimpleNamespace(name=str(index), role=role) for index, role in enumerate(roles)]
    order = case_order(cases)
    assert sorted(order) == list(range(len(roles)))
    for length in range(len(order) + 1):
        for role in set(roles):
            share = length * roles.count(role) / len(roles)
            assert abs([roles[index] for index in order[:length]].count(role) - share) <= len(set(roles))


def plan_of(*variants):
    failures = []
    items = make_plan(variants, "sm_90", cases_on("cuda"), lambda name, error: failures.append((name, str(error))))
    return items, failures


def test_a_plan_times_all_configurations_on_two_shapes_and_the_best_on_the_others():
    items, _ = plan_of(StubVariant())
    per_case = {}
    for item in items:
        per_case.setdefault(item.case, []).append(item.config_index)
    assert list(per_case) == ["256B", "64B", "16B", "128B", "32B"]
    assert list(per_case.values()) == [[0, 1], [0, 1], [None], [None], [None]]
    assert len({item.key for item in items}) == len(items)


def test_a_plan_takes_turns_between_variants_after_the_microbenchmarks():
    names = ["select/a", "decode_attention/b", "microbenchmark/c", "append/d"]
    items, _ = plan_of(*(StubVariant(name) for name in names))
    micro = [item.variant.startswith("microbenchmark") for item in items]
    assert micro == sorted(micro, reverse=True)
    assert [item.rank for item in items] == sorted(item.rank for item in items)
    rest = [item for item in items if item.rank >= 0]
    assert rest[0].variant == "decode_attention/b/best"
    first = rest.index(next(item for item in rest if item.variant == "append/d/best" and item.case == "64B"))
    cases = {item.case for item in rest[:first] if item.variant == "decode_attention/b/best"}
    assert len(cases) >= 4


def test_a_variant_that_cannot_be_planned_does_not_lose_the_rest():
    class Broken(StubVariant):
        def configs(self, target, case):
            raise ValueError(case.name)

    items, failures = plan_of(Broken("append/broken"), StubVariant())
    assert {item.variant for item in items} == {"append/stub/best"}
    assert failures == [("append/broken/best", "256B")]


def test_a_shape_waits_until_the_best_configuration_is_known():
    items, _ = plan_of(StubVariant())
    for block in blocks(items, 1 << 30):
        assert len({item.config_index is None for item in block}) == 1


sizes = st.lists(st.integers(1, 100), max_size=40)


@given(sizes, st.integers(1, 300), st.sets(st.integers(0, 39)))
def test_blocks_hold_a_plan_in_order_and_within_memory(num_bytes, limit, lone):
    items = [Item("v", str(index), None, size, 0.0) for index, size in enumerate(num_bytes)]
    alone = {item.key for index, item in enumerate(items) if index in lone}
    cut = list(blocks(items, limit, alone))
    assert [item for block in cut for item in block] == items
    for block in cut:
        assert len(block) == 1 or sum(item.num_bytes for item in block) <= limit
        assert len(block) == 1 or not {item.key for item in block} & alone


def test_configurations_of_one_shape_share_their_inputs_in_a_block():
    items = [Item("v", "case", index, 60, 0.0) for index in range(3)]
    assert list(blocks(items, 100)) == [items]


def test_the_best_configuration_has_the_lowest_time_relative_to_each_shapes_best():
    timings = {"large": [("a", 10.0), ("b", 11.0)], "small": [("a", 3.0), ("b", 1.0)]}
    assert best_config(["a", "b"], timings) == 1
    assert best_config(["c", "a"], timings) == 1
    assert best_config(["c", "d"], timings) == 0
    assert best_config(["a", "b"], {}) == 0


def test_nothing_is_begun_that_the_budget_does_not_reach_for():
    pace = Pace(2.0)
    assert pace.fits(4, 12.0)
    assert not pace.fits(4, 11.9)
    for _ in range(50):
        pace.learn(0.4, 4)
    assert pace.fits(4, 0.7)
    assert pace.fits(4, float("inf"))


# Statistics and the rules of refusal.


def test_a_summary_of_rounds():
    summary = rules.summarise([[1.0, 2.0, 3.0], [2.0, 2.2, 2.4], [1.0, 2.0, 9.0]])
    assert (summary.median_s, summary.rounds, summary.runs) == (2.0, 3, 9)
    assert (summary.p10_s, summary.p90_s) == (1.0, 9.0)
    assert summary.spread == pytest.approx(0.1)


@given(st.lists(st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=12), min_size=1, max_size=4))
def test_percentiles_enclose_the_median(rounds):
    summary = rules.summarise(rounds)
    assert summary.p10_s <= summary.median_s <= summary.p90_s
    assert summary.spread >= 0


def row_of(**changes):
    row = {"device": "cuda", "operation": "append/x", "part": "total", "method": "events", "gpu": GPU, "flops": 0}
    return row | {"read_bytes": 0, "written_bytes": 0, "median_s": 1e-3} | changes


def reasons(*, stream=None, seconds=1e-3, spread=0.0, **changes):
    summary = rules.Summary(seconds, seconds, seconds, 3, 36, spread)
    limits = rules.Limits(rules.PEAKS[GPU], l2_bytes=50 << 20, stream_bytes_per_s=stream)
    return rules.reasons_to_reject(row_of(**changes), summary, limits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"read_bytes": 3.4e9}, "datasheet"),
        ({"read_bytes": 3.1e9, "stream": 3.0e12}, "read-only stream"),
        ({"flops": 2e12}, "datasheet"),
        ({"flops": 1e12, "operation": "baseline/gemm/bf16"}, "989"),
        ({"spread": 0.06}, "rounds differ"),
        ({"seconds": 0.0}, "median"),
    ],
)
def test_rows_that_cannot_be_are_refused(change, words):
    (reason,) = reasons(**change)
    assert words in reason


@pytest.mark.parametrize(
    "change",
    [
        {"read_bytes": 3.0e9, "stream": 3.0e12},
        {"read_bytes": 3.05e9, "stream": 3.0e12},
        {"read_bytes": 3.2e9, "stream": 3.0e12, "operation": rules.STREAM_OPERATION},
        # Written bytes up to the cache's size need not have reached memory.
        {"written_bytes": 40e6, "seconds": 1e-5},
        {"flops": 1e12, "operation": "baseline/gemm/fp8"},
        {"spread": 0.05},
        # Two ticks of the timer.
        {"seconds": 5e-6, "spread": 0.19},
        {"device": "cpu", "read_bytes": 1e15, "spread": 9.0},
    ],
)
def test_rows_that_can_be_are_kept(change):
    assert reasons(**change) == []


def test_the_stream_is_the_fastest_large_read_of_this_gpu():
    rows = [
        row_of(operation=rules.STREAM_OPERATION, read_bytes="2e9", median_s="1e-3"),
        row_of(operation=rules.STREAM_OPERATION, read_bytes="6e9", median_s="2e-3"),
        row_of(operation=rules.STREAM_OPERATION, read_bytes="64e6", median_s="1e-6"),
        row_of(operation=rules.STREAM_OPERATION, read_bytes="9e9", median_s="1e-3", gpu="another"),
        row_of(read_bytes="9e9"),
    ]
    assert rules.stream_bandwidth(rows, GPU) == 3e12
    assert rules.stream_bandwidth(rows, "none") is None


def test_datasheet_peaks_equal_the_hardware_specs():
    from kvsim.device_catalog import load_device

    for name, peak in rules.PEAKS.items():
        spec = load_device(name).spec
        flops = {fact.dtype: fact.value for fact in spec.dense_flops}
        wide = flops.get("fp8", flops.get("int8"))
        assert (spec.memory_bandwidth.value, flops["bf16"], wide) == pytest.approx(
            (peak.memory, peak.flops_16_bit, peak.flops_8_bit)
        ), name


def test_flags_say_what_the_clocks_did():
    readings = [Reading(1980, 2619, 700.0, 60, 0x4), Reading(1500, 2619, 690.0, 61, 0x20), Reading(1980, 2619)]
    row = row_of() | sensor_columns(readings)
    assert row["sm_clock_mhz"] == 1980
    assert row["power_w"] == 695.0
    assert row["throttle_reasons"] == "0x24"
    summary = rules.Summary(1e-3, 1e-3, 1e-3, 3, 12, 0.0)
    assert rules.flags(row, summary) == ["few_runs", "clock_changed", "power_capped", "slowed_down"]
    assert rules.flags(row_of() | sensor_columns([Reading()]), replace(summary, runs=36)) == []


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("sm_90", "sm_90"), ("sm_89", "sm_120"), ("sm_121", "sm_120"), ("sm_103", "sm_100"), ("gfx950", "gfx942")],
)
def test_a_gpu_that_is_no_target_takes_the_tilings_of_the_nearest(architecture, target):
    assert nearest_target(architecture) == target


# Files.

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=30)
values = st.one_of(texts, st.integers(), st.floats(allow_nan=False))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(records.ROW_COLUMNS), values, max_size=8), max_size=5))
def test_rows_come_back_as_they_were_written(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for row in rows:
        records.append(folder, "rows.csv", [row])
    found = records.read(folder, "rows.csv")
    assert found == [{column: str(row.get(column, "")) for column in records.ROW_COLUMNS} for row in rows]
    for row, back in zip(rows, found, strict=True):
        for column, value in row.items():
            assert type(value)(back[column]) == value


def test_a_line_cut_short_is_left_out_and_the_next_is_whole(tmp_path):
    records.append(tmp_path, "rows.csv", [{"variant": "a"}, {"variant": "b"}])
    path = tmp_path / "rows.csv"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["variant"] for row in records.read(tmp_path, "rows.csv")] == ["a"]
    records.append(tmp_path, "rows.csv", [{"variant": "c"}])
    assert [row["variant"] for row in records.read(tmp_path, "rows.csv")] == ["a", "c"]


def test_a_file_of_another_version_is_not_touched(tmp_path):
    (tmp_path / "rows.csv").write_text("other,columns\n1,2\n")
    for use in (lambda: records.read(tmp_path, "rows.csv"), lambda: records.append(tmp_path, "rows.csv", [{}])):
        with pytest.raises(records.ForeignFile, match="choose another --out"):
            use()


def test_a_shape_is_written_short():
    case = StubCase("name", 3)
    assert records.shape_of(case) == {"num_bytes": 3}
    batch = replace(case, num_bytes=(7, 7, 7))
    assert records.shape_of(batch) == {"num_bytes": {"value": 7, "count": 3}}


# Children that die.


def scripted(deadly, checks=(), *, starts=True):
    """Give a child that dies over the items named `deadly`, or while it checks a variant of `checks`."""

    def run(job):
        if not starts:
            yield {"event": "exit", "status": "exit status 1", "late": False}
            return
        for block in blocks(job.items, 1 << 30, job.alone):
            yield {"event": "start", "keys": [item.key for item in block]}
            for item in block:
                if item.variant in checks:
                    yield {"event": "checking", "variant": item.variant}
                    yield {"event": "exit", "status": "exit status -11", "late": False}
                    return
                if item.key in deadly:
                    yield {"event": "exit", "status": "exit status 70", "late": False}
                    return
            yield {"event": "finish", "keys": [item.key for item in block]}
        yield {"event": "exit", "status": "", "late": False}

    return run


@given(st.sets(st.integers(0, 19), max_size=6))
def test_what_kills_a_process_is_found_and_the_rest_is_timed(deadly):
    items = [Item(f"v{index % 4}", f"c{index}", None, 1, 0.0) for index in range(20)]
    keys = {items[index].key for index in deadly}
    finished = []
    job = Job("time", tuple(items), ".", MACHINE)
    lost = supervise.run_job(
        job, lambda event: finished.extend(event["keys"]) if event["event"] == "finish" else None, scripted(keys)
    )
    assert set(lost.items) <= keys
    assert len(finished) == len(set(finished))
    for item in items:
        killed = item.key in lost.items
        given_up = item.variant in lost.variants
        assert (item.key in finished) + killed + (given_up and item.key not in finished and not killed) == 1
    for name in lost.variants:
        assert sum(key.startswith(f"{name}|") for key in lost.items) == supervise.MOST_CRASHES


def test_a_variant_whose_check_kills_the_process_is_given_up():
    items = tuple(Item(f"v{index % 3}", f"c{index}", None, 1, 0.0) for index in range(9))
    finished = []
    lost = supervise.run_job(
        Job("time", items, ".", MACHINE),
        lambda event: finished.extend(event["keys"]) if event["event"] == "finish" else None,
        scripted((), checks=("v1",)),
    )
    assert list(lost.variants) == ["v1"]
    assert "-11" in lost.variants["v1"]
    assert sorted(finished) == sorted(item.key for item in items if item.variant != "v1")


def test_a_process_that_never_starts_ends_the_job():
    items = tuple(Item("v", f"c{index}", None, 1, 0.0) for index in range(3))
    lost = supervise.run_job(Job("time", items, ".", MACHINE), lambda event: None, scripted((), starts=False))
    assert "does not start" in lost.variants["v"]


def test_a_job_survives_json():
    job = Job("time", (Item("v", "c", 1, 5, 0.5),), "out", MACHINE, 12.5, ("v|c|1",))
    assert Job.from_json(job.to_json()) == job


# The whole of a child's work, on a GPU that is made of a clock.


@pytest.fixture
def clock(monkeypatch):
    """Give a clock that kernels move, and put it in the place of the GPU's events and graphs."""
    now = SimpleNamespace(now=0.0, jitter=lambda: 1.0)

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing
            self.at = None

        def record(self):
            self.at = now.now

        def synchronize(self):
            assert self.at is not None

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3 * now.jitter()

    class Graph:
        seconds = 0.0

        def replay(self):
            now.now += self.seconds

    @contextmanager
    def capture(graph):
        before = now.now
        yield
        graph.seconds = now.now - before

    nothing = {"synchronize": lambda: None, "empty_cache": lambda: None, "_sleep": lambda cycles: None}
    memory = {"mem_get_info": lambda: (8 << 30, 8 << 30), "memory_reserved": lambda: 0, "memory_allocated": lambda: 0}
    for name, value in {**nothing, **memory, "Event": Event, "CUDAGraph": Graph, "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    plain = timing.random_words
    monkeypatch.setattr(timing, "random_words", lambda count, seed, device: plain(count, seed=seed, device="cpu"))
    monkeypatch.setattr(timing, "SMALLEST_FLUSH_BYTES", 4)
    monkeypatch.setattr(timing, "plan_stream_read", lambda words, result, config: HostCall("flush", lambda: None))
    return now


MACHINE_OF_A_CLOCK = replace(MACHINE, l2_bytes=0)


def work_off(folder, *variants, mode="time", **job):
    by_name = {variant.name: variant for variant in variants}
    items, failures = plan_of(*variants)
    assert not failures
    events = []
    Worker(
        Job(mode, tuple(items), str(folder), MACHINE_OF_A_CLOCK, **job),
        by_name,
        dict.fromkeys(by_name, "hash"),
        cases_on("cuda"),
        lambda name, fields: events.append({"event": name, **fields}),
    ).run()
    return events


def totals(folder, method="events"):
    return [row for row in records.read(folder, "rows.csv") if (row["method"], row["part"]) == (method, "total")]


def test_a_worker_times_every_case_and_uses_the_better_configuration(tmp_path, clock):
    work_off(tmp_path, StubVariant(clock=clock))
    rows = totals(tmp_path)
    assert len(rows) == 7
    assert {row["config"] for row in rows[4:]} == {records.config_text(CONFIGS[1])}
    assert [float(row["median_s"]) for row in rows[4:]] == pytest.approx([5e-4] * 3)
    assert all(row["basis"] == "measured" and row["source_sha256"] == "hash" for row in rows)
    assert all((row["rounds"], row["runs"]) == ("3", "36") for row in rows)
    assert json.loads(rows[0]["shape"]) == {"num_bytes": 256}
    checks = records.read(tmp_path, "correctness.csv")
    # Every correctness case, the largest with the other configuration, and the largest timing case with both.
    assert {row["status"] for row in checks} == {"passed"}
    assert [row["case"] for row in checks] == ["tiny", "small", "small", "256B", "256B"]
    assert [row["config"] for row in checks[3:]] == [records.config_text(config) for config in CONFIGS]


def test_a_short_kernel_is_also_timed_as_nodes_of_a_graph(tmp_path, clock):
    variant = StubVariant(clock=clock)
    variant.seconds = 4e-5
    work_off(tmp_path, variant)
    rows = totals(tmp_path, "graph")
    assert len(rows) == 7
    assert float(rows[0]["median_s"]) == pytest.approx(4e-5)


def test_launches_of_one_operation_are_also_timed_apart(tmp_path, clock):
    class TwoLaunches(StubVariant):
        def plan(self, case, inputs, buffers, config):
            tail = HostCall("tail", lambda: setattr(clock, "now", clock.now + 2e-4))
            return (*super().plan(case, inputs, buffers, config), tail)

    work_off(tmp_path, TwoLaunches(clock=clock))
    parts = [row for row in records.read(tmp_path, "rows.csv") if row["part"] != "total"]
    assert {row["part"] for row in parts} == {"0:stub_kernel", "1:tail"}
    assert float(parts[1]["median_s"]) == pytest.approx(2e-4)


class Wrong(StubVariant):
    """Off by one in the last element of the larger case only."""

    def work(self, x, y):
        y.copy_(x)
        if len(x) > 4:
            y[-1] += 1


OUT_OF_SHARED = "out of resource: shared memory"


class Dead(StubVariant):
    def plan(self, case, inputs, buffers, config):
        if case.name not in {"tiny", "small"}:
            raise RuntimeError(OUT_OF_SHARED)
        return super().plan(case, inputs, buffers, config)


def test_a_kernel_that_disagrees_with_its_reference_is_reported_and_not_timed(tmp_path, clock):
    events = work_off(tmp_path, Wrong("append/wrong", clock), StubVariant(clock=clock))
    assert {row["variant"] for row in totals(tmp_path)} == {"append/stub/best"}
    found = [row for row in records.read(tmp_path, "correctness.csv") if row["variant"] == "append/wrong/best"]
    assert [row["status"] for row in found] == ["passed", "failed", "failed"]
    assert "differs from the reference" in found[1]["message"]
    verdicts = {event["variant"]: event["passed"] for event in events if event["event"] == "checked"}
    assert verdicts == {"append/wrong/best": False, "append/stub/best": True}


def test_a_kernel_that_raises_is_named_and_does_not_lose_the_rest(tmp_path, clock):
    events = work_off(tmp_path, Dead("append/dead", clock), StubVariant(clock=clock))
    assert {row["variant"] for row in totals(tmp_path)} == {"append/stub/best"}
    assert any(event["event"] == "log" and OUT_OF_SHARED in event["error"] for event in events)


def test_what_does_not_fit_in_memory_is_refused_with_a_reason(tmp_path, clock):
    huge = StubVariant("append/huge", clock)
    huge.timing_cases = (StubCase("huge", 1 << 40),)
    work_off(tmp_path, huge)
    assert not totals(tmp_path)
    refused = records.read(tmp_path, "rejected.csv")
    assert [row["case"] for row in refused] == ["huge", "huge"]
    assert "needs about" in refused[0]["reason"]


def test_a_configuration_that_is_wrong_is_enough_to_refuse(tmp_path, clock):
    class WrongWhenTuned(StubVariant):
        def plan(self, case, inputs, buffers, config):
            right = super().plan(case, inputs, buffers, config)
            spoil = HostCall("spoil", lambda: buffers["y"].add_(1))
            return right if config == CONFIGS[0] else (*right, spoil)

    work_off(tmp_path, WrongWhenTuned(clock=clock))
    assert not totals(tmp_path)


def test_what_fits_in_memory_alone_is_timed_alone(tmp_path, clock):
    class Large(StubVariant):
        attempts = 0

        def make_inputs(self, case, *, seed, device):
            self.attempts += case.name == "64B"
            if case.name == "64B" and self.attempts <= refusals:
                raise torch.OutOfMemoryError
            return super().make_inputs(case, seed=seed, device=device)

    # Both configurations of the shape, in the block that they share with another shape; then also alone.
    for refusals, timed in ((2, 7), (4, 5)):
        folder = tmp_path / str(refusals)
        folder.mkdir()
        work_off(folder, Large(clock=clock))
        assert len(totals(folder)) == timed
        assert [row["case"] for row in records.read(folder, "rejected.csv")] == ["64B"] * (7 - timed)


def test_a_row_above_the_limit_is_kept_apart_with_its_reason(tmp_path, clock):
    fast = StubVariant("append/fast", clock)
    fast.traffic = lambda case: Traffic(case.num_bytes << 24, 0, 0, 1)
    fast.timing_cases = (StubCase("a", 256),)
    work_off(tmp_path, fast)
    assert not totals(tmp_path)
    assert all("datasheet" in row["reason"] for row in records.read(tmp_path, "rejected.csv"))


def test_a_noisy_row_is_taken_again_and_then_refused(tmp_path, clock):
    clock.jitter = random.Random(3).random
    work_off(tmp_path, StubVariant(clock=clock))
    refused = records.read(tmp_path, "rejected.csv")
    assert refused
    assert all("rounds differ" in row["reason"] for row in refused)


def test_a_second_run_adds_nothing(tmp_path, clock):
    for _ in range(2):
        work_off(tmp_path, StubVariant(clock=clock))
        assert len(totals(tmp_path)) == 7


def test_a_deadline_is_kept(tmp_path, clock):
    events = work_off(tmp_path, StubVariant(clock=clock), deadline_unix_s=time.time() + 5)
    assert not totals(tmp_path)
    assert [event["event"] for event in events] == ["budget"]


def test_checking_ahead_compiles_what_the_times_need(tmp_path, clock):
    events = work_off(tmp_path, StubVariant(clock=clock), Wrong("append/wrong", clock), mode="check")
    assert {event["key"].partition("|")[0] for event in events if event["event"] == "compiled"} == {"append/stub/best"}
    assert [event["keys"] for event in events if event["event"] == "finish"] == [
        ["append/stub/best"],
        ["append/wrong/best"],
    ]


def test_power_is_taken_over_a_while(tmp_path, clock, monkeypatch):
    monkeypatch.setattr("kernels.measure.worker._IDLE_S", 0.0)
    work_off(tmp_path, StubVariant(clock=clock), mode="power", power_s=0.02)
    rows = records.read(tmp_path, "power.csv")
    assert all(float(row["seconds"]) >= 0.02 and int(row["runs"]) > 0 for row in rows)


# The command.


def command(*arguments, **environment):
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return [sys.executable, "-m", "kernels.measure", *map(str, arguments)], variables | environment


def run_command(*arguments):
    line, environment = command(*arguments)
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_command_says_so(tmp_path):
    done = run_command("--out", tmp_path, "--ops", "microbenchmark/launch")
    assert done.returncode == 3
    assert "--device cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan_with_bytes():
    done = run_command("--dry-run", "--ops", "microbenchmark/copy")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "16.3800 GB" in " ".join(lines) or "17.1799 GB" in " ".join(lines)
    assert lines[-1].startswith("11 timings")


def test_the_command_goes_on_after_an_interruption(tmp_path):
    # The second operation is timed by a child that starts after the first is done: there is time to interrupt.
    line, environment = command(
        *("--device", "cpu", "--out", tmp_path, "--ops"), "microbenchmark/launch", "baseline/gemm/bf16"
    )
    first = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with first:
        for text in first.stdout:
            if text.startswith("[1/"):
                first.send_signal(signal.SIGINT)
                break
        first.communicate(timeout=60)
    assert first.returncode == 130
    before = records.read(tmp_path, "rows.csv")
    assert before

    second = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert second.returncode == 0, second.stderr + second.stdout
    rows = totals(tmp_path)
    assert rows[: len(before)] == before
    timed = [(row["variant"], row["case"], row["config"]) for row in rows]
    assert len(timed) == len(set(timed)) == 6
    assert {(row["device"], row["basis"], row["flags"]) for row in rows} == {("cpu", "interpreter", "no_measurement")}
    catalog = load(["baseline/gemm/bf16"], lambda *_: None)
    assert {row["source_sha256"] for row in rows if "gemm" in row["variant"]} == set(catalog.sources.values())
    sessions = json.loads((tmp_path / "environment.json").read_text())
    assert len(sessions) == 2
    assert {row["status"] for row in records.read(tmp_path, "correctness.csv")} == {"passed"}
