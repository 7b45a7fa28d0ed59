"""Reduction, encoding and coding seen as one encoding, which is what pricing asks about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import SerializeAsAny

from kvsim.compression.base import KvBytes, KvEncoding, StrategyPart
from kvsim.compression.coding.base import Coding
from kvsim.compression.reduction.base import Reduction
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.ops import OpCall
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class StackedEncoding(KvEncoding):
    """The reduction shrinks what a token is, the encoding stores the numbers left, the coding shortens its codes."""

    kind: Literal["stacked"] = "stacked"
    reduction: SerializeAsAny[Reduction]
    encoding: SerializeAsAny[KvEncoding]
    coding: SerializeAsAny[Coding]

    @property
    def spoken(self) -> tuple[StrategyPart, ...]:
        """The parts that a name must state."""
        parts: list[StrategyPart] = [] if self.reduction.is_none else [self.reduction]
        parts += [] if self.encoding.is_native else [self.encoding]
        parts += [] if self.coding.is_none else [self.coding]
        return tuple(parts)

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        stored = self._coded(group, native)
        share = self.reduction.resident_share
        metadata = share * stored.metadata_bytes + self.reduction.metadata_bytes_per_token(group, native)
        return KvBytes(share * stored.payload_bytes, metadata)

    def read_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        reduced = self.reduction.reduced_group(group)
        if self.coding.is_fused:
            read = self._coded(group, native).total_bytes
        else:
            read = self.encoding.read_bytes_per_token(reduced, native)
        return read + self.reduction.metadata_bytes_per_token(group, native)

    def _coded(self, group: LayerGroup, native: Dtype) -> KvBytes:
        reduced = self.reduction.reduced_group(group)
        plain = self.encoding.bytes_per_token(reduced, native)
        return self.coding.coded(plain, self.encoding, reduced, native)

    def stored_elements_per_token(self, group: LayerGroup) -> int:
        return self.encoding.stored_elements_per_token(self.reduction.reduced_group(group))

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        own = self.encoding.fixed_bytes_per_sequence(self.reduction.reduced_group(group), native)
        return self.reduction.resident_share * own + self.reduction.fixed_bytes_per_sequence(group, native)

    @property
    def is_replicated(self) -> bool:
        return self.reduction.is_replicated

    @property
    def residual_tokens(self) -> int:
        return self.encoding.residual_tokens

    @property
    def residual_share(self) -> float:
        return self.reduction.residual_share

    @property
    def sink_tokens(self) -> int:
        return self.encoding.sink_tokens

    def sink_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        # The encoding picks sinks among what the reduction leaves.
        reduced = self.encoding.sink_bytes_per_token(self.reduction.reduced_group(group), native)
        return self.reduction.resident_share * reduced + self.reduction.metadata_bytes_per_token(group, native)

    @property
    def is_storage_only(self) -> bool:
        return self.encoding.is_storage_only or not (self.coding.is_none or self.coding.is_fused)

    @property
    def rate(self) -> Prior | None:
        return self.coding.rate(self.encoding) or self.encoding.rate

    @property
    def unpriced_coder(self) -> str | None:
        return self.coding.unpriced_coder or self.encoding.unpriced_coder

    @property
    def unpack_family(self) -> str | None:
        return self.coding.unpack_family or self.encoding.unpack_family

    def attention_dtype(self, model: ModelSpec, device: DeviceSpec) -> Dtype:
        return self.encoding.attention_dtype(model, device)

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        reduced = self.reduction.reduced_group(group)
        own = self.reduction.append_ops(group, model)
        if not self.reduction.resident_share:
            return tuple(own)
        return (*own, *self.encoding.append_ops(reduced, model), *self.coding.append_ops(reduced, model))

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        own = self.reduction.prefill_ops(prompt_tokens, group, model)
        if not self.reduction.resident_share:
            return tuple(own)
        return (*own, *self.encoding.prefill_ops(prompt_tokens, self.reduction.reduced_group(group), model))

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        own = self.reduction.decode_ops(group, model)
        return (*own, *self.encoding.decode_ops(self.reduction.reduced_group(group), model))

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        own = self.reduction.attention_flops_per_token(group, model)
        return own + self.encoding.attention_flops_per_token(self.reduction.reduced_group(group), model)
