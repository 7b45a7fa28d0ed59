"""What kernels reach of a datasheet's peak before calibration: cited central values with bands."""

from __future__ import annotations

from functools import lru_cache

from kvsim.data_files import data_dir
from kvsim.documents import load_yaml, validate
from kvsim.specs.base import Spec
from kvsim.specs.device import DeviceSpec
from kvsim.specs.prior import EDGES, Edge, Prior, PriorTable

__all__ = [
    "EDGES",
    "Edge",
    "Prior",
    "PriorTable",
    "Priors",
    "device_class",
    "first_of",
    "load_priors",
    "look_up",
    "prior_keys",
]


class Priors(Spec):
    """All priors; each table is looked up by architecture, then device class, then ``default``."""

    schema_version: int
    name: str
    streaming_efficiency: PriorTable
    weight_streaming_efficiency: PriorTable
    matmul_efficiency: PriorTable
    prefill_attention_efficiency: PriorTable
    prefill_attention_half_tokens: PriorTable
    attention_launch_s: PriorTable
    attention_per_sequence_s: PriorTable
    gemm_launch_s: PriorTable
    elementwise_launch_s: PriorTable
    uncaptured_launch_s: PriorTable
    vector_efficiency: PriorTable
    tensor_to_vector_ratio: PriorTable
    all_reduce_latency_s: PriorTable
    gather_latency_s: PriorTable
    send_latency_s: PriorTable
    link_efficiency: PriorTable
    domain_devices: PriorTable
    node_link_bytes_per_s: PriorTable
    node_latency_s: PriorTable
    deepep_latency_s: PriorTable
    deepep_link_efficiency: PriorTable
    grouped_streaming_efficiency: PriorTable
    grouped_launch_s: PriorTable
    grouped_tile_rows: PriorTable
    moe_layer_s: PriorTable
    expert_imbalance: PriorTable
    vocabulary_sort_s: PriorTable
    vocabulary_sort_per_token_s: PriorTable
    host_link_efficiency: PriorTable
    host_copy_efficiency: PriorTable
    request_overhead_s: PriorTable
    request_ingress_share: PriorTable
    unpack_ops_per_element: dict[str, PriorTable]
    host_step_s: PriorTable
    host_step_per_sequence_s: PriorTable
    usable_memory_fraction: PriorTable
    runtime_memory_bytes: PriorTable
    power_fraction: PriorTable
    sustained_power_w: dict[str, Prior]
    """Heat that a class of devices sheds for long, whatever its chip could draw; most classes have no such limit."""


def device_class(device: DeviceSpec) -> str:
    """Class of a device in the prior tables."""
    if device.kind == "gpu":
        return "gpu-hbm" if device.memory_kind.upper().startswith("HBM") else "gpu-gddr"
    return device.kind


def prior_keys(device: DeviceSpec) -> tuple[str, ...]:
    """Keys under which a prior of ``device`` may stand, the most specific first."""
    return device.name, device.architecture, device_class(device), "default"


def first_of(table: PriorTable, keys: tuple[str, ...]) -> Prior:
    """The prior under the first of ``keys`` that the table has; every table has ``default``."""
    return next(table[key] for key in keys if key in table)


def look_up(table: PriorTable, device: DeviceSpec) -> Prior:
    """The most specific prior for ``device``."""
    return first_of(table, prior_keys(device))


@lru_cache(maxsize=4)
def load_priors(name: str = "datasheet") -> Priors:
    """Read ``calibration/priors/<name>.yaml``."""
    path = data_dir("calibration/priors") / f"{name}.yaml"
    return validate(Priors, load_yaml(path), path.name)
