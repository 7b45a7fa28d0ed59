"""A scenario with two pools, made ready to run: each pool's deployment and memory, and the link between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvsim.catalog import at_field, resolve
from kvsim.compression import Compression, parse_compression
from kvsim.compression.stacked import StackedEncoding
from kvsim.compression.strategy import spell
from kvsim.cost.links import PricedLink, price_link
from kvsim.cost.priors import Edge
from kvsim.cost.rates import build_rates
from kvsim.cost.step import StepModel
from kvsim.deployment import Deployment
from kvsim.errors import IncompatibleScenario, InvalidSpec, KvsimError
from kvsim.memory import MemoryPlan, plan_memory
from kvsim.pool import block_bytes
from kvsim.scenario import Scenario
from kvsim.sim.disaggregated import Crossing
from kvsim.sim.handover import TransferRules
from kvsim.specs.disaggregation import Disaggregation, PoolSpec
from kvsim.tier_rules import cannot_store_what_is_there
from kvsim.units import TICKS_PER_SECOND


@dataclass(frozen=True)
class TransitCoding:
    """How KV is compressed on the link alone."""

    compression: Compression
    """What it amounts to: the scenario's selection with the encoding in transit."""
    wire_share: float
    """Bytes on the wire / bytes of KV."""
    coded: Deployment
    """The prefill pool as if it stored KV in the encoding: prices its kernels."""
    coder_bytes_per_s: float | None

    @property
    def name(self) -> str:
        """Encoding in transit, with reduction and coding where it has them."""
        stored = self.compression.stored
        return spell(stored) if isinstance(stored, StackedEncoding) else stored.kind


@dataclass(frozen=True)
class SplitDeployment:
    """Two pools and their link."""

    spec: Disaggregation
    prefill: Deployment
    decode: Deployment
    prefill_plan: MemoryPlan
    decode_plan: MemoryPlan
    coding: TransitCoding | None

    @property
    def notes(self) -> tuple[str, ...]:
        """Both pools' notes, and what is lost on the way."""
        notes = tuple(dict.fromkeys((*self.prefill.notes, *self.decode.notes)))
        if self.coding is None:
            return notes
        name, rate = self.coding.name, self.coding.compression.rate_note
        lossy = f"KV crosses the link as {name}, which loses precision: decoding reads KV that went through {name}"
        lost = () if self.coding.compression.stored.is_exact else (lossy,)
        return (*notes, *lost, *(() if rate is None else (rate,)))

    def link(self, edge: Edge) -> PricedLink:
        """The link at an edge of its priors."""
        return price_link(self.spec.link, edge)

    def crossing(self, edge: Edge) -> Crossing:
        """What the simulator needs to know of the way between the pools."""
        link = self.link(edge)
        per_device = self.spec.ports == "device"
        rules = TransferRules(
            mode=self.spec.transfer,
            setup_ticks=round(link.setup_s * TICKS_PER_SECOND),
            num_layers=self.prefill.model.num_layers,
            wire_share=self.coding.wire_share if self.coding else 1.0,
            coder_seconds_per_byte=self._coder_seconds_per_byte(edge),
        )
        return Crossing(
            rules,
            link.bytes_per_s * (self.prefill.tensor_parallel_size if per_device else 1),
            link.bytes_per_s * (self.decode.tensor_parallel_size if per_device else 1),
            self.spec.decode_routing,
        )

    def _coder_seconds_per_byte(self, edge: Edge) -> float:
        """Encoding on one side and decoding on the other, each at the price of the encoding's own kernels or as given.

        Decoding is priced like encoding: both read one form and write the other.
        """
        coding = self.coding
        if coding is None:
            return 0.0
        if coding.coder_bytes_per_s is not None:
            return 2.0 / coding.coder_bytes_per_s
        coded = coding.coded
        step = StepModel(coded, build_rates(coded.device, coded.priors, edge))
        token_bytes = self.prefill_plan.block_bytes / coded.engine.block_size * coded.tensor_parallel_size
        return 2.0 * step.append_s_per_token / token_bytes


def resolve_split(scenario: Scenario, *, base_dir: Path | None = None) -> SplitDeployment | None:
    """Resolve both pools of a scenario; None where it has none.

    Raises
    ------
    UnknownName, InvalidSpec, IncompatibleScenario
        As for one deployment, naming the pool; or what pools cannot do.
    """
    spec = scenario.disaggregation
    if spec is None:
        return None
    _check(scenario)
    with at_field("disaggregation.link"):
        price_link(spec.link)
    prefill = _resolve_pool(scenario, spec.prefill, "prefill", base_dir)
    decode = _resolve_pool(scenario, spec.decode, "decode", base_dir)
    _check_pair(prefill, decode)
    return SplitDeployment(
        spec=spec,
        prefill=prefill,
        decode=decode,
        prefill_plan=plan_memory(prefill, block_bytes(prefill)),
        decode_plan=plan_memory(decode, block_bytes(decode)),
        coding=_resolve_coding(scenario, prefill, base_dir),
    )


def pool_scenario(scenario: Scenario, pool: PoolSpec) -> Scenario:
    """The scenario of one pool by itself."""
    device = pool.device or scenario.device
    keeps_price = scenario.price is not None and device in (scenario.device, scenario.price.device)
    return scenario.model_copy(
        update={
            "device": device,
            "replicas": pool.replicas,
            "tensor_parallel_size": pool.tensor_parallel_size or scenario.tensor_parallel_size,
            "engine": pool.merged(scenario.engine),
            "price": scenario.price if keeps_price else None,
            "disaggregation": None,
        }
    )


def _resolve_pool(scenario: Scenario, pool: PoolSpec, name: str, base_dir: Path | None) -> Deployment:
    try:
        return resolve(pool_scenario(scenario, pool), base_dir=base_dir)
    except KvsimError as error:
        error.locate(f"disaggregation.{name}")
        raise


def _check(scenario: Scenario) -> None:
    if scenario.replicas != 1:
        msg = (
            f"replicas: {scenario.replicas} says nothing beside disaggregation; set disaggregation.prefill.replicas "
            "and disaggregation.decode.replicas"
        )
        raise InvalidSpec(msg)


def _check_pair(prefill: Deployment, decode: Deployment) -> None:
    if prefill.engine.block_size != decode.engine.block_size:
        msg = (
            f"disaggregation: blocks of {prefill.engine.block_size} tokens cannot be received in blocks of "
            f"{decode.engine.block_size}; give both pools one engine.block_size"
        )
        raise IncompatibleScenario(msg)
    for option in ("request_overhead_s", "front_end_requests_per_s"):
        if getattr(prefill.engine, option) != getattr(decode.engine, option):
            msg = (
                f"disaggregation: one front end serves both pools; set engine.{option} for the scenario, not for a pool"
            )
            raise IncompatibleScenario(msg)
    for name, deployment in (("prefill", prefill), ("decode", decode)):
        where = f"disaggregation.{name}.engine"
        if deployment.engine.kind != "vllm":
            msg = f"{where}.kind: handing KV over is modelled for vllm, not for {deployment.engine.kind}; use vllm"
            raise IncompatibleScenario(msg)
        if deployment.parallelism.pipeline > 1 or deployment.lanes > 1:
            msg = (
                f"disaggregation.{name}: KV that is spread over pipeline stages or data parallel ranks is not modelled "
                "between pools; use tensor_parallel_size and replicas"
            )
            raise IncompatibleScenario(msg)
        if deployment.engine.speculative_config is not None or deployment.engine.scheduling_policy != "fcfs":
            option = "scheduling_policy" if deployment.engine.speculative_config is None else "speculative_config"
            msg = f"{where}.{option}: not modelled with disaggregation; leave it out"
            raise IncompatibleScenario(msg)
        if deployment.engine.compression_stream == "side":
            msg = (
                f"{where}.compression_stream: side is not modelled with disaggregation, where KV leaves once its "
                "prompt is in; use inline"
            )
            raise IncompatibleScenario(msg)
        if deployment.engine.all_kv_tiers:
            option = "kv_tiers" if deployment.engine.kv_offloading_size is None else "kv_offloading_size"
            msg = (
                f"{where}.{option}: offloading is not modelled with disaggregation (both would share the "
                "device's ports); leave it out"
            )
            raise IncompatibleScenario(msg)


def _resolve_coding(scenario: Scenario, prefill: Deployment, base_dir: Path | None) -> TransitCoding | None:
    spec = scenario.disaggregation
    if spec is None or spec.transfer_compression is None:
        return None
    where, wanted = "disaggregation.transfer_compression", spec.transfer_compression
    with at_field(where):
        parsed = parse_compression(wanted.encoding)
    if parsed.selection != Compression().selection or parsed.stores_native:
        msg = f"{where}: {wanted.encoding!r} is not an encoding; name one, such as fp8, or none"
        raise InvalidSpec(msg)
    if not scenario.compression.stores_native:
        msg = (
            f"{where}: KV is stored as {scenario.compression.stored.kind} and moves as that; compressing it again "
            "for the link is not modelled"
        )
        raise IncompatibleScenario(msg)
    reason = cannot_store_what_is_there(parsed)
    if reason:
        msg = f"{where}: {reason}"
        raise IncompatibleScenario(msg)
    if parsed.stored.residual_tokens:
        msg = f"{where}: {wanted.encoding!r} keeps its newest tokens native, which makes no sense in transit"
        raise IncompatibleScenario(msg)
    if parsed.stored.unpriced_coder is not None and wanted.coder_bytes_per_s is None:
        msg = (
            f"{where}.coder_bytes_per_s: no prior says how fast a device codes {parsed.stored.unpriced_coder}; give "
            f"it, as in {{encoding: {wanted.encoding}, coder_bytes_per_s: 100 GB/s}}"
        )
        raise IncompatibleScenario(msg)
    compression = parsed.model_copy(update={"selection": scenario.compression.selection})
    one = pool_scenario(scenario, spec.prefill).model_copy(update={"compression": compression})
    coded = resolve(one, base_dir=base_dir, in_pool=False)
    return TransitCoding(compression, block_bytes(coded) / block_bytes(prefill), coded, wanted.coder_bytes_per_s)
