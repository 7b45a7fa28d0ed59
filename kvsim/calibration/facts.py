"""What a law needs to know of a device."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.cost.priors import load_priors, look_up
from kvsim.specs.base import Dtype
from kvsim.specs.device import DeviceSpec


@dataclass(frozen=True)
class DeviceFacts:
    """Datasheet rates of one device, in SI units.

    Attributes
    ----------
    lane_clocks_per_s : float
        Compute units x clock: clocks of all multiprocessors per second, what compiled clocks divide by. Where a
        datasheet lacks them, vector FLOPS over the 256 that a multiprocessor of 128 lanes does per clock.
    flops_per_s : dict
        Dense tensor rate by dtype; dtypes without a native path are absent.
    link_bytes_per_s : float or None
        Scale-up link per direction, or the host link.
    """

    name: str
    bandwidth_bytes_per_s: float
    cache_bytes: float
    half_flops_per_s: float
    flops_per_s: dict[str, float]
    lane_clocks_per_s: float
    link_bytes_per_s: float | None


def device_facts(spec: DeviceSpec) -> DeviceFacts:
    """Collect the facts of a spec; a cache without a figure counts as none."""
    priors = load_priors()
    vector = spec.vector_flops.value if spec.vector_flops else None
    if vector is None:
        vector = spec.dense_half_flops_per_s / look_up(priors.tensor_to_vector_ratio, spec).value
    if spec.num_compute_units and spec.boost_clock:
        lane_clocks = spec.num_compute_units.value * spec.boost_clock.value
    else:
        lane_clocks = vector / 256.0
    link = spec.scale_up_link or spec.host_link
    return DeviceFacts(
        name=spec.name,
        bandwidth_bytes_per_s=spec.bandwidth_bytes_per_s,
        cache_bytes=float(spec.cache.value) if spec.cache else 0.0,
        half_flops_per_s=spec.dense_half_flops_per_s,
        flops_per_s={dtype.value: rate for dtype in Dtype if (rate := spec.dense_flops_per_s(dtype)) is not None},
        lane_clocks_per_s=lane_clocks,
        link_bytes_per_s=link.value if link else None,
    )
