"""A vLLM log beside what kvsim predicts for the same start: weights, activations, KV pool, blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvsim.allocator import padded_layer_shares
from kvsim.catalog import resolve
from kvsim.deployment import Deployment
from kvsim.errors import InvalidSpec
from kvsim.memory import MemoryPlan, plan_memory
from kvsim.pool import block_bytes, logged_tokens
from kvsim.scenario import Scenario
from kvsim.vllm_log import GIB, VllmLog

TOLERANCE: Final = 0.01
LARGE_DEVICE_GIB: Final = 70
SEATS, SEATS_LARGE_DEVICE = 256, 1024
"""vLLM's default ``max_num_seqs``; the larger from 70 GiB, A100 apart (``EngineArgs``, recalled)."""
COMPRESSIONS: Final = {
    "auto": "native", "bfloat16": "native", "float16": "native", "fp8": "fp8", "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8_e5m2", "nvfp4": "nvfp4",
}  # fmt: skip
COPIED: Final = (
    "max_num_seqs", "max_num_batched_tokens", "max_model_len", "num_gpu_blocks_override", "block_size",
)  # fmt: skip
LAST_PLAIN_TOKENS: Final = (0, 15)
"""Later releases log the tokens of a hybrid model by another rule."""


@dataclass(frozen=True)
class Compared:
    """One figure of the log, and its prediction; None where one of them is unknown."""

    name: str
    unit: str
    predicted: float | None
    logged: float | None

    @property
    def error(self) -> float | None:
        """Predicted over logged, less one."""
        if self.predicted is None or not self.logged:
            return None
        return self.predicted / self.logged - 1.0


@dataclass(frozen=True)
class LogCheck:
    """All figures of a log. ``decisive`` names the one that the tolerance is asked of."""

    scenario: Scenario
    figures: tuple[Compared, ...]
    decisive: str
    tolerance: float
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Error of the decisive figure."""
        found = next(figure.error for figure in self.figures if figure.name == self.decisive)
        return float("inf") if found is None else found

    @property
    def passed(self) -> bool:
        """Whether the decisive figure is within the tolerance."""
        return abs(self.error) <= self.tolerance


def log_scenario(log: VllmLog, device: str | None, model: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Scenario document that a log stands for, and what it had to assume.

    Raises
    ------
    InvalidSpec
        The log names no model or device and none is given, or an option that kvsim has no counterpart for.
    """
    name, on = model or log.options.get("model"), device or log.device
    if not name:
        msg = f"{log.name}: no line names the model ('non-default args: ...'); give --model"
        raise InvalidSpec(msg)
    if not on:
        msg = f"{log.name}: no line names the device; give --device, such as --device h100-sxm"
        raise InvalidSpec(msg)
    notes: list[str] = []
    engine = _engine(log, str(on), notes)
    cache = str(log.options.get("kv_cache_dtype", "auto"))
    if cache not in COMPRESSIONS:
        msg = f"{log.name}: kv_cache_dtype {cache!r} has no strategy here; known: {', '.join(COMPRESSIONS)}"
        raise InvalidSpec(msg)
    stages = log.number("pipeline_parallel_size") or 1
    if stages > 1:
        msg = f"{log.name}: pipeline_parallel_size is {stages}; only tensor parallelism is compared"
        raise InvalidSpec(msg)
    if log.options.get("speculative_config") or log.options.get("enable_lora"):
        notes.append("a draft model and LoRA adapters in the log are left out of the prediction")
    document = {
        "model": str(name),
        "device": str(on),
        "workload": "chat",
        "compression": COMPRESSIONS[cache],
        "tensor_parallel_size": log.number("tensor_parallel_size") or 1,
        "engine": engine,
    }
    return document, notes


def _engine(log: VllmLog, device: str, notes: list[str]) -> dict[str, Any]:
    engine: dict[str, Any] = {name: log.number(name) for name in COPIED if log.options.get(name) is not None}
    share = log.options.get("gpu_memory_utilization")
    if share is None:
        # A log of 0.19 has 0.9, one of 0.31 has 0.92.
        share = 0.9 if _release(log) is None or (_release(log) or (0, 0)) < (0, 20) else 0.92
        notes.append(f"the log names no gpu_memory_utilization: vLLM's default of {share:g} is assumed")
    engine["gpu_memory_utilization"] = share
    size = log.number("kv_cache_memory_bytes")
    if size is not None:
        engine["kv_cache_memory_bytes"] = f"{size} B"
    if log.version is not None:
        engine["version"] = log.version
    if "max_num_seqs" not in engine:
        large = (log.sizes.get("total_gib") or 0.0) >= LARGE_DEVICE_GIB and "a100" not in device.lower()
        engine["max_num_seqs"] = SEATS_LARGE_DEVICE if large else SEATS
        notes.append(f"the log names no max_num_seqs: vLLM's default of {engine['max_num_seqs']} is assumed")
    if "max_num_batched_tokens" not in engine:
        notes.append("the log names no max_num_batched_tokens: 8192 is assumed")
    engine["max_num_batched_tokens"] = max(engine.get("max_num_batched_tokens") or 8192, engine["max_num_seqs"])
    for flag in ("enable_prefix_caching", "enable_chunked_prefill"):
        if isinstance(log.options.get(flag), bool):
            engine[flag] = log.options[flag]
    reserved = log.sizes.get("graphs_estimated_gib")
    if reserved and log.reserves_graphs:
        engine["cuda_graph_memory_bytes"] = f"{round(reserved * GIB)} B"
        notes.append(f"{reserved:g} GiB for CUDA graphs are taken from the log: kvsim does not predict them")
    return engine


def _release(log: VllmLog) -> tuple[int, int] | None:
    if log.version is None:
        return None
    major, minor = log.version.split(".")[:2]
    return int(major), int(minor)


def check_log(
    log: VllmLog, scenario: Scenario, notes: tuple[str, ...] = (), *, tolerance: float = TOLERANCE,
    base_dir: Path | None = None,
) -> LogCheck:  # fmt: skip
    """Compare a log with what its scenario predicts; the KV blocks decide, or what the log has in their place.

    Raises
    ------
    ScenarioError, InfeasibleScenario
        The scenario names something unknown, or leaves no room for KV.
    """
    # The log's limit does not change the memory, and one longer than the pool is its own error elsewhere.
    deployment = resolve(scenario, base_dir=base_dir)
    plan = plan_memory(deployment, block_bytes(deployment))
    is_hybrid = bool(padded_layer_shares(deployment.model, tensor_parallel_size=deployment.tensor_parallel_size))
    figures = _figures(log, deployment, plan, is_hybrid=is_hybrid)
    known = {figure.name for figure in figures if figure.error is not None}
    decisive = next((name for name in ("KV blocks", "KV tokens", "KV memory") if name in known), None)
    if decisive is None:
        msg = (
            f"{log.name}: a hybrid model's tokens follow another rule in vLLM {log.version}, and the log has no "
            "'Available KV cache memory' line to compare instead"
        )
        raise InvalidSpec(msg)
    return LogCheck(
        scenario, figures, decisive, tolerance, (*notes, *_differences(scenario, log), *_gaps(deployment, log))
    )


def _differences(scenario: Scenario, log: VllmLog) -> list[str]:
    """Options in which a scenario of the user's own differs from the log."""
    mine = {**scenario.engine.model_dump(), "tensor_parallel_size": scenario.tensor_parallel_size}
    names = ("tensor_parallel_size", "gpu_memory_utilization", *COPIED)
    return [
        f"{name} is {_plain(mine[name])} in the scenario and {_plain(log.options[name])} in the log"
        for name in names
        if log.options.get(name) is not None and mine[name] != log.options[name]
    ]


def _plain(value: Any) -> str:
    """A logged or given option as a person writes it: whole numbers without a point."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _figures(log: VllmLog, deployment: Deployment, plan: MemoryPlan, *, is_hybrid: bool) -> tuple[Compared, ...]:
    sizes, block_size = log.sizes, deployment.engine.block_size
    terms = {term.name: term.size_bytes / GIB for term in plan.terms}
    graphs = terms.pop("cuda graphs", None)
    rotary = terms.pop("rotary tables", 0.0)
    weights = terms.pop("weights")
    logged_engine = None
    if "activations_gib" in sizes:
        # Later releases print weights and non-torch memory in one figure.
        beside = sizes.get("consumed_gib", 0.0) - sizes.get("weights_gib", 0.0) if "consumed_gib" in sizes else 0.0
        logged_engine = sizes["activations_gib"] + sizes.get("non_torch_gib", beside)
    tokens: float | None = logged_tokens(deployment, plan.num_blocks * plan.block_bytes)
    if is_hybrid:
        newer = deployment.engine.release is None or deployment.engine.release > LAST_PLAIN_TOKENS
        tokens = None if newer else logged_tokens(deployment, plan.pool_bytes)
    length = log.number("max_model_len")
    concurrency = tokens / length if tokens is not None and length else None
    # Of a hybrid model vLLM counts blocks of single groups.
    blocks = None if is_hybrid else float(plan.num_blocks)
    logged_blocks = sizes.get("blocks")
    if logged_blocks is None and not is_hybrid and "kv_tokens" in sizes:
        logged_blocks = sizes["kv_tokens"] // block_size
    return (
        Compared("device memory", "GiB", plan.usable_bytes / GIB, sizes.get("total_gib")),
        Compared("weights", "GiB", weights + rotary, sizes.get("weights_gib")),
        Compared("activations and engine", "GiB", sum(terms.values()), logged_engine),
        Compared("CUDA graphs", "GiB", graphs, sizes.get("graphs_gib")),
        Compared("KV memory", "GiB", plan.pool_bytes / GIB, sizes.get("kv_gib")),
        Compared("KV blocks", "blocks", blocks, logged_blocks),
        Compared("KV tokens", "tokens", tokens, sizes.get("kv_tokens")),
        Compared("max concurrency", "x", concurrency, sizes.get("concurrency")),
    )


def _gaps(deployment: Deployment, log: VllmLog) -> list[str]:
    notes = []
    if deployment.model.moe is not None:
        notes.append("buffers of mixture-of-experts layers are a wide prior: expect several per cent")
    if deployment.model.num_encoder_parameters:
        notes.append("the profiling step of a vision encoder is not predicted")
    release = deployment.engine.release
    if (release is None or release >= (0, 21)) and not log.reserves_graphs and "graphs_gib" in log.sizes:
        notes.append("releases from 0.21 may take CUDA graphs off the pool; this log does not say that it did")
    return notes
