"""From the words of a measurement table to a deployment, and from a deployment to predicted latencies and rates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

import numpy as np

from kvsim.calibration.engine_fits import used_rows
from kvsim.calibration.frameworks import COLLECTIVES, preferring
from kvsim.calibration.sets import CalibrationSet
from kvsim.catalog import resolve
from kvsim.closed_form import decode_split, prefill_split, total_seconds
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.device_catalog import load_device
from kvsim.errors import InfeasibleScenario, RequestDoesNotFit, UnknownName
from kvsim.memory import plan_memory
from kvsim.model_catalog import list_models, preset_hub_ids
from kvsim.pool import block_bytes, longest_prompt
from kvsim.requests import RequestTable
from kvsim.scenario import Scenario, Slo
from kvsim.sim.run import RunResult, run_requests
from kvsim.specs.base import Dtype
from kvsim.specs.engine import EngineSpec, SamplingSpec
from kvsim.specs.workload import BurstArrivals, ConstantLengths, SyntheticWorkload
from kvsim.summary import Outcome, outcome
from kvsim.validation.suite import Options, slug

DATASHEET: Final = "datasheet"
"""Calibration that uses nothing measured."""
MAX_RANKS: Final = 8
"""Ranks of one node; beyond it links are slower and not in the device specs."""


@dataclass(frozen=True)
class WeightFormat:
    """Stored bits per weight, scales included (None: the preset's), and what GEMMs multiply in (None: 16 bits)."""

    bits: float | None
    dtype: Dtype | None = None


WEIGHT_FORMATS: Final[Mapping[str, WeightFormat]] = {
    "bf16": WeightFormat(16.0, Dtype.BF16),
    "f16": WeightFormat(16.0, Dtype.BF16),
    "fp8": WeightFormat(8.0, Dtype.FP8),
    # NVFP4: 4 bits and an 8-bit scale per 16 weights.
    "fp4": WeightFormat(4.5, Dtype.FP4),
    # 4 bits and a 16-bit scale per 32; multiplied in 16 bits after unpacking.
    "int4": WeightFormat(4.5),
    # llama.cpp blocks of 32: 8 or 4 bits and a 16-bit scale (ggml-common.h).
    "q8_0": WeightFormat(8.5),
    "q4_0": WeightFormat(4.5),
    # The checkpoint's own format, multiplied in 16 bits after unpacking, as llama.cpp does with MXFP4.
    "unpacked": WeightFormat(None),
}


@dataclass(frozen=True)
class Setup:
    """A deployment by names of kvsim; ``weights`` overrides the preset's weight format."""

    model: str
    device: str
    strategy: str = "native"
    weights: str | None = None
    ranks: int = 1
    engine: EngineSpec = field(default_factory=EngineSpec)
    greedy: bool = True
    """Whether requests ask for greedy decoding: ``vllm bench serve`` does unless told otherwise ("Default to greedy
    decoding"), and so does LLMServingSim's runner. Otherwise the server's default applies, the model's own."""
    framework: str | None = None
    """Engine whose kernels run, as their names begin; None takes the set's defaults."""
    collectives: str | None = None
    """The same for collectives alone, where an engine runs another's."""
    stages: int = 1
    """Pipeline parallel stages of so many ranks each."""
    expert_parallel: bool = False
    """Whether each rank holds whole experts rather than a slice of every one."""


SAME_SHAPES: Final[Mapping[str, str]] = {
    "qwen2.5-coder-7b": "qwen2.5-7b", "qwen3-coder-30b-a3b": "qwen3-30b-a3b", "gemma3-1b": "gemma-3-1b",
    "llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b", "mistral-7b": "mistral-7b-v0.3",
    "deepseek-v3.1": "deepseek-v3", "kimi-k2.5": "kimi-k2",
}  # fmt: skip
"""Models without a preset whose text layers have the shapes of one that has."""
OTHER_SPELLINGS: Final[Mapping[str, str]] = {"strix halo 395": "strix-halo"}
_PLACEHOLDER = SyntheticWorkload(
    num_prompts=1, input_len=ConstantLengths(tokens=1), output_len=ConstantLengths(tokens=1), arrivals=BurstArrivals()
)
_NOISE = re.compile(
    r"-(instruct|chat|hf|it|base|fp8|nvfp4|bf16|kv|dynamic|meta|v\d(\.\d)?|\d{4}|17b-16e|17b-128e)(?=-|$)"
)


@lru_cache(maxsize=1)
def _presets_by_core() -> dict[str, str]:
    """Preset by the core of its hub name; the plain preset stands where a quantised one has the same core."""
    cores: dict[str, str] = {}
    for hub_id, preset in sorted(preset_hub_ids().items(), key=lambda item: (len(item[1]), item[1])):
        cores.setdefault(_core(hub_id), preset)
    return cores


def _core(name: str) -> str:
    text = slug(name.rpartition("/")[2])
    text = re.sub(r"^meta-", "", text).replace("llama-v", "llama-").replace("llama2", "llama-2")
    previous = ""
    while previous != text:
        previous, text = text, _NOISE.sub("", text, count=1)
    return text


def find_preset(name: str) -> str | None:
    """Preset of a model that a table names: by preset, by hub id, or by its name without release suffixes.

    Nothing is looked up in the hub. None where no preset is that model.
    """
    key = name.strip().lower()
    if key in list_models():
        return key
    core = _core(name)
    return preset_hub_ids().get(key) or _presets_by_core().get(core) or SAME_SHAPES.get(core)


def find_device(name: str) -> str | None:
    """Device that a table names, also within other words such as ``NVIDIA GB10 (DGX Spark)``; None where unknown."""
    words = [name, name.partition("(")[0], name.partition(",")[0], *re.findall(r"\(([^),]+)", name)]
    parts = (re.sub(r"\bTP\d+\b", "", word).strip() for word in words)
    for part in filter(None, parts):
        try:
            return load_device(OTHER_SPELLINGS.get(part.lower(), part)).spec.name
        except UnknownName:
            continue
    return None


def deploy(setup: Setup, options: Options) -> Deployment:
    """Resolve a setup; a device treated as unseen is priced without anything measured on it.

    Raises
    ------
    UnknownName, IncompatibleScenario
        As `kvsim.catalog.resolve`.
    """
    scenario = Scenario(
        model=setup.model,
        device=setup.device,
        workload=_PLACEHOLDER,
        compression=setup.strategy,
        engine=_sampled(setup),
        tensor_parallel_size=setup.ranks,
        pipeline_parallel_size=setup.stages,
        enable_expert_parallel=setup.expert_parallel,
        bands=False,
        calibration=DATASHEET if setup.device == options.as_unseen else options.calibration,
    )
    deployment = resolve(scenario)
    deployment = replace(deployment, calibration=_kernels(setup, deployment.calibration, deployment.device.name))
    if setup.weights is None:
        return deployment
    form = WEIGHT_FORMATS[setup.weights]
    model = deployment.model
    update = {"weight_bits": form.bits or model.weight_bits, "weight_dtype": form.dtype or model.dtype}
    return replace(deployment, model=model.model_copy(update=update))


def _sampled(setup: Setup) -> EngineSpec:
    if not setup.greedy:
        return setup.engine
    return setup.engine.model_copy(update={"sampling": SamplingSpec(temperature=0.0)})


def _kernels(setup: Setup, calibration: CalibrationSet | None, device: str) -> CalibrationSet | None:
    """The set as the setup's engine uses it."""
    if calibration is None:
        return None
    if setup.framework is not None:
        calibration = preferring(calibration, device, setup.framework)
    if setup.collectives is not None:
        calibration = preferring(calibration, device, setup.collectives, COLLECTIVES)
    return calibration


def fitted_rows(options: Options) -> frozenset[tuple[str, int]]:
    """(file name, row from 1) of table rows that engine-level fits in use were made from: they are not scored.

    A device treated as unseen is priced without its fit, so all of its rows are new.
    """
    if options.as_unseen is not None or options.calibration == DATASHEET:
        return frozenset()
    return used_rows()


@dataclass(frozen=True)
class Played:
    """A simulated run: its outcome, and the requests' times in ticks."""

    outcome: Outcome
    result: RunResult
    requests: RequestTable


def play(deployment: Deployment, requests: RequestTable) -> Played:
    """Simulate requests at the central estimate.

    Raises
    ------
    InfeasibleScenario
        The weights leave no room, or no request fits.
    """
    plan = plan_memory(deployment, block_bytes(deployment))
    limit = deployment.engine.max_model_len or deployment.model.max_position_embeddings
    fits = longest_prompt(deployment, plan.num_blocks * plan.block_bytes, limit)
    if int((requests.prompt_tokens + requests.output_tokens).max()) > fits:
        msg = f"a request is longer than the {fits} tokens that one sequence may hold"
        raise RequestDoesNotFit(msg)
    result = run_requests(deployment, requests, plan, fits)
    return Played(outcome(result, requests, Slo(), Edge.CENTRAL), result, requests)


def kv_blocks(setup: Setup, options: Options) -> int | None:
    """Blocks of the KV pool by the memory model, whatever number the setup's engine was told; None if nothing fits.

    Raises
    ------
    UnknownName, IncompatibleScenario
        As `deploy`.
    """
    engine = setup.engine.model_copy(update={"num_gpu_blocks_override": None})
    deployment = deploy(replace(setup, engine=engine), options)
    try:
        return plan_memory(deployment, block_bytes(deployment)).num_blocks
    except InfeasibleScenario:
        return None


def kv_tokens(deployment: Deployment) -> float:
    """Tokens that the KV pool holds."""
    plan = plan_memory(deployment, block_bytes(deployment))
    return float(plan.num_blocks * deployment.engine.block_size)


@dataclass(frozen=True)
class SingleStream:
    """Rates of equal sequences without a queue, in closed form."""

    step: StepModel

    @classmethod
    def of(cls, deployment: Deployment) -> SingleStream:
        """Price a deployment at the central estimate."""
        return cls(StepModel(deployment, build_rates(deployment.device, deployment.priors, Edge.CENTRAL)))

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of one decode step."""
        return total_seconds(decode_split(self.step, batch, context_tokens, 0))

    def prefill_s(self, prompt_tokens: int, cached_tokens: int = 0) -> float:
        """Seconds of a prompt alone after `cached_tokens` that are there already."""
        whole = total_seconds(prefill_split(self.step, cached_tokens + prompt_tokens))
        return whole - (total_seconds(prefill_split(self.step, cached_tokens)) if cached_tokens else 0.0)

    def mean_decode_s(self, batch: int, prompt_tokens: int, output_tokens: int) -> float:
        """Mean seconds of the steps that generate `output_tokens` after a prompt."""
        at = np.linspace(0, max(output_tokens - 1, 0), 5)
        return float(np.mean([self.decode_s(batch, prompt_tokens + int(step)) for step in at]))
