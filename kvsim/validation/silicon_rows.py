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
from dataclasses import dataclass, field, replace
from typing import Any, Final

from kvsim.specs.engine import EngineSpec
from kvsim.validation.tables import Row, whole

INFERENCEX_RANGE: Final = 0.8
"""Shortest over nominal length, drawn evenly: ``--random-range-ratio``."""
EQUAL: Final = 1.0
OWN_RUNS: Final = "aic-auto-gap-analysis"
MEMORY_FRACTION: Final = 0.9
"""What InferenceX asks of vLLM, and its default at those versions."""
FP8: Final = "fp8"
NATIVE: Final = "native"


@dataclass(frozen=True)
class Recipe:
    """How a server was started: KV strategy, who runs its collectives, and engine options in the engine's names."""

    kv: str = NATIVE
    collectives: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    step_tokens: Callable[[int, int], int] | None = None
    """Token budget of a step, where it depends on (input length, clients)."""


def _one_prompt(isl: int, clients: int) -> int:
    """``MAX_NUM_TOKENS=$(( (CONC+ISL+64+63)/64*64 ))``."""
    return (clients + isl + 127) // 64 * 64


def _prompt_and_slack(isl: int, clients: int) -> int:
    """``agg max_num_tokens = max_batch_size + SlaConfig.isl + 1500``."""
    return clients + isl + 1500


Key = tuple[str, str, str]
"""Backend, part of the model's name, part of the device's name; an empty part fits all."""
INFERENCEX: Final[tuple[tuple[Key, Recipe], ...]] = (
    # benchmarks/70b_fp8_b200_docker.sh, 70b_fp4_b200_docker.sh: enable_fi_allreduce_fusion runs TensorRT-LLM's kernel.
    (
        ("vllm", "llama-3", "b200"),
        Recipe(FP8, "trtllm", {"max_num_seqs": 512, "async_scheduling": True, "fused_input_quantization": True}),
    ),
    # benchmarks/70b_fp8_h100_docker.sh; see docs/serving-validation.md for the cache's dtype.
    (("vllm", "llama-3", "h100"), Recipe(options={"async_scheduling": True})),
    # benchmarks/70b_fp8_b200_trt_slurm.sh, 70b_fp4_b200_trt_docker.sh
    (("trtllm", "llama-3", ""), Recipe(FP8, options={"max_num_tokens": 16384, "fused_input_quantization": True})),
    # benchmarks/gptoss_fp4_b200_docker.sh; the one for H100 leaves the cache in the model's dtype.
    (("vllm", "gpt-oss", "b200"), Recipe(FP8, "trtllm", {"max_num_seqs": 512, "async_scheduling": True})),
    (("vllm", "gpt-oss", ""), Recipe(options={"async_scheduling": True})),
    # benchmarks/gptoss_fp4_b200_trt_slurm.sh
    (("trtllm", "gpt-oss", ""), Recipe(FP8, options={"max_num_tokens": 20000, "free_gpu_memory_fraction": 0.85})),
    # benchmarks/dsr1_fp8_b200_trt_slurm.sh
    (("trtllm", "", ""), Recipe(FP8, options={"free_gpu_memory_fraction": 0.8}, step_tokens=_one_prompt)),
    # benchmarks/dsr1_fp4_b200.sh, dsr1_fp8_b200.sh
    (("sglang", "deepseek", ""), Recipe(FP8, options={"chunked_prefill_size": 16384, "mem_fraction_static": 0.85})),
    # benchmarks/single_node/qwen3.5_fp8_b200.sh
    (
        ("sglang", "qwen3.5", ""),
        Recipe(FP8, None, {"chunked_prefill_size": 32768, "max_prefill_tokens": 32768, "mem_fraction_static": 0.82}),
    ),
    # benchmarks/single_node/minimaxm2.5_fp8_b200.sh
    (("vllm", "minimax", ""), Recipe(options={"gpu_memory_utilization": 0.95})),
)
"""Servers of InferenceX, the first that fits."""
OWN: Final[Mapping[str, Recipe]] = {
    # vLLM 0.12, where asynchronous scheduling had to be asked for.
    "vllm": Recipe(options={"async_scheduling": False}, step_tokens=_prompt_and_slack),
    # backend_config_mapping.yaml writes chunked_prefill_size -1 where no max_num_tokens is set. The harness asks for
    # min_tokens, which SGLang 0.5.1 looked up by a mask of the logits (BatchedMinNewTokensPenalizer): the host waits
    # for the device in every step, so that nothing overlaps.
    "sglang": Recipe(options={"chunked_prefill_size": -1, "async_scheduling": False, "use_flashinfer_sampler": True}),
    "trtllm": Recipe(FP8, step_tokens=_prompt_and_slack),
}
"""Servers of aiconfigurator's own runs, by its generator's rules (rule_plugin/benchmark/*.rule)."""
KINDS: Final[Mapping[str, str]] = {"trtllm": "tensorrt_llm"}
"""Engine by backend, where the names differ."""
RECV_INTERVALS: Final = (10, 30)
"""InferenceX's ``--scheduler-recv-interval`` below 16 clients, and from there."""
MANY_CLIENTS: Final = 16


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


def engine_of(row: Row, clients: int) -> EngineSpec:
    """Engine options of a row's server."""
    recipe, backend = recipe_of(row), row["backend"].lower()
    isl, osl = whole(row, "isl") or 1, whole(row, "osl") or 1
    options = {"kind": KINDS.get(backend, backend), **recipe.options}
    if backend == "vllm":
        options = {"gpu_memory_utilization": MEMORY_FRACTION, **options}
    if backend != "sglang":
        options["max_num_seqs"] = max(clients, options.get("max_num_seqs", 256))
    if recipe.step_tokens is not None:
        options["max_num_batched_tokens"] = max(recipe.step_tokens(isl, clients), clients)
    options |= _waits(row, backend, isl, osl, clients)
    return EngineSpec.model_validate(options)


def _waits(row: Row, backend: str, isl: int, osl: int, clients: int) -> dict[str, float]:
    """What InferenceX's servers wait for before they look at new requests."""
    if is_own_run(row):
        return {}
    if backend == "sglang":
        return {"scheduler_recv_interval": RECV_INTERVALS[clients >= MANY_CLIENTS]}
    if backend == "trtllm" and "llama" in row["model_path"].lower() and (isl, osl) == (1024, 1024):
        ranks = whole(row, "tp_size") or 1
        return {"batch_wait_timeout_iters": 20, "batch_wait_max_tokens_ratio": 0.9} if ranks < 8 else {}
    return {}
