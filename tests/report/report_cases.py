"""Scenarios that the report tests share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from kvsim.compression import STRATEGIES
from kvsim.errors import KvsimError
from kvsim.report import Figure, Report
from kvsim.scenario import Scenario
from kvsim.simulate import estimate, simulate

CASES = (
    ("llama-3.1-8b", "h100-sxm", 1),
    ("qwen3-30b-a3b", "a100-sxm-80gb", 2),
    ("gemma-3-12b", "tpu-v6e", 2),
    ("deepseek-v3", "h200-sxm", 8),
    ("llama-3.2-1b", "snapdragon-8-gen-3", 1),
)


def workload(
    rate: float = 2.0, num_prompts: int = 40, prompt_tokens: int = 900, output_tokens: int = 60
) -> dict[str, Any]:
    return {
        "kind": "synthetic",
        "num_prompts": num_prompts,
        "input_len": {"kind": "uniform", "min_tokens": prompt_tokens // 2, "max_tokens": prompt_tokens * 3 // 2},
        "output_len": {"kind": "uniform", "min_tokens": output_tokens // 2, "max_tokens": output_tokens * 3 // 2},
        "arrivals": {"kind": "poisson", "request_rate": rate},
    }


def scenario(model: str, device: str, ranks: int = 1, **rest: Any) -> Scenario:
    fields = {"model": model, "device": device, "tensor_parallel_size": ranks, "workload": workload(), **rest}
    return Scenario.model_validate(fields)


@lru_cache(maxsize=8)
def reports(model: str, device: str, ranks: int) -> tuple[Report, ...]:
    """Every strategy that can run, simulated and estimated."""
    made = []
    for strategy in STRATEGIES:
        one = scenario(model, device, ranks, compression=strategy, slo={"ttft_s": "400 ms", "tpot_s": "40 ms"})
        for method in (simulate, estimate):
            try:
                made.append(method(one))
            except KvsimError:
                continue
    return tuple(made)


def figures(value: Any, path: str = "") -> Iterator[tuple[str, Figure]]:
    """Every Figure inside a report, with its place."""
    if isinstance(value, Figure):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from figures(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from figures(item, f"{path}[{index}]")
