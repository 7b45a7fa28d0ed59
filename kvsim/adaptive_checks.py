"""What cannot go together with several levels of compression, and why."""

from __future__ import annotations

from collections.abc import Iterator

from kvsim.errors import IncompatibleScenario
from kvsim.scenario import Scenario
from kvsim.specs.model import ModelSpec


def check_levels(scenario: Scenario, model: ModelSpec) -> None:
    """Raise IncompatibleScenario naming the first field that does not fit several levels."""
    reason = next(_reasons(scenario, model), None)
    if reason is not None:
        raise IncompatibleScenario(reason)


def _reasons(scenario: Scenario, model: ModelSpec) -> Iterator[str]:
    engine = scenario.engine
    levels = scenario.adaptive.levels if scenario.adaptive is not None else ()
    for index, level in enumerate(levels):
        if level.compression.reduction.is_architecture:
            yield (
                f"adaptive.levels.{index}: {level.compression.name} is an architecture, which a request cannot choose; "
                "give it as the compression of the scenario"
            )
    hold = "leave it out, or hold one level by adaptive.policy: {kind: static, level: 0} without classes"
    if engine.num_gpu_blocks_override is not None:
        yield (
            "engine.num_gpu_blocks_override: blocks of different levels differ in size, so their number does not say "
            "how large the pool is; give engine.kv_cache_memory_bytes instead"
        )
    for field, value in (("kv_offloading_size", engine.kv_offloading_size), ("kv_tiers", engine.kv_tiers)):
        if value:
            yield f"engine.{field}: a tier holds blocks of one format, and adaptive levels have several; {hold}"
    if engine.kind != "vllm":
        yield (
            f"engine.kind: adaptive levels are scheduled by vLLM's rules, and {engine.kind} has others; choose vllm, "
            "or hold one level"
        )
    if engine.speculative_config is not None:
        yield f"engine.speculative_config: drafts are verified over one format; {hold}"
    if scenario.pipeline_parallel_size > 1 or (scenario.data_parallel_size > 1 and model.moe is not None):
        field = "pipeline_parallel_size" if scenario.pipeline_parallel_size > 1 else "data_parallel_size"
        yield f"{field}: sequences of different levels are not dealt to lanes of one step; {hold}"
