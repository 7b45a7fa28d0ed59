"""A static plan: in which format each layer stores its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, Self

from pydantic import Field, SerializeAsAny, model_validator

from kvsim.compression.base import KvBytes, KvEncoding, LayerView, StrategyPart
from kvsim.compression.codec import Codec, StoredLayer
from kvsim.compression.depth import Depth, entry_at, refused_depth
from kvsim.compression.selector import layer_view
from kvsim.compression.spelling import spell_list, spell_part
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import KvTensors

if TYPE_CHECKING:
    from kvsim.ops import OpCall
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class LayerEncodings(KvEncoding):
    """Each layer has an encoding of its own, as a table that is made offline.

    The same idea as a layer plan of selections (PolyKV-style, arXiv 2606.15157), for bits; ours. Pricing asks each
    layer's own encoding (`at_layer`); what is asked of the plan as a whole are means over its entries.
    """

    names: ClassVar = {"layer_encodings": {}}
    summaries: ClassVar = {"layer_encodings": "each layer its own encoding, by a plan made offline; ours"}

    family: ClassVar = "layer plan"

    kind: Literal["layer_encodings"] = "layer_encodings"
    depth: Depth = "exact"
    """exact: one entry per layer of the model. relative: entries share out the layers of any model evenly, in order."""
    layers: tuple[SerializeAsAny[KvEncoding], ...] = Field(min_length=1)
    """What each layer stores."""

    @model_validator(mode="after")
    def _one_layer_each(self) -> Self:
        for one in self.layers:
            if one.joins_layers or one.is_storage_only or isinstance(one, LayerEncodings):
                msg = f"{one.kind} codes whole caches and not one layer, so it cannot be an entry of a layer plan"
                raise ValueError(msg)
        return self

    def at_layer(self, layer: LayerView) -> KvEncoding:
        """Give the encoding of a layer; raise InvalidSpec where the plan is for another number of layers."""
        return entry_at(self.layers, self.depth, layer)

    @cached_property
    def distinct(self) -> tuple[KvEncoding, ...]:
        """The encodings that occur, each once."""
        return tuple(dict.fromkeys(self.layers))

    def spelled(self) -> str:
        return spell_list("layer_encodings", self.depth, [spell_part(one) for one in self.layers])

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        reason = refused_depth(len(self.layers), self.depth, model.num_layers)
        return reason or next((why for one in self.distinct if (why := one.check(model, device))), None)

    def refuses(self, reduction: StrategyPart) -> str | None:
        return next((why for one in self.distinct if (why := one.refuses(reduction))), None)

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        found = [one.bytes_per_token(group, native) for one in self.layers]
        count = len(found)
        return KvBytes(
            sum(one.payload_bytes for one in found) / count, sum(one.metadata_bytes for one in found) / count
        )

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        return sum(one.fixed_bytes_per_sequence(group, native) for one in self.layers) / len(self.layers)

    def read_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        return sum(one.read_bytes_per_token(group, native) for one in self.layers) / len(self.layers)

    def stored_elements_per_token(self, group: LayerGroup) -> int:
        _ask_its_layers()

    def sink_bytes_per_token(self, group: LayerGroup, native: Dtype) -> float:
        _ask_its_layers()

    def attention_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        _ask_its_layers()

    def attention_dtype(self, model: ModelSpec, device: DeviceSpec) -> Dtype:
        _ask_its_layers()

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        _ask_its_layers()

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        _ask_its_layers()

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        _ask_its_layers()

    @property
    def residual_tokens(self) -> int:
        return max(one.residual_tokens for one in self.distinct)

    @property
    def sink_tokens(self) -> int:
        return max(one.sink_tokens for one in self.distinct)

    @property
    def evicts(self) -> bool:
        return any(one.evicts for one in self.distinct)

    @property
    def stores_prompt_once(self) -> bool:
        return any(one.stores_prompt_once for one in self.distinct)

    @property
    def depends_on_prompt(self) -> bool:
        return any(one.depends_on_prompt for one in self.distinct)

    @property
    def undoes_rope(self) -> bool:
        return any(one.undoes_rope for one in self.distinct)

    @property
    def skips_boundary_layers(self) -> int:
        return max(one.skips_boundary_layers for one in self.distinct)

    @property
    def is_native(self) -> bool:
        return all(one.is_native for one in self.distinct)

    @property
    def is_exact(self) -> bool:
        return all(one.is_exact for one in self.distinct)

    def codec(self) -> Codec:
        return CodecByPlan(self, {one: one.codec() for one in self.distinct})


class CodecByPlan(Codec):
    """Stores each layer with its own codec; each codec sees the whole cache, so that layers keep their indices."""

    def __init__(self, plan: LayerEncodings, codecs: dict[KvEncoding, Codec]) -> None:
        self.plan, self.codecs = plan, codecs
        self.needs_calibration = any(one.needs_calibration for one in codecs.values())

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Fit those that learn."""
        fitted = {of: one.fit(samples) if one.needs_calibration else one for of, one in self.codecs.items()}
        return type(self)(self.plan, fitted)

    def store(self, kv: KvTensors) -> tuple[StoredLayer, ...]:
        """Store and read back a cache."""
        wanted = [self.plan.at_layer(layer_view(kv, index)) for index in range(kv.num_layers)]
        stored = {one: self.codecs[one].store(kv) for one in dict.fromkeys(wanted)}
        return tuple(stored[one][index] for index, one in enumerate(wanted))


def _ask_its_layers() -> NoReturn:
    msg = "a plan of encodings has no work of its own; ask the encoding of a layer (at_layer)"
    raise TypeError(msg)
