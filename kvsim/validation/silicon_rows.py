"""Rows of aiconfigurator's silicon sample as cases: which harness measured a row, and how its server was started.

The sample holds runs of two harnesses, told apart by ``silicon_data_source``. What a row does not state is set as its
harness sets it; every rule names the script that says so (docs/serving-validation.md quotes them).

InferenceX (a dated CSV or ``db-dump``): ``benchmark_serving.py --random-range-ratio 0.8 --num-prompts 10·C
--max-concurrency C --request-rate inf``, C requests at once and then one for each that ends; means over all of them.
aiconfigurator's own runs (``aic-auto-gap-analysis``): ``genai-perf --synthetic-input-tokens-stddev 0
--output-tokens-stddev 0 --request-count 10·C``, so that all requests are equally long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from kvsim.specs.engine import EngineSpec
from kvsim.validation.tables import Row, whole

INFERENCEX_RANGE: Final = 0.8
"""Shortest over nominal length, drawn evenly: ``--random-range-ratio``."""
EQUAL: Final = 1.0
OWN_RUNS: Final = "aic-auto-gap-analysis"
MEMORY_FRACTION: Final = 0.9
MAX_RECIPE_SEQS: Final = 512
FP8: Final = "fp8"
NATIVE: Final = "native"


@dataclass(frozen=True)
class Recipe:
    """How a server was started; ``budget`` gives the tokens of a step from (input length, clients)."""

    kv: str = NATIVE
    budget: Callable[[int, int], int] = lambda _isl, _clients: 8192
    memory_fraction: float = MEMORY_FRACTION
    collectives: str | None = None
    async_scheduling: bool | None = None


def _fixed(tokens: int) -> Callable[[int, int], int]:
    return lambda _isl, _clients: tokens


def _one_prompt(isl: int, clients: int) -> int:
    """``MAX_NUM_TOKENS=$(( (CONC+ISL+64+63)/64*64 ))``."""
    return (clients + isl + 127) // 64 * 64


def _prompt_and_slack(isl: int, clients: int) -> int:
    """``agg max_num_tokens = max_batch_size + SlaConfig.isl + 1500``."""
    return clients + isl + 1500


Key = tuple[str, str, str]
"""Backend, part of the model's name, part of the device's name; an empty part fits all."""
INFERENCEX: Final[tuple[tuple[Key, Recipe], ...]] = (
    # benchmarks/70b_fp8_b200_docker.sh, 70b_fp4_b200_docker.sh, 70b_fp8_h100_slurm.sh
    (("vllm", "llama-3", "b200"), Recipe(FP8, collectives="trtllm")),
    (("vllm", "llama-3", "h100"), Recipe()),
    # benchmarks/70b_fp8_b200_trt_slurm.sh, 70b_fp4_b200_trt_docker.sh
    (("trtllm", "llama-3", ""), Recipe(FP8, _fixed(16384))),
    # benchmarks/gptoss_fp4_b200_docker.sh; the one for H100 leaves the cache in the model's dtype
    (("vllm", "gpt-oss", "b200"), Recipe(FP8, collectives="trtllm")),
    (("vllm", "gpt-oss", ""), Recipe()),
    # benchmarks/gptoss_fp4_b200_trt_slurm.sh
    (("trtllm", "gpt-oss", ""), Recipe(FP8, _fixed(20000), 0.85)),
    # benchmarks/dsr1_fp8_b200_trt_slurm.sh
    (("trtllm", "", ""), Recipe(FP8, _one_prompt, 0.8)),
    # benchmarks/dsr1_fp4_b200.sh, dsr1_fp8_b200.sh, single_node/qwen3.5_fp8_b200.sh
    (("sglang", "deepseek", ""), Recipe(FP8, _fixed(16384), 0.85)),
    (("sglang", "qwen3.5", ""), Recipe(FP8, _fixed(32768), 0.82)),
    # single_node/minimaxm2.5_fp8_b200.sh, kimik2.5_int4_b200.sh: vLLM's own budget and dtype
    (("vllm", "minimax", ""), Recipe(memory_fraction=0.95)),
)
"""Servers of InferenceX, the first that fits."""
OWN: Final[Mapping[str, Recipe]] = {
    # vLLM 0.12, where asynchronous scheduling had to be asked for.
    "vllm": Recipe(budget=_prompt_and_slack, async_scheduling=False),
    # SGLang: chunked_prefill_size 8192 on 80 GB devices (server_args.py), max_prefill_tokens 16384.
    "sglang": Recipe(),
    # aiconfigurator's generator writes kv_cache_config.dtype fp8 beside fp8 weights.
    "trtllm": Recipe(FP8, _prompt_and_slack),
}
"""Servers of aiconfigurator's own runs: the engines' defaults."""


def is_own_run(row: Row) -> bool:
    """Whether aiconfigurator's authors measured the row, with requests of equal length."""
    return OWN_RUNS in row.get("silicon_data_source", "")


def stated_clients(row: Row) -> int | None:
    """Requests in flight on one server; None where they are not stated.

    ``batch_size`` alone is what a search planned for a server. Beside a larger ``silicon_concurrency`` it says how many
    of those requests each of several equal servers got.
    """
    found = re.search(r"silicon_concurrency=(\d+)", row.get("silicon_data_source", ""))
    if found is None:
        return None
    clients, planned = int(found[1]), whole(row, "batch_size")
    return planned if planned and 0 < planned < clients else clients


def harness_of(row: Row) -> str:
    """Who measured a row."""
    return "aiconfigurator" if is_own_run(row) else "InferenceX"


def range_ratio(row: Row) -> float:
    """Shortest over nominal length of a row's requests."""
    return EQUAL if is_own_run(row) else INFERENCEX_RANGE


def recipe_of(row: Row) -> Recipe:
    """How the server of a row was started."""
    backend, model, device = row["backend"].lower(), row["model_path"].lower(), row["system"].lower()
    if is_own_run(row):
        own = OWN.get(backend, Recipe())
        return own if row["precision"] else replace(own, kv=NATIVE)
    for key, recipe in INFERENCEX:
        if backend == key[0] and key[1] in model and key[2] in device:
            return recipe
    return Recipe()


def engine_of(recipe: Recipe, isl: int, clients: int) -> EngineSpec:
    """Engine options of a recipe under a load."""
    return EngineSpec(
        max_num_seqs=max(clients, 256),
        max_num_batched_tokens=max(recipe.budget(isl, clients), clients),
        gpu_memory_utilization=recipe.memory_fraction,
        async_scheduling=recipe.async_scheduling,
    )
