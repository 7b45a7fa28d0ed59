"""Scheduling policies of serving engines on one replica; none of them knows a clock."""

from kvsim.sim.scheduling.base import Scheduler
from kvsim.sim.scheduling.llamacpp import LlamaCppScheduler
from kvsim.sim.scheduling.parts import Chunk, Leaving, PrefixSharing, SchedulerLimits, SchedulerParts, WaitingQueue
from kvsim.sim.scheduling.sglang import SglangOptions, SglangScheduler
from kvsim.sim.scheduling.tensorrt_llm import BatchWait, GuaranteedNoEvictScheduler, MaxUtilizationScheduler
from kvsim.sim.scheduling.vllm import PriorityScheduler, ThresholdScheduler, VllmScheduler
from kvsim.specs.engine import EngineSpec


def build_scheduler(engine: EngineSpec, parts: SchedulerParts) -> Scheduler:
    """The scheduler of the engine's kind and options."""
    if engine.kind == "sglang":
        return SglangScheduler(parts, _sglang_options(engine))
    if engine.kind == "tensorrt_llm":
        no_evict = engine.capacity_scheduler_policy == "guaranteed_no_evict"
        return (GuaranteedNoEvictScheduler if no_evict else MaxUtilizationScheduler)(parts, _batch_wait(engine))
    if engine.kind == "llamacpp":
        return LlamaCppScheduler(parts)
    if engine.scheduling_policy == "priority":
        return PriorityScheduler(parts, engine.long_prefill_token_threshold)
    if engine.long_prefill_token_threshold:
        return ThresholdScheduler(parts, engine.long_prefill_token_threshold)
    return VllmScheduler(parts)


def _batch_wait(engine: EngineSpec) -> BatchWait | None:
    enough_tokens = engine.batch_wait_max_tokens_ratio * engine.max_num_batched_tokens
    return BatchWait(engine.batch_wait_timeout_iters, enough_tokens) if enough_tokens else None


def _sglang_options(engine: EngineSpec) -> SglangOptions:
    return SglangOptions(
        max_prefill_tokens=engine.max_prefill_tokens,
        enable_mixed_chunk=engine.enable_mixed_chunk,
        schedule_conservativeness=engine.schedule_conservativeness,
        longest_prefix_first=engine.schedule_policy == "lpm",
        recv_interval=engine.scheduler_recv_interval,
    )


__all__ = [
    "Chunk",
    "Leaving",
    "PrefixSharing",
    "Scheduler",
    "SchedulerLimits",
    "SchedulerParts",
    "WaitingQueue",
    "build_scheduler",
]
