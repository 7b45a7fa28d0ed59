"""Which lists of tiers make sense, and which KV encoding a tier's name stands for."""

from __future__ import annotations

from kvsim.compression import CODINGS, ENCODINGS, REDUCTIONS, Compression, parse_compression
from kvsim.compression.rates import load_coders
from kvsim.compression.selection.keep_all import KeepAll
from kvsim.errors import IncompatibleScenario, InvalidSpec, UnknownName
from kvsim.link_catalog import load_link
from kvsim.specs.device import DeviceSpec
from kvsim.specs.engine import EngineSpec
from kvsim.specs.tier import KvTier, RecomputeTier, RemoteTier


def check_tiers(engine: EngineSpec, device: DeviceSpec) -> None:
    """Refuse tiers that cannot be priced or that nothing could reach; raise naming the field."""
    tiers = engine.all_kv_tiers
    if engine.kv_offloading_size is not None and engine.kv_tiers:
        msg = (
            "engine.kv_offloading_size: it is short for one host tier, and engine.kv_tiers lists tiers already; "
            "write {kind: host, size: ...} there instead"
        )
        raise InvalidSpec(msg)
    storing = [tier for tier in tiers if not isinstance(tier, RecomputeTier)]
    if storing and device.host_link is None:
        field = "engine.kv_offloading_size" if engine.kv_offloading_size is not None else "engine.kv_tiers"
        msg = (
            f"{field}: {device.name} has no figure for a host link (or shares the host's memory), so "
            "copies cannot be priced; leave it out"
        )
        raise IncompatibleScenario(msg)
    for index, tier in enumerate(tiers):
        if isinstance(tier, RecomputeTier) and index < len(tiers) - 1:
            msg = (
                f"engine.kv_tiers[{index}]: recompute has every block that was ever computed, so the tiers after it "
                "would never be asked; put it last"
            )
            raise InvalidSpec(msg)
        if isinstance(tier, RemoteTier) and isinstance(tier.link, str):
            _check_link(index, tier.link)


def _check_link(index: int, name: str) -> None:
    try:
        load_link(name)
    except UnknownName as error:
        error.locate(f"engine.kv_tiers[{index}].link")
        raise


def tier_compression(index: int, tier: KvTier) -> Compression | None:
    """Give the form in which a tier stores KV; None for KV as in the pool and for coders with published figures.

    Raises
    ------
    UnknownName
        No encoding or coder has that name.
    InvalidSpec
        The name selects tokens: a tier keeps every token of a prefix.
    """
    if isinstance(tier, RecomputeTier):
        return None
    if tier.encoding == "none":
        return None
    where = f"engine.kv_tiers[{index}].encoding"
    try:
        compression = parse_compression(tier.encoding)
    except UnknownName as error:
        known = ("none", *(name for part in (*ENCODINGS, *REDUCTIONS, *CODINGS) for name in part.names))
        raise UnknownName(kind="encoding of a tier", name=error.name, known=known, where=where) from None
    if not isinstance(compression.selection, KeepAll):
        msg = f"{where}: {tier.encoding!r} drops or selects tokens, and a tier keeps all of a prefix; name an encoding"
        raise InvalidSpec(msg)
    reason = cannot_store_what_is_there(compression)
    if reason:
        msg = f"{where}: {reason}"
        raise InvalidSpec(msg)
    return None if compression.name in load_coders().coders else compression


def cannot_store_what_is_there(compression: Compression) -> str | None:
    """Why blocks of KV that a pool holds cannot be coded so on their own, or None."""
    if compression.reduction.is_architecture:
        return f"{compression.name!r} is an architecture: KV that a model of another shape made cannot be stored so"
    if compression.bars_prefix_reuse:
        return f"{compression.name!r} {compression.bars_prefix_reuse}, and blocks are coded one by one"
    return None
