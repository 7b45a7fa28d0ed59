"""Rates and floors of one device at one edge of the priors: everything the estimator divides by."""

from __future__ import annotations

from dataclasses import dataclass

from kvsim.cost.priors import Edge, Prior, Priors, PriorTable, first_of, look_up, prior_keys
from kvsim.specs.base import Dtype
from kvsim.specs.device import DeviceSpec


@dataclass(frozen=True)
class Rates:
    """SI rates of one device (bytes/s, FLOP/s) and floors (s), efficiencies applied."""

    device: DeviceSpec
    priors: Priors
    edge: Edge
    stream_bytes_per_s: float
    weight_bytes_per_s: float
    matmul_efficiency: float
    attention_flops_per_s: float
    attention_half_tokens: float
    attention_launch_s: float
    attention_per_sequence_s: float
    gemm_launch_s: float
    elementwise_launch_s: float
    uncaptured_launch_s: float
    lane_ops_per_s: float
    """Vector lane operations per second at peak (FP32 FLOPS / 2)."""
    vector_flops_per_s: float
    all_reduce_latency_s: float
    gather_latency_s: float
    send_latency_s: float
    link_bytes_per_s: float | None
    link_peak_bytes_per_s: float | None
    host_step_s: float
    host_step_per_sequence_s: float
    domain_devices: int
    """Devices that the scale-up link joins; more talk over the network besides."""
    node_link_bytes_per_s: float
    """Network rate of one device to others outside its domain."""
    node_latency_s: float
    grouped_bytes_per_s: float
    """Rate at which grouped products read the experts that a step touches."""
    grouped_launch_s: float
    grouped_tile_rows: float
    moe_layer_s: float
    """Choosing experts, ordering tokens by them and summing up, per MoE layer."""
    expert_imbalance: float
    """Work of the fullest rank over the mean, where experts lie on different ranks."""
    link_is_shared: bool
    """The ranks have no link of their own and meet on the host's."""

    def matmul_flops_per_s(self, dtype: Dtype) -> float:
        """Achievable dense rate; a dtype without a native path computes at half precision (weight-only)."""
        peak = self.device.dense_flops_per_s(dtype) or self.device.dense_half_flops_per_s
        return peak * self.matmul_efficiency

    def deepep(self, backend: str) -> tuple[float, float]:
        """(seconds of an empty dispatch and combine, share of the link that large ones reach) of a DeepEP mode."""
        latency = first_of(self.priors.deepep_latency_s, (backend, "default")).cost(self.edge)
        return latency, first_of(self.priors.deepep_link_efficiency, (backend, "default")).efficiency(self.edge)

    def unpack_prior(self, family: str) -> Prior:
        """Prior of the operations per element of an unpack family."""
        return look_up(self.priors.unpack_ops_per_element[family], self.device)

    def unpack_elements_per_s(self, family: str) -> float:
        """Elements of ``family`` that decode attention can unpack per second."""
        return self.lane_ops_per_s / self.unpack_prior(family).cost(self.edge)


def build_rates(device: DeviceSpec, priors: Priors, edge: Edge) -> Rates:
    """Apply the priors of ``edge`` to a device's datasheet."""
    keys = prior_keys(device)

    def efficiency(table: PriorTable) -> float:
        return first_of(table, keys).efficiency(edge)

    def cost(table: PriorTable) -> float:
        return first_of(table, keys).cost(edge)

    bandwidth = device.bandwidth_bytes_per_s
    if device.vector_flops is not None:
        vector_peak = device.vector_flops.value
    else:
        vector_peak = device.dense_half_flops_per_s / cost(priors.tensor_to_vector_ratio)
    # Cards without a link of their own talk over the host's.
    fact = device.scale_up_link or device.host_link
    share = efficiency(priors.link_efficiency if device.scale_up_link is not None else priors.host_link_efficiency)
    link = fact.value * share if fact is not None else None
    return Rates(
        device=device,
        priors=priors,
        edge=edge,
        stream_bytes_per_s=bandwidth * efficiency(priors.streaming_efficiency),
        weight_bytes_per_s=bandwidth * efficiency(priors.weight_streaming_efficiency),
        matmul_efficiency=efficiency(priors.matmul_efficiency),
        attention_flops_per_s=device.dense_half_flops_per_s * efficiency(priors.prefill_attention_efficiency),
        attention_half_tokens=cost(priors.prefill_attention_half_tokens),
        attention_launch_s=cost(priors.attention_launch_s),
        attention_per_sequence_s=cost(priors.attention_per_sequence_s),
        gemm_launch_s=cost(priors.gemm_launch_s),
        elementwise_launch_s=cost(priors.elementwise_launch_s),
        uncaptured_launch_s=cost(priors.uncaptured_launch_s),
        lane_ops_per_s=vector_peak / 2.0,
        vector_flops_per_s=vector_peak * efficiency(priors.vector_efficiency),
        all_reduce_latency_s=cost(priors.all_reduce_latency_s),
        gather_latency_s=cost(priors.gather_latency_s),
        send_latency_s=cost(priors.send_latency_s),
        link_bytes_per_s=link,
        link_peak_bytes_per_s=fact.value if fact is not None else None,
        domain_devices=device.scale_up_domain.value if device.scale_up_domain else round(cost(priors.domain_devices)),
        node_link_bytes_per_s=efficiency(priors.node_link_bytes_per_s),
        node_latency_s=cost(priors.node_latency_s),
        grouped_bytes_per_s=bandwidth * efficiency(priors.grouped_streaming_efficiency),
        grouped_launch_s=cost(priors.grouped_launch_s),
        grouped_tile_rows=cost(priors.grouped_tile_rows),
        moe_layer_s=cost(priors.moe_layer_s),
        expert_imbalance=cost(priors.expert_imbalance),
        host_step_s=cost(priors.host_step_s),
        host_step_per_sequence_s=cost(priors.host_step_per_sequence_s),
        link_is_shared=device.scale_up_link is None,
    )
