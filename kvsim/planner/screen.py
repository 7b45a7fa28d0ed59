"""The analytic screen: what the closed form says of thousands of candidates, pricing what they share once.

A candidate's figures are those of ``kvsim estimate`` to the last digit: the same functions are called, and step models,
prefills and decode steps are kept for all candidates that differ in nothing these depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

from kvsim.analysis import LoadShape, load_shape
from kvsim.catalog import resolve
from kvsim.compression import Compression
from kvsim.cost.priors import Edge
from kvsim.cost.rates import Rates, build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.errors import KvsimError
from kvsim.estimate import LoadPrices, estimate_outcome, price_load
from kvsim.memory import MemoryPlan, plan_memory
from kvsim.planner.settings import Layout
from kvsim.pool import block_bytes
from kvsim.prepare import check_mean_request, load_requests, longest_request, sequence_limits
from kvsim.scenario import Scenario
from kvsim.specs.base import Basis
from kvsim.specs.engine import DEFAULT_UTILIZATION, EngineSpec
from kvsim.specs.price import Price
from kvsim.summary import Outcome, cost, energy, throughput

UNKNOWN_BASIS: Final = Basis.LITERATURE
"""The screen takes values alone; what they rest on is looked up for the points that are shown."""


class Candidate(NamedTuple):
    """One way to serve the load; scenarios of a plan differ in nothing else."""

    device: str
    strategy: Compression
    layout: Layout
    engine: EngineSpec


@dataclass(frozen=True, slots=True)
class Screened:
    """What the closed form says of a candidate."""

    candidate: Candidate
    request_throughput: float
    output_throughput: float
    ttft_s: float
    tpot_s: float | None
    e2el_s: float
    usd_per_hour: float | None
    usd_per_million: float | None
    device_s_per_token: float
    joules_per_token: float | None
    watts_tdp: float | None
    utilization: float
    batch: float
    sequence_kv_bytes: float
    sequences_that_fit: float
    device_memory_bytes: float
    carries_load: bool
    longest_tokens: int
    """Tokens of the longest request that is taken."""


class _Shared(NamedTuple):
    deployment: Deployment
    prices: LoadPrices
    block_bytes: int


class Screener:
    """Screens candidates of one scenario: model, workload, calibration and seed stay, the rest varies.

    ``prices`` by device, where they are not the price list's.
    """

    def __init__(
        self, scenario: Scenario, prices: Mapping[str, Price] | None = None, base_dir: Path | None = None
    ) -> None:
        self._scenario = scenario
        self._prices = prices or {}
        self._base_dir = base_dir
        self._shared: dict[Candidate, _Shared | KvsimError] = {}
        self._rates: dict[str, Rates] = {}
        self.priced = 0
        """Step models built so far."""

    @cached_property
    def load(self) -> LoadShape:
        """Mean lengths and rate of the workload."""
        return load_shape(load_requests(self._scenario, self._base_dir))

    @cached_property
    def longest_tokens(self) -> int:
        """Tokens of the workload's longest request."""
        requests = load_requests(self._scenario, self._base_dir)
        return int((requests.prompt_tokens + requests.output_tokens).max())

    def scenario(self, candidate: Candidate) -> Scenario:
        """The candidate as a scenario, which `kvsim estimate` and `kvsim simulate` take."""
        return self._scenario.model_copy(
            update={
                "device": candidate.device,
                "compression": candidate.strategy,
                "engine": candidate.engine,
                "tensor_parallel_size": candidate.layout.tensor_parallel_size,
                "replicas": candidate.layout.replicas,
                "price": self._prices.get(candidate.device),
            }
        )

    def screen(self, candidate: Candidate) -> Screened:
        """Give a candidate's figures.

        Raises
        ------
        KvsimError
            It cannot run, or does not fit: what ``kvsim estimate`` says of it.
        """
        shared = self._look_up(candidate)
        deployment, size = self.deployment(candidate)
        plan = plan_memory(deployment, size)
        _, fits = sequence_limits(deployment, plan)
        longest = longest_request(deployment, fits)
        check_mean_request(self.load, longest)
        outcome, batch = estimate_outcome(shared.prices, deployment, plan, self.load, Edge.CENTRAL)
        return self._figures(candidate, deployment, plan, shared, outcome, batch, longest)

    def prices(self, candidate: Candidate) -> LoadPrices:
        """Prices of the mean request; raise KvsimError where the candidate cannot run."""
        return self._look_up(candidate).prices

    def deployment(self, candidate: Candidate) -> tuple[Deployment, int]:
        """(the candidate with every name looked up, bytes of a KV block); raise KvsimError where it cannot run."""
        shared = self._look_up(candidate)
        replicas = candidate.layout.replicas
        return replace(shared.deployment, engine=candidate.engine, replicas=replicas), shared.block_bytes

    def _look_up(self, candidate: Candidate) -> _Shared:
        key = _without_what_is_free(candidate)
        if key not in self._shared:
            try:
                self._shared[key] = self._price(key)
            except KvsimError as error:
                self._shared[key] = error
        found = self._shared[key]
        if isinstance(found, KvsimError):
            raise found.with_traceback(None)
        return found

    def _price(self, candidate: Candidate) -> _Shared:
        deployment = resolve(self.scenario(candidate), base_dir=self._base_dir)
        rates = self._rates.get(candidate.device)
        if rates is None:
            rates = build_rates(deployment.device, deployment.priors, Edge.CENTRAL)
            self._rates[candidate.device] = rates
        self.priced += 1
        return _Shared(deployment, price_load(StepModel(deployment, rates), self.load), block_bytes(deployment))

    def _figures(
        self,
        candidate: Candidate,
        deployment: Deployment,
        plan: MemoryPlan,
        shared: _Shared,
        one: Outcome,
        batch: float,
        longest: int,
    ) -> Screened:
        rates = throughput((one,), UNKNOWN_BASIS)
        dollars, joules = cost(deployment, (one,), UNKNOWN_BASIS), energy(deployment, (one,))
        parallel, tdp = deployment.parallelism, deployment.device.tdp
        tokens = one.input_tokens + one.output_tokens
        held = shared.prices.held_bytes
        return Screened(
            candidate=candidate,
            request_throughput=rates.request_throughput.value or 0.0,
            output_throughput=rates.output_throughput.value or 0.0,
            ttft_s=one.ttft.mean_s or 0.0,
            tpot_s=one.tpot.mean_s,
            e2el_s=one.e2el.mean_s or 0.0,
            usd_per_hour=dollars.usd_per_hour.value,
            usd_per_million=dollars.usd_per_million_total_tokens.value,
            device_s_per_token=one.duration_s * deployment.num_devices / tokens if tokens else float("inf"),
            joules_per_token=joules.joules_per_total_token.value,
            watts_tdp=tdp.value * deployment.num_devices if tdp is not None else None,
            utilization=one.phases.busy_s / one.phases.total_s,
            batch=batch,
            sequence_kv_bytes=float(held * parallel.tensor * parallel.pipeline),
            sequences_that_fit=plan.num_blocks * plan.block_bytes * parallel.data / held if held else float("inf"),
            device_memory_bytes=plan.weight_bytes + plan.runtime_bytes + plan.pool_bytes,
            carries_load=self._carries(one),
            longest_tokens=longest,
        )

    def _carries(self, one: Outcome) -> bool:
        """Whether an open loop's requests are completed as fast as they come, to one request an hour."""
        rate = self.load.request_rate
        return rate is None or one.completed + 1 >= rate * one.duration_s


def _without_what_is_free(candidate: Candidate) -> Candidate:
    """The candidate with the same step prices and KV bytes: what only slots, pool and replicas depend on set alike."""
    same = candidate.engine.model_copy(
        update={"gpu_memory_utilization": DEFAULT_UTILIZATION, "enable_chunked_prefill": True}
    )
    return candidate._replace(engine=same, layout=Layout(candidate.layout.tensor_parallel_size, 1))
