"""Prefill and decode on pools of their own, and the link that KV takes from one to the other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_serializer

from kvsim.specs.base import Spec
from kvsim.specs.engine import Count, EngineSpec
from kvsim.specs.link import CustomLink
from kvsim.specs.routing import Routing
from kvsim.units import BytesPerSecond


class PoolSpec(Spec):
    """One pool; what is not set is the scenario's."""

    replicas: Count = 1
    tensor_parallel_size: Count | None = None
    device: str | None = None
    engine: EngineSpec = EngineSpec()
    """Options that differ from the scenario's engine; only those that are set count."""

    @field_serializer("engine")
    def _only_what_is_set(self, engine: EngineSpec) -> dict[str, Any]:
        return engine.model_dump(mode="json", exclude_unset=True)

    def merged(self, engine: EngineSpec) -> EngineSpec:
        """The scenario's engine with this pool's options."""
        own = {name: getattr(self.engine, name) for name in self.engine.model_fields_set}
        return engine.model_copy(update=own)


class TransferCompression(Spec):
    """KV compressed for the link alone: encoded before it leaves, decoded when it has arrived."""

    encoding: str
    """Name of an encoding, such as fp8."""
    coder_bytes_per_s: BytesPerSecond | None = None
    """Bytes of KV that one replica encodes or decodes per second; None prices the encoding's own kernels."""


def _from_text(value: Any) -> Any:
    if isinstance(value, str):
        return None if value == "none" else {"encoding": value}
    return value


class Disaggregation(Spec):
    """Prefill replicas process prompts and make first tokens; KV moves; decode replicas make the rest."""

    link: str | CustomLink
    """Name of a link, or its bandwidth and latency as transfers reach them."""
    prefill: PoolSpec = PoolSpec()
    decode: PoolSpec = PoolSpec()
    transfer: Literal["after_prefill", "layerwise"] = "after_prefill"
    """Whether KV moves once a prompt is in, or layer by layer while it is processed."""
    ports: Literal["device", "node"] = "device"
    """Whether every device has a port of its own, or the devices of a replica share one."""
    transfer_compression: Annotated[TransferCompression | None, BeforeValidator(_from_text)] = None
    decode_routing: Routing = "least_loaded"
    """How sequences reach decode replicas; ``routing`` is how requests reach prefill replicas."""
