"""What the datasheet cost model predicts for the kinds of figure that get published, each at its three edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from kvsim.catalog import resolve
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.memory import plan_memory
from kvsim.pool import block_bytes
from kvsim.scenario import Scenario

SHORT_TOKENS, LONG_TOKENS = 1024, 32_768
"""Contexts between which slopes are taken."""
BREAK_EVEN_LIMIT_TOKENS = 200_000


@lru_cache(maxsize=256)
def deploy(
    model: str,
    device: str,
    strategy: str,
    ranks: int = 1,
    engine: str = "vllm",
    gpu_memory_utilization: float = 0.9,
    options: tuple[tuple[str, int | str], ...] = (),
) -> Deployment:
    """Resolve a deployment of one replica; the utilisation is vLLM's alone."""
    share = {"gpu_memory_utilization": gpu_memory_utilization} if engine == "vllm" else {}
    return resolve(
        Scenario.model_validate(
            {
                "model": model,
                "device": device,
                "workload": "chat",
                "compression": strategy,
                "tensor_parallel_size": ranks,
                # vllm bench serve asks for greedy decoding where it is not told otherwise.
                "engine": {"kind": engine, **share, "sampling": {"temperature": 0.0}, **dict(options)},
                "calibration": "datasheet",
            }
        )
    )


def step_model(deployment: Deployment, edge: Edge) -> StepModel:
    """Price a deployment at one edge."""
    return StepModel(deployment, build_rates(deployment.device, deployment.priors, edge))


def decode_s(step: StepModel, batch: int, context_tokens: int) -> float:
    """Seconds of one decode step."""
    return total_seconds(decode_split(step, batch, context_tokens, 0))


def prefill_s(step: StepModel, prompt_tokens: int) -> float:
    """Seconds of one prompt alone."""
    return total_seconds(prefill_split(step, prompt_tokens))


def itl_slope_ns(edge: Edge, *, model: str, device: str, strategy: str, batch: int = 1) -> float:
    """Nanoseconds that a decode step gains per cached token of one sequence."""
    step = step_model(deploy(model, device, strategy), edge)
    rise_s = decode_s(step, batch, LONG_TOKENS) - decode_s(step, batch, SHORT_TOKENS)
    return rise_s / (LONG_TOKENS - SHORT_TOKENS) / batch * 1e9


def itl_intercept_ms(edge: Edge, *, model: str, device: str, strategy: str) -> float:
    """Milliseconds of a decode step of one sequence, drawn back to an empty cache."""
    step = step_model(deploy(model, device, strategy), edge)
    slope_ns = itl_slope_ns(edge, model=model, device=device, strategy=strategy)
    return decode_s(step, 1, SHORT_TOKENS) * 1e3 - slope_ns * SHORT_TOKENS * 1e-6


def break_even_tokens(edge: Edge, *, model: str, device: str, strategy: str) -> float:
    """Context from which a lone sequence decodes faster than with the model's own cache."""
    mine, plain = (step_model(deploy(model, device, name), edge) for name in (strategy, "native"))
    low, high = 0, BREAK_EVEN_LIMIT_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        if decode_s(mine, 1, middle) < decode_s(plain, 1, middle):
            high = middle
        else:
            low = middle
    return float(high)


def decode_gain(edge: Edge, *, model: str, device: str, strategy: str, batch: int, context_tokens: int) -> float:
    """Decode rate over that with the model's own cache."""
    mine, plain = (step_model(deploy(model, device, name), edge) for name in (strategy, "native"))
    return decode_s(plain, batch, context_tokens) / decode_s(mine, batch, context_tokens)


def kv_blocks(deployment: Deployment, edge: Edge = Edge.CENTRAL) -> int:
    """Blocks of the KV pool."""
    return plan_memory(deployment, block_bytes(deployment), edge).num_blocks


def capacity_ratio(edge: Edge, *, model: str, device: str, strategy: str) -> float:
    """KV blocks over those with the model's own cache."""
    return kv_blocks(deploy(model, device, strategy), edge) / kv_blocks(deploy(model, device, "native"), edge)


def closed_loop_tpot_ratio(
    edge: Edge, *, model: str, device: str, strategy: str, versus: str, clients: int, prompt_tokens: int,
    output_tokens: int,
) -> float:  # fmt: skip
    """Decode step over that of another strategy, each at the batch that its pool holds of ``clients`` requests."""

    def tpot_s(name: str) -> float:
        deployment = deploy(model, device, name)
        pool_bytes = kv_blocks(deployment, edge) * block_bytes(deployment)
        step = step_model(deployment, edge)
        held_bytes = step.sequences.profile(prompt_tokens).resident_bytes(output_tokens, deployment.engine.block_size)
        return decode_s(step, min(clients, pool_bytes // held_bytes), prompt_tokens + output_tokens // 2)

    return tpot_s(strategy) / tpot_s(versus)


QUANTITIES: Mapping[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        itl_slope_ns, itl_intercept_ms, break_even_tokens, decode_gain, capacity_ratio, closed_loop_tpot_ratio,
    )
}  # fmt: skip
"""Quantities that ``published_timings.yaml`` may name."""
