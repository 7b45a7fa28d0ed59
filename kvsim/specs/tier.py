"""Tiers below the device's KV pool: where blocks go that the device forgets, in which form, and when."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kvsim.specs.base import Spec
from kvsim.specs.link import CustomLink
from kvsim.units import Bytes, BytesPerSecond, Seconds

TierStorePolicy = Literal["on_compute", "on_evict"]
KvReload = Literal["always", "by_cost", "by_total_cost"]


class StoringTier(Spec):
    """What every tier that keeps KV has in common. Sizes and rates are those of one replica, over all its devices."""

    encoding: str = "none"
    """How KV lies in the tier: ``none`` (as in the pool), or an encoding, with a coding such as ``fp8+rans``."""
    ratio: Annotated[float, Field(ge=1)] | None = None
    """Bytes in the pool / bytes in the tier; None takes the encoding's layout, or the coder's published figure."""
    encode_rate: BytesPerSecond | None = None
    """Bytes of the pool's KV that the coder takes in per second and replica; None takes the coder's prior."""
    decode_rate: BytesPerSecond | None = None
    """Bytes of the pool's KV that the decoder gives out per second and replica; None takes the coder's prior."""
    coder: Literal["device", "host"] = "device"
    """Which processor codes: on the device coded bytes cross the host link, on the host plain ones."""
    store: TierStorePolicy | None = None
    """When blocks come here: as they are computed, or when the tier above evicts them. None: ``on_compute`` for the
    first tier, ``on_evict`` for the others."""


class HostTier(StoringTier):
    """Host memory, over the device's host link."""

    kind: Literal["host"] = "host"
    size: Bytes


class NvmeTier(StoringTier):
    """Disks of the replica's node; bytes pass through host memory and the host link."""

    kind: Literal["nvme"] = "nvme"
    size: Bytes
    read_bandwidth: BytesPerSecond
    write_bandwidth: BytesPerSecond
    latency_s: Seconds
    """Before the first byte of each copy."""


class RemoteTier(StoringTier):
    """A store that all replicas share: one index, and one link that their copies divide."""

    kind: Literal["remote"] = "remote"
    size: Bytes | None = None
    """None is unbounded."""
    link: str | CustomLink
    """Name of a link, or its bandwidth and latency."""


class RecomputeTier(Spec):
    """Only token ids are kept, of everything ever computed: nothing is limited, and a reload is a prefill."""

    kind: Literal["recompute"] = "recompute"


KvTier = Annotated[HostTier | NvmeTier | RemoteTier | RecomputeTier, Field(discriminator="kind")]
