"""How many launches, alone and in a graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...contract import Comparison, CountedLoop, Traffic, Variant
from ...launches import HostCall, Launch, LaunchConfig
from .kernel import capture, plan_launches


@dataclass(frozen=True)
class LaunchCase:
    """A number of launches, one after the other on one stream."""

    name: str
    num_launches: int


class EmptyLaunches(Variant):
    """Empty kernels launched one by one: ``host_s`` of a row is the host's part, the time is the device's."""

    operation = "microbenchmark/launch"
    cost_unit = "launch"
    correctness_cases = (LaunchCase("one", 1), LaunchCase("five", 5))
    timing_cases = tuple(LaunchCase(f"{count}", count) for count in (1, 2, 10, 100, 1000))
    compile_case = LaunchCase("one", 1)

    def make_inputs(self, case: LaunchCase, *, seed: int, device: str) -> dict[str, Any]:
        return {"device": device}

    def reference(self, case: LaunchCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"result": torch.arange(case.num_launches, dtype=torch.int32, device=inputs["device"])}

    def allocate(self, case: LaunchCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"result": torch.empty(case.num_launches, dtype=torch.int32, device=inputs["device"])}

    def plan(
        self, case: LaunchCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch | HostCall, ...]:
        return plan_launches(buffers["result"])

    def configs(self, target: str, case: LaunchCase) -> tuple[LaunchConfig, ...]:
        return (LaunchConfig(block_n=1, num_warps=1, num_stages=1),)

    def comparison(self, result: str) -> Comparison:
        return "exact"

    def compute_dtype(self, case: LaunchCase) -> str:
        return "float32"

    def counted_loop(self, case: LaunchCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("empty_kernel", "whole", units=1)

    def traffic(self, case: LaunchCase) -> Traffic:
        return Traffic(read_bytes=0, written_bytes=4 * case.num_launches, flops=0, units=case.num_launches)


class GraphLaunches(EmptyLaunches):
    """The same kernels as nodes of one CUDA graph; without a GPU they are launched one by one."""

    operation = "microbenchmark/launch/graph"

    def plan(
        self, case: LaunchCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch | HostCall, ...]:
        launches = plan_launches(buffers["result"])
        return (capture("graph_of_empty_kernels", launches),) if buffers["result"].is_cuda else launches


VARIANTS = (EmptyLaunches(), GraphLaunches())
