"""Tiers made concrete at one edge of the priors: bytes of a unit, rates, and what coding it costs, on one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvsim.compression import Compression, parse_compression
from kvsim.compression.rates import CoderPriors, load_coders
from kvsim.cost.coders import recode_seconds_per_token
from kvsim.cost.links import price_link
from kvsim.cost.priors import Edge, PriorTable, look_up, prior_keys
from kvsim.cost.rates import build_rates
from kvsim.deployment import Deployment, LayerClass
from kvsim.errors import IncompatibleScenario, InvalidSpec
from kvsim.pool import prefill_growths
from kvsim.specs.tier import KvReload, KvTier, NvmeTier, RecomputeTier, RemoteTier, StoringTier, TierStorePolicy

NO_ENCODING = "none"


@dataclass(frozen=True)
class Coding:
    """How one unit of KV lies in a tier, and what it costs to code it. Equal codings need no recoding between tiers."""

    name: str
    unit_bytes: int
    """On one rank."""
    encode_s: float = 0.0
    decode_s: float = 0.0
    on_device: bool = True
    hbm_share: float = 0.0
    """Of the device's peak memory bandwidth, while the device codes."""
    lossy: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether KV lies as in the device's pool."""
        return self.name == NO_ENCODING


@dataclass(frozen=True)
class TierPlan:
    """One tier of a replica's rank."""

    name: str
    kind: str
    store: TierStorePolicy
    capacity_bytes: int | None
    """None is unbounded."""
    coding: Coding
    read_bytes_per_s: float | None = None
    """Of the tier's own link; None is host memory, which the host link reads directly."""
    write_bytes_per_s: float | None = None
    latency_s: float = 0.0
    is_shared: bool = False
    """Whether all replicas share the tier and its link."""


@dataclass(frozen=True)
class TiersPlan:
    """All tiers that keep KV, nearest first, and the link that their bytes cross."""

    tiers: tuple[TierPlan, ...]
    plain: Coding
    remembers: bool
    """Whether a recompute tier keeps the token ids of all that was ever computed."""
    reload: KvReload
    link_bytes_per_s: float
    """One direction of the host link, efficiency applied; 0 where there is none, and then no tier that keeps KV."""
    hbm_bytes_per_s: float
    """Peak memory bandwidth of the device: what a copy takes of it while it runs alone."""


def plan_tiers(deployment: Deployment, unit_bytes: int, unit_tokens: int, edge: Edge) -> TiersPlan | None:
    """Price the tiers for units of ``unit_tokens`` tokens that take ``unit_bytes`` of the pool; None without tiers.

    Raises
    ------
    InvalidSpec, IncompatibleScenario, UnknownName
        A figure is missing, or an encoding does not go with the cache; the message names the tier's field.
    """
    specs, link = deployment.engine.all_kv_tiers, deployment.device.host_link
    if not specs:
        return None
    plain = Coding(NO_ENCODING, unit_bytes)
    storing = [one for one in specs if not isinstance(one, RecomputeTier)]
    names = _names(storing)
    tiers = tuple(
        _plan_tier(deployment, index, spec, names[index], plain, unit_tokens, edge)
        for index, spec in enumerate(storing)
    )
    copy_efficiency = look_up(deployment.priors.host_copy_efficiency, deployment.device).efficiency(edge)
    return TiersPlan(
        tiers=tiers,
        plain=plain,
        remembers=len(storing) < len(specs),
        reload=deployment.engine.kv_reload,
        link_bytes_per_s=link.value * copy_efficiency if link is not None else 0.0,
        hbm_bytes_per_s=deployment.device.bandwidth_bytes_per_s,
    )


def holders(deployment: Deployment) -> int:
    """Devices that each hold a part of a sequence's KV: those that slice its layers, and those of all stages."""
    return deployment.parallelism.tensor * deployment.parallelism.pipeline


def tier_notes(deployment: Deployment, *, shares_prefixes: bool) -> tuple[str, ...]:
    """What a reader must know of the tiers; raise as :func:`plan_tiers` does where they cannot be priced."""
    size = deployment.engine.block_size
    growths, _ = prefill_growths(deployment)
    growing = sum(block_bytes for cap, block_bytes in growths if cap is None)
    plan = plan_tiers(deployment, max(1, growing), size, Edge.CENTRAL)
    if plan is None:
        return ()
    if not shares_prefixes or not deployment.prefix_caching:
        where = "to the host" if deployment.engine.kv_offloading_size is not None else "to any tier"
        return (f"nothing is offloaded {where}: without prefix caching no request could hit a block there",)
    if not growing:
        return ("nothing is offloaded to any tier: no layer keeps a whole prompt, so no prefix can be shared",)
    lossy = tuple(
        f"KV loaded from {tier.name} is lossy ({tier.coding.name}): its effect on quality is not modelled"
        for tier in plan.tiers
        if tier.coding.lossy
    )
    return lossy + _rate_notes(deployment)


def _rate_notes(deployment: Deployment) -> tuple[str, ...]:
    """Tiers whose bytes are expected ones; those with published ratios carry their band in the report."""
    names = [
        spec.encoding
        for spec, classes in zip(deployment.engine.all_kv_tiers, deployment.tier_classes, strict=True)
        if classes is not None and isinstance(spec, StoringTier)
    ]
    notes = (parse_compression(name).rate_note for name in dict.fromkeys(names))
    return tuple(note for note in notes if note is not None)


def _names(specs: Sequence[StoringTier]) -> list[str]:
    """Name tiers by their kind, numbered from the second of a kind on."""
    kinds = [str(spec.kind) for spec in specs]  # type: ignore[attr-defined]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    return [kind if count == 1 else f"{kind}-{count}" for kind, count in zip(kinds, counts, strict=True)]


def _plan_tier(
    deployment: Deployment, index: int, spec: KvTier, name: str, plain: Coding, unit_tokens: int, edge: Edge
) -> TierPlan:
    if isinstance(spec, RecomputeTier):
        msg = "a recompute tier keeps no KV"
        raise InvalidSpec(msg)
    ranks = holders(deployment)
    read = write = None
    latency_s = 0.0
    if isinstance(spec, NvmeTier):
        read, write, latency_s = spec.read_bandwidth / ranks, spec.write_bandwidth / ranks, spec.latency_s
    elif isinstance(spec, RemoteTier):
        link = price_link(spec.link, edge)
        read = write = link.bytes_per_s / ranks
        latency_s = link.setup_s
    return TierPlan(
        name=name,
        kind=spec.kind,
        store=spec.store or ("on_evict" if index else "on_compute"),
        capacity_bytes=None if spec.size is None else spec.size // ranks,
        coding=_coding(deployment, index, spec, plain, unit_tokens, edge),
        read_bytes_per_s=read,
        write_bytes_per_s=write,
        latency_s=latency_s,
        is_shared=isinstance(spec, RemoteTier),
    )


def _coding(
    deployment: Deployment, index: int, spec: StoringTier, plain: Coding, unit_tokens: int, edge: Edge
) -> Coding:
    where = f"engine.kv_tiers[{index}]"
    if spec.encoding == NO_ENCODING:
        given = [name for name in ("ratio", "encode_rate", "decode_rate") if getattr(spec, name) is not None]
        if given:
            msg = f"{where}.{given[0]}: encoding is 'none', so nothing is coded; leave it out or name an encoding"
            raise InvalidSpec(msg)
        return plain
    compression = parse_compression(spec.encoding)
    coder = load_coders().coders.get(compression.name)
    if coder is not None:
        return _coded_by_figures(deployment, where, spec, coder, plain, edge)
    classes = deployment.tier_classes[index]
    if classes is None:
        msg = f"{where}.encoding: {spec.encoding!r} was not resolved"
        raise InvalidSpec(msg)
    _check_rates(where, spec, compression)
    return _coded_by_format(deployment, where, spec, classes, plain, unit_tokens, edge)


def _coded_by_figures(
    deployment: Deployment, where: str, spec: StoringTier, coder: CoderPriors, plain: Coding, edge: Edge
) -> Coding:
    """Code by published ratios and rates, which are of the 16-bit cache."""
    if spec.ratio is None and not deployment.compression.stores_native:
        msg = (
            f"{where}.encoding: the published ratio of {spec.encoding} is of a 16-bit cache, and this one is "
            f"{deployment.compression.name}; give {where}.ratio"
        )
        raise IncompatibleScenario(msg)
    ratio = spec.ratio or coder.ratio.efficiency(edge)
    unit_bytes = math.ceil(plain.unit_bytes / ratio)
    encode = _rate(deployment, where, spec, "encode_rate", coder.encode_bytes_per_s, edge)
    decode = _rate(deployment, where, spec, "decode_rate", coder.decode_bytes_per_s, edge)
    moved = max(encode, decode) * (1.0 + 1.0 / ratio)
    return Coding(
        name=spec.encoding,
        unit_bytes=unit_bytes,
        encode_s=plain.unit_bytes / encode,
        decode_s=plain.unit_bytes / decode,
        on_device=spec.coder == "device",
        hbm_share=min(1.0, moved / deployment.device.bandwidth_bytes_per_s),
        lossy=coder.lossy,
    )


def _rate(deployment: Deployment, where: str, spec: StoringTier, field: str, table: PriorTable, edge: Edge) -> float:
    """Bytes per second of one rank's coder: as given for the replica, or the prior of one device."""
    given: float | None = getattr(spec, field)
    if given is not None:
        return given / holders(deployment)
    device = deployment.device
    found = next((table[key] for key in prior_keys(device) if key in table), None)
    if found is None or spec.coder == "host":
        which = "a host's processors" if spec.coder == "host" else device.name
        msg = f"{where}.{field}: no published figure says how fast {spec.encoding} runs on {which}; give one, in GB/s"
        raise IncompatibleScenario(msg)
    return found.efficiency(edge)


def _check_rates(where: str, spec: StoringTier, compression: Compression) -> None:
    """Refuse a coder whose speed nobody gives: any on the host, and those whose work no prior covers."""
    if spec.encode_rate is not None and spec.decode_rate is not None:
        return
    field = "encode_rate" if spec.encode_rate is None else "decode_rate"
    coder = compression.stored.unpriced_coder
    if spec.coder == "host":
        msg = f"{where}.{field}: no figure says how fast a host's processors code {spec.encoding}; give one, in GB/s"
        raise IncompatibleScenario(msg)
    if coder is not None:
        msg = f"{where}.{field}: no published figure says how fast a device codes {coder}; give one, in GB/s"
        raise IncompatibleScenario(msg)


def _coded_by_format(
    deployment: Deployment,
    where: str,
    spec: StoringTier,
    classes: tuple[LayerClass, ...],
    plain: Coding,
    unit_tokens: int,
    edge: Edge,
) -> Coding:
    """Store as a KV encoding: its layout gives the bytes, its work the time."""
    growths, _ = prefill_growths(replace(deployment, layer_classes=classes))
    blocks = unit_tokens // deployment.engine.block_size
    unit_bytes = blocks * sum(size for cap, size in growths if cap is None)
    if spec.ratio is not None:
        msg = f"{where}.ratio: the layout of {spec.encoding} gives it; leave it out"
        raise InvalidSpec(msg)
    if unit_bytes >= plain.unit_bytes:
        msg = (
            f"{where}.encoding: {spec.encoding} takes {unit_bytes} B for what takes {plain.unit_bytes} B in the pool "
            f"({deployment.compression.name}); choose a smaller one, or none"
        )
        raise IncompatibleScenario(msg)
    pool, tier = _growing(deployment.layer_classes), _growing(classes)
    model, ranks = deployment.model, holders(deployment)
    rates = build_rates(deployment.device, deployment.priors, edge)
    encode_s, encode_share = recode_seconds_per_token(pool, tier, model, deployment.tensor_parallel_size, rates)
    decode_s, decode_share = recode_seconds_per_token(tier, pool, model, deployment.tensor_parallel_size, rates)
    unit_share = unit_tokens * deployment.parallelism.stage_share(model.num_layers)
    return Coding(
        name=spec.encoding,
        unit_bytes=unit_bytes,
        encode_s=plain.unit_bytes * ranks / spec.encode_rate if spec.encode_rate else encode_s * unit_share,
        decode_s=plain.unit_bytes * ranks / spec.decode_rate if spec.decode_rate else decode_s * unit_share,
        on_device=spec.coder == "device",
        hbm_share=max(encode_share, decode_share),
        lossy=not parse_compression(spec.encoding).stored.is_exact,
    )


def _growing(classes: tuple[LayerClass, ...]) -> tuple[LayerClass, ...]:
    """Layers whose blocks a prefix shares: those that keep every token of the prompt."""
    return tuple(one for one in classes if one.prefill_cap is None)
