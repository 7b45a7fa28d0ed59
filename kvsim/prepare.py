"""A scenario made ready to run: names resolved, requests built, memory divided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from kvsim.analysis import LoadShape, load_shape, resident_bytes
from kvsim.catalog import DATASHEET, at_field, at_level, resolve
from kvsim.cost.basis import kernel_notes
from kvsim.cost.priors import EDGES, Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.selection_notes import selection_notes
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.disaggregation import SplitDeployment, pool_scenario, resolve_split
from kvsim.errors import IncompatibleScenario, InvalidSpec, RequestDoesNotFit, UnknownName
from kvsim.memory import MemoryPlan, plan_memory, plan_or, slot_tokens
from kvsim.pool import block_bytes, longest_sequence
from kvsim.requests import RequestTable
from kvsim.scenario import Scenario
from kvsim.specs.workload import WorkloadSpec
from kvsim.tiers import tier_notes
from kvsim.workload_catalog import load_workload
from kvsim.workloads import build_requests


@dataclass(frozen=True)
class Prepared:
    """A scenario ready to run."""

    scenario: Scenario
    deployment: Deployment
    requests: RequestTable
    plan: MemoryPlan
    max_model_len: int
    notes: tuple[str, ...]
    split: SplitDeployment | None = None
    """Both pools where there are two; ``deployment`` and ``plan`` are then the decode pool's."""

    @cached_property
    def load(self) -> LoadShape:
        """Mean lengths and rate of the workload."""
        return load_shape(self.requests)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Edges of the priors to answer at, the central one first."""
        return EDGES if self.scenario.bands else EDGES[:1]


def prepare(scenario: Scenario, *, base_dir: Path | None = None) -> Prepared:
    """Resolve names, build the requests, divide the memory."""
    if scenario.disaggregation is not None and scenario.adaptive is not None:
        level = scenario.adaptive.only_level
        if level is None:
            msg = (
                "adaptive: KV of several levels is not sent between pools; leave out disaggregation, or hold one level"
            )
            raise IncompatibleScenario(msg)
        scenario = at_level(scenario, level)
    split = resolve_split(scenario, base_dir=base_dir)
    if split is not None:
        return _prepare_split(scenario, split, base_dir)
    return _prepare_pool(scenario, resolve(scenario, base_dir=base_dir), base_dir)


def _prepare_split(scenario: Scenario, split: SplitDeployment, base_dir: Path | None) -> Prepared:
    """Both pools; a sequence must fit either of them."""
    spec = split.spec
    prefill = _prepare_pool(pool_scenario(scenario, spec.prefill), split.prefill, base_dir)
    decode = _prepare_pool(pool_scenario(scenario, spec.decode), split.decode, base_dir)
    return Prepared(
        scenario,
        split.decode,
        decode.requests,
        decode.plan,
        min(prefill.max_model_len, decode.max_model_len),
        tuple(dict.fromkeys((*split.notes, *prefill.notes, *decode.notes))),
        split,
    )


def _prepare_pool(scenario: Scenario, deployment: Deployment, base_dir: Path | None) -> Prepared:
    requests = load_requests(scenario, base_dir)
    plan = plan_memory(deployment, block_bytes(deployment))
    _check_classes(scenario, requests)
    limit, fits = sequence_limits(deployment, plan)
    notes = [*deployment.notes, *kernel_notes(deployment), *requests.notes]
    if scenario.routing == "prefix_aware" and (requests.prefix_hashes is None or not deployment.prefix_caching):
        notes.append("prefix_aware routing goes by load alone: no prefix can be cached here")
    if deployment.engine_fit is not None:
        notes.append(f"{deployment.device.name} is calibrated by an engine-level fit ({deployment.engine_fit.id})")
    elif deployment.calibration is None and scenario.calibration != DATASHEET:
        notes.append(f"no kernel of {deployment.device.name} is calibrated: priced from its datasheet and priors")
    if requests.prefix_hashes is not None and scenario.engine.enable_prefix_caching and not deployment.prefix_caching:
        barred = next(one.compression for one in deployment.variants if one.compression.bars_prefix_reuse)
        notes.append(
            f"prefix caching is off: {barred.name} {barred.bars_prefix_reuse}, so a cached prompt cannot be reused"
        )
    notes += [note for one in deployment.variants if (note := one.compression.rate_note) is not None]
    notes += selection_notes(deployment)
    notes += tier_notes(deployment, shares_prefixes=requests.prefix_hashes is not None)
    config = scenario.engine.speculative_config
    if config is not None and config.num_speculative_tokens:
        notes.append(
            f"{config.num_speculative_tokens} drafts a step by {config.method}, {config.mean_length:.3g} tokens "
            "expected of each; capacity counts the drafter's KV; effects against native compare steps without drafts"
        )
    if fits < limit:
        notes.append(f"the KV pool holds one sequence of {fits} tokens, less than the model's {limit}")
    fits = longest_request(deployment, fits)
    notes += _level_notes(deployment, requests)
    longest = int((requests.prompt_tokens + requests.output_tokens).max())
    if longest > fits:
        notes.append(f"requests longer than {fits} tokens (the longest has {longest}) are rejected, and counted")
    return Prepared(scenario, deployment, requests, plan, fits, tuple(notes))


def sequence_limits(deployment: Deployment, plan: MemoryPlan) -> tuple[int, int]:
    """(tokens that a sequence may have by model and options, tokens of the longest that the pool holds).

    Raises
    ------
    RequestDoesNotFit
        The pool does not hold one sequence of ``max_model_len``.
    """
    asked = deployment.engine.max_model_len
    limit = asked or deployment.model.max_position_embeddings
    limit = min(limit, slot_tokens(deployment) or limit)
    fits = longest_sequence(deployment, plan.num_blocks * plan.block_bytes, limit)
    if asked is not None and fits < asked:
        msg = (
            f"engine.max_model_len: one sequence of {asked} tokens does not fit the KV pool; "
            f"the longest that fits is {fits}"
        )
        raise RequestDoesNotFit(msg)
    return limit, fits


def longest_request(deployment: Deployment, fits: int) -> int:
    """Tokens of the longest request that is taken: of one step, where prompts are not cut."""
    engine = deployment.engine
    return fits if engine.enable_chunked_prefill else min(fits, engine.max_num_batched_tokens)


def check_mean_request(load: LoadShape, longest_tokens: int) -> None:
    """Raise RequestDoesNotFit where even a request of mean lengths is longer than ``longest_tokens``."""
    if longest_tokens < load.prompt_tokens + load.output_tokens:
        msg = (
            f"the mean request of {load.prompt_tokens} + {load.output_tokens} tokens exceeds the "
            f"{longest_tokens} tokens that one sequence may hold here"
        )
        raise RequestDoesNotFit(msg)


def _check_classes(scenario: Scenario, requests: RequestTable) -> None:
    for name in scenario.adaptive.classes if scenario.adaptive is not None else ():
        if name not in requests.class_names:
            if not requests.class_names:
                msg = f"adaptive.classes.{name}: the workload has no request classes; give workload.classes"
                raise InvalidSpec(msg)
            kind = "request class"
            raise UnknownName(kind, name, requests.class_names, where="adaptive.classes")


def _level_notes(deployment: Deployment, requests: RequestTable) -> list[str]:
    """Levels that hold no less than the one before: pressure would not fall there."""
    if deployment.adaptive is None:
        return []
    load = load_shape(requests)
    rates = build_rates(deployment.device, deployment.priors, Edge.CENTRAL)
    held = [resident_bytes(StepModel(variant, rates), load) for variant in deployment.levels]
    return [
        f"adaptive: level {level} ({deployment.adaptive.levels[level].name}) holds no less of a mean sequence than the "
        "level before, so tightening to it frees nothing"
        for level in range(1, len(held))
        if held[level] >= held[level - 1]
    ]


def load_requests(scenario: Scenario, base_dir: Path | None) -> RequestTable:
    """The requests of a scenario's workload."""
    with at_field("workload"):
        workload = load_workload(scenario.workload) if isinstance(scenario.workload, str) else scenario.workload
    return _requests(workload, scenario.seed, base_dir)


@lru_cache(maxsize=8)
def _requests(workload: WorkloadSpec, seed: int, base_dir: Path | None) -> RequestTable:
    return build_requests(workload, seed=seed, base_dir=base_dir)


def plan_at(prepared: Prepared, edge: Edge) -> MemoryPlan:
    """The pool at an edge of the memory priors; the central one where even one sequence would not fit."""
    plan = plan_or(prepared.plan, prepared.deployment, edge)
    pool_bytes = plan.num_blocks * plan.block_bytes
    if longest_sequence(prepared.deployment, pool_bytes, prepared.max_model_len) < prepared.max_model_len:
        return prepared.plan
    return plan
