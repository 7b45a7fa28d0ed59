"""Priced deployments that the cost tests share, and lower bounds that no pricing may beat."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from kvsim.calibration.engine_fits import engine_fit
from kvsim.calibration.sets import load_set
from kvsim.catalog import resolve
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.compression import STRATEGIES
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.errors import KvsimError
from kvsim.memory import plan_memory
from kvsim.pool import block_bytes
from kvsim.scenario import Scenario

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

DEVICES = (
    "h100-sxm", "h200-sxm", "b200-sxm", "a100-sxm-80gb", "l40s", "mi300x", "tpu-v6e", "apple-m4-max",
    "snapdragon-8-gen-3", "jetson-agx-orin-64gb",
)  # fmt: skip
MODELS = (
    "llama-3.1-8b", "llama-3.3-70b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "gemma-3-12b", "llama-3.2-1b",
)  # fmt: skip


PRICED = (
    *((device, "datasheet") for device in DEVICES),
    *((device, "default") for device in DEVICES if load_set("default").covers(device) or engine_fit(device)),
)  # fmt: skip
"""Devices, and how they are priced: laws hold for priors, for the kernels that the shipped set has, and for fits of
whole engines."""


@lru_cache(maxsize=2048)
def deploy(
    model: str, device: str, strategy: str = "native", tensor_parallel_size: int = 1, engine: str = "vllm",
    calibration: str = "datasheet",
) -> Deployment:  # fmt: skip
    """Resolve a deployment; the workload plays no part in the price of a step."""
    return resolve(
        Scenario.model_validate(
            {
                "model": model,
                "device": device,
                "workload": "chat",
                "compression": strategy,
                "tensor_parallel_size": tensor_parallel_size,
                "engine": {"kind": engine},
                "calibration": calibration,
            }
        )
    )


def step_model(deployment: Deployment, edge: Edge = Edge.CENTRAL) -> StepModel:
    return StepModel(deployment, build_rates(deployment.device, deployment.priors, edge))


@lru_cache(maxsize=256)
def ranks_needed(model: str, device: str) -> int | None:
    """Fewest ranks of ``device`` that hold ``model``, or None where no count up to 16 does."""
    for ranks in (1, 2, 4, 8, 16):
        try:
            deployment = deploy(model, device, "native", ranks)
            plan_memory(deployment, block_bytes(deployment))
        except KvsimError:
            continue
        return ranks
    return None


def runnable(device: str, calibration: str = "datasheet") -> Iterator[Deployment]:
    """Every model that fits ``device`` under every named strategy that it can run."""
    for model in MODELS:
        ranks = ranks_needed(model, device)
        if ranks is None:
            continue
        for strategy in STRATEGIES:
            try:
                yield deploy(model, device, strategy, ranks, calibration=calibration)
            except KvsimError:
                continue


def decode_s(step: StepModel, batch: int, context_tokens: int) -> float:
    return total_seconds(decode_split(step, batch, context_tokens, 0))


def prefill_s(step: StepModel, prompt_tokens: int) -> float:
    return total_seconds(prefill_split(step, prompt_tokens))


def label(deployment: Deployment) -> str:
    return f"{deployment.model.name} {deployment.compression.name} tp{deployment.tensor_parallel_size}"


def weight_bytes_read(deployment: Deployment, step: StepModel, batch: int) -> float:
    """Weights that a decode step of ``batch`` sequences must read on one rank."""
    linear = sum(
        float(gemm.gemm.matrices_touched(batch)) * gemm.gemm.k * gemm.gemm.n * gemm.gemm.count for gemm in step.gemms
    )
    return linear * deployment.model.weight_bits / 8 + step.head.gemm.k * step.head.gemm.n * 2.0


def kv_bytes_read(deployment: Deployment, context_tokens: int) -> float:
    """Least KV bytes that one sequence's decode step must read on one rank: attended tokens, smallest format."""
    total = 0.0
    for layer_class in deployment.layer_classes:
        group, native = layer_class.group, deployment.model.dtype
        stored = min(layer_class.encoding.bytes_per_token(group, native).total_bytes, group.kv_elements_per_token * 2.0)
        for view, layers in layer_class.bands:
            tokens = sum(one.share * one.attended(1) for one in layer_class.head_curves(context_tokens, view))
            total += layers * tokens * stored * layer_class.rank_share
    return total


def step_flops(deployment: Deployment, step: StepModel, batch: int) -> float:
    """FLOPs of the linear layers of a decode step on one rank."""
    return sum(float(gemm.gemm.flops(batch)) * gemm.gemm.count for gemm in (*step.gemms, step.head))


def peak_flops(deployment: Deployment) -> float:
    """The device's fastest dense rate in any dtype."""
    return max(fact.value for fact in deployment.device.dense_flops)
