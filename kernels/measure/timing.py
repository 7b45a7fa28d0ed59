"""Take times: cold L2, device events with the host far ahead, and CUDA graphs for what is short."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from ..launches import HostCall, Launch, LaunchConfig
from ..microbenchmark.stream_read.kernel import plan_stream_read
from ..microbenchmark.words import CHUNK_WORDS, WORD_BYTES, random_words

SMALLEST_FLUSH_BYTES = 256 << 20
FLUSH_L2_SHARE = 4
WARM_UP_RUNS = 3
RUNS_PER_ROUND = 12
FEWEST_RUNS = 4
ROUND_LIMIT_S = 0.4
"""A round of a slow kernel has as many runs as fit, and `FEWEST_RUNS` at least."""
GRAPH_LIMIT_S = 100e-6
"""Operations shorter than this are also timed as nodes of a CUDA graph."""
_GRAPH_NODES = 256
_GRAPH_COPIES = 16
_GRAPH_REPLAYS = 5
# Cycles per second by which a wait is sized: above the clock of any GPU here, so that it is never too short.
_WAIT_HZ = 2.5e9
_HOST_MARGIN = 2.0
_SHORTEST_WAIT_S = 50e-6
"""The flush itself keeps the device busy for longer than this."""

Work = Sequence[Launch | HostCall]


@dataclass(frozen=True)
class Run:
    """One timed run: seconds on the device, and seconds that the host took to enqueue it."""

    device_s: float
    host_s: float


def run_all(work: Work) -> None:
    """Enqueue every launch in order."""
    for launch in work:
        launch.run()


class HostTimer:
    """Times in Triton's interpreter, by the host's clock: they test the script and measure nothing."""

    def warm_up(self, work: Work) -> Run:
        """Run once."""
        return self.runs(work, 1, 0.0)[0]

    def runs(self, work: Work, count: int, host_s: float, during: Callable[[], None] = lambda: None) -> list[Run]:
        """Time `count` runs."""
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            run_all(work)
            seconds = time.perf_counter() - start
            taken.append(Run(seconds, seconds))
        during()
        return taken

    def parts(self, work: Work, count: int, host_s: float) -> list[list[float]]:
        """Time each launch of `count` runs."""
        return [[self.runs([launch], 1, host_s)[0].device_s for launch in work] for _ in range(count)]


class DeviceTimer:
    """Times on a GPU.

    Before every run the cache is emptied by *reading* a buffer several times its size: a buffer that is written would
    leave dirty lines, which the timed kernel then has to evict. The start event follows a wait that lasts as long as
    the host needs to enqueue the run (`host_s`, from the warm-up), so that gaps between launches are the device's own.
    """

    def __init__(self, l2_bytes: int) -> None:
        flush_bytes = max(SMALLEST_FLUSH_BYTES, FLUSH_L2_SHARE * l2_bytes)
        words = random_words(flush_bytes // WORD_BYTES, seed=0, device="cuda")
        result = words.new_empty(-(-len(words) // CHUNK_WORDS))
        self._flush = plan_stream_read(words, result, LaunchConfig(block_n=4096, num_warps=8, num_stages=1))

    def warm_up(self, work: Work) -> Run:
        """Run a few times, so that code is compiled and loaded; give the last run."""
        for _ in range(WARM_UP_RUNS - 1):
            run_all(work)
        return self.runs(work, 1, 0.0)[0]

    def _empty_cache_and_wait(self, host_s: float) -> None:
        self._flush.run()
        if (wait_s := _HOST_MARGIN * host_s) > _SHORTEST_WAIT_S:
            torch.cuda._sleep(int(wait_s * _WAIT_HZ))

    def runs(self, work: Work, count: int, host_s: float, during: Callable[[], None] = lambda: None) -> list[Run]:
        """Time `count` runs; call `during` while the device is busy with them."""
        marks = [(_event(), _event()) for _ in range(count)]
        host = []
        for index, (start, end) in enumerate(marks):
            self._empty_cache_and_wait(host_s)
            start.record()
            before = time.perf_counter()
            run_all(work)
            host.append(time.perf_counter() - before)
            end.record()
            if index == count // 2:
                during()
        torch.cuda.synchronize()
        return [Run(start.elapsed_time(end) * 1e-3, seconds) for (start, end), seconds in zip(marks, host, strict=True)]

    def parts(self, work: Work, count: int, host_s: float) -> list[list[float]]:
        """Time each launch of `count` runs, with an event between launches, which adds about a microsecond each."""
        marks = [[_event() for _ in range(len(work) + 1)] for _ in range(count)]
        for events in marks:
            self._empty_cache_and_wait(host_s)
            events[0].record()
            for launch, event in zip(work, events[1:], strict=True):
                launch.run()
                event.record()
        torch.cuda.synchronize()
        return [[start.elapsed_time(end) * 1e-3 for start, end in pairwise(events)] for events in marks]

    def graph_rounds(self, work: Work, rounds: int) -> list[list[float]]:
        """Time the launches as graph nodes: a graph of flush and launches less a graph of flushes, per repetition."""
        copies = max(2, min(_GRAPH_COPIES, _GRAPH_NODES // len(work)))
        with_work = _capture([self._flush, *work] * copies)
        without = _capture([self._flush] * copies)
        both = (with_work, without)
        for graph in both:
            graph.replay()
        torch.cuda.synchronize()
        taken = []
        for _ in range(rounds):
            pairs = [[self._replay(graph) for graph in both] for _ in range(_GRAPH_REPLAYS)]
            taken.append([(full - flushes) / copies for full, flushes in pairs])
        return taken

    @staticmethod
    def _replay(graph: Any) -> float:
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


def runs_per_round(seconds: float) -> int:
    """How many runs of a kernel that takes so long one round has."""
    return max(FEWEST_RUNS, min(RUNS_PER_ROUND, int(ROUND_LIMIT_S / max(seconds, 1e-9))))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def _capture(work: Work) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(work)
    return graph
