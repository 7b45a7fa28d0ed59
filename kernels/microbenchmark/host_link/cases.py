"""Sizes and directions of copies over the host link."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...launches import HostCall, LaunchConfig

Direction = Literal["to_device", "to_host", "both"]
_DIRECTIONS: tuple[Direction, ...] = ("to_device", "to_host", "both")


@dataclass(frozen=True)
class HostLinkCase:
    """Bytes to copy in each direction that is used."""

    name: str
    direction: Direction
    num_bytes: int

    @property
    def ways(self) -> tuple[Direction, ...]:
        """Single directions of this copy."""
        return _DIRECTIONS[:2] if self.direction == "both" else (self.direction,)


def _cases(sizes: tuple[int, ...]) -> tuple[HostLinkCase, ...]:
    return tuple(HostLinkCase(f"{way}-{size}B", way, size) for size in sizes for way in _DIRECTIONS)


class HostLink(Variant):
    """Copies between pinned host memory and the device."""

    operation = "microbenchmark/host_link"
    cost_unit = "byte"
    correctness_cases = _cases((1, 4097))
    timing_cases = _cases(tuple(kib << 10 for kib in (16, 256, 4096, 65536, 524288)))
    compile_case = HostLinkCase("to_device-4096B", "to_device", 4096)

    def make_inputs(self, case: HostLinkCase, *, seed: int, device: str) -> dict[str, Any]:
        generator = torch.Generator(device=device).manual_seed(seed)
        on_device = torch.randint(0, 256, (case.num_bytes,), generator=generator, dtype=torch.uint8, device=device)
        host = torch.empty(case.num_bytes, dtype=torch.uint8, pin_memory=on_device.is_cuda)
        return {"to_device": host.copy_(on_device.flip(0)), "to_host": on_device}

    def reference(self, case: HostLinkCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        # Each copy lies where the other direction's source does.
        device = {"to_device": inputs["to_host"].device, "to_host": inputs["to_device"].device}
        return {way: inputs[way].to(device[way]) for way in case.ways}

    def allocate(self, case: HostLinkCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        targets = {
            "to_device": torch.empty_like(inputs["to_host"]),
            "to_host": torch.empty(case.num_bytes, dtype=torch.uint8, pin_memory=inputs["to_host"].is_cuda),
        }
        return {way: targets[way] for way in case.ways}

    def plan(
        self, case: HostLinkCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[HostCall, ...]:  # type: ignore[override]
        pairs = [(buffers[way], inputs[way]) for way in case.ways]
        if any(target.shape != source.shape for target, source in pairs):
            raise ValueError("source and target must have one shape")
        copy = _copies_at_once if inputs["to_host"].is_cuda else _copies
        return (HostCall(f"copy_{case.direction}", lambda: copy(pairs)),)

    def configs(self, target: str, case: HostLinkCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=1, num_warps=1, num_stages=1),)

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: HostLinkCase) -> str:
        return "float32"

    def counted_loop(self, case: HostLinkCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("no kernel: the copy engine", "whole", units=1)

    def traffic(self, case: HostLinkCase) -> Traffic:
        # Of device memory: what goes to the host is read, what comes from it written.
        return Traffic(
            read_bytes=case.num_bytes * ("to_host" in case.ways),
            written_bytes=case.num_bytes * ("to_device" in case.ways),
            flops=0,
            units=case.num_bytes * len(case.ways),
        )


def _copies(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, source in pairs:
        target.copy_(source)


def _copies_at_once(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each pair on a stream of its own, joined to the current stream at both ends."""
    if len(pairs) == 1:
        pairs[0][0].copy_(pairs[0][1], non_blocking=True)
        return
    current = torch.cuda.current_stream()
    for (target, source), stream in zip(pairs, _side_streams(), strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        current.wait_stream(stream)


def _side_streams() -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    if not _SIDE_STREAMS:
        _SIDE_STREAMS.extend((torch.cuda.Stream(), torch.cuda.Stream()))
    return _SIDE_STREAMS[0], _SIDE_STREAMS[1]


_SIDE_STREAMS: list[torch.cuda.Stream] = []

VARIANTS = (HostLink(),)
