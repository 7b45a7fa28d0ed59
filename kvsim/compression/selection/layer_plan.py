"""A static plan: which token selection each layer uses, and with which budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, Self

from pydantic import Field, SerializeAsAny, model_validator

from kvsim.compression.base import LayerView, TokenCurve
from kvsim.compression.depth import Depth, entry_at, refused_depth
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selector import Selector, layer_view
from kvsim.compression.spelling import spell_list, spell_part

if TYPE_CHECKING:
    from kvsim.compression.base import HeadCurves
    from kvsim.ops import OpCall, Work
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import LayerGroup, ModelSpec
    from kvsim.specs.prior import Prior
    from kvsim.tensors import BoolArray, IntArray, KvTensors, LayerKv, SignalName

_GRANULARITIES = ("none", "layer", "head", "ragged")


class LayerPlan(TokenSelection):
    """Each layer has a selection of its own, by a table that is made offline (PolyKV-style, arXiv 2606.15157).

    The paper's abstract says that each layer is given one of the existing eviction methods and a budget of its own
    under a fixed total; its algorithm and its candidates are not public here, so how plans are made (`kvsim quality
    plan`) is ours. A plan is data: nothing is searched while a model runs, and a plan whose layers all say the same is
    that selection. Where an entry is a method that moves budget between layers itself (PyramidKV), the layer holds what
    that method would hold there if it were used everywhere.
    """

    names: ClassVar = {"layer_plan": {}}
    summaries: ClassVar = {
        "layer_plan": "each layer its own selection and budget, by a plan made offline; PolyKV-style, arXiv 2606.15157"
    }

    family: ClassVar = "layer plan"

    kind: Literal["layer_plan"] = "layer_plan"
    depth: Depth = "exact"
    """exact: one entry per layer of the model. relative: entries share out the layers of any model evenly, in order."""
    layers: tuple[SerializeAsAny[TokenSelection], ...] = Field(min_length=1)
    """What each layer uses; where selections do not act (sliding windows, latents) the entry is not asked."""

    @model_validator(mode="after")
    def _not_nested(self) -> Self:
        if any(isinstance(one, LayerPlan) for one in self.layers):
            msg = "an entry of a layer plan cannot be a plan itself; name a selection"
            raise ValueError(msg)
        trained = [one for one in self.layers if type(one).trained_group is not TokenSelection.trained_group]
        if trained:
            msg = f"{trained[0].kind} is trained into a whole model, so it cannot be an entry of a layer plan"
            raise ValueError(msg)
        return self

    def at_layer(self, layer: LayerView) -> TokenSelection:
        """Give the selection that a layer uses; raise InvalidSpec where the plan is for another number of layers."""
        return entry_at(self.layers, self.depth, layer)

    @cached_property
    def distinct(self) -> tuple[TokenSelection, ...]:
        """The selections that occur, each once."""
        return tuple(dict.fromkeys(self.layers))

    def spelled(self) -> str:
        return spell_list("layer_plan", self.depth, [spell_part(one) for one in self.layers])

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        reason = refused_depth(len(self.layers), self.depth, model.num_layers)
        return reason or next((why for one in self.distinct if (why := one.check(model, device))), None)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.at_layer(layer).resident_tokens(prompt_tokens, layer)

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.at_layer(layer).attended_tokens(prompt_tokens, layer)

    def head_curves(self, prompt_tokens: int, layer: LayerView) -> tuple[HeadCurves, ...]:
        return self.at_layer(layer).head_curves(prompt_tokens, layer)

    def layer_band(self, layer: LayerView) -> int:
        mine = self.at_layer(layer)
        return self.distinct.index(mine) * layer.num_layers + mine.layer_band(layer)

    def prefill_resident_tokens(self, processed_tokens: int, layer: LayerView) -> int:
        return self.at_layer(layer).prefill_resident_tokens(processed_tokens, layer)

    def scanned_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        return self.at_layer(layer).scanned_tokens(prompt_tokens, layer)

    def scan_bytes_per_token(self, group: LayerGroup, element_bytes: float) -> float:
        _ask_its_layers()

    def scan_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        _ask_its_layers()

    def decode_score_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        _ask_its_layers()

    def decode_score_work(self, group: LayerGroup, model: ModelSpec) -> Work | None:
        _ask_its_layers()

    def prefill_scratch_tokens(self, layer: LayerView) -> int:
        return self.at_layer(layer).prefill_scratch_tokens(layer)

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self.at_layer(layer).prefill_ops(prompt_tokens, layer, model)

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self.at_layer(layer).decode_ops(layer, model)

    @property
    def evicts(self) -> bool:
        return any(one.evicts for one in self.distinct)

    @property
    def granularity(self) -> str:
        found = [_GRANULARITIES.index(one.granularity) for one in self.distinct]
        return _GRANULARITIES[max(*found, 1 if len(found) > 1 else 0)]

    @property
    def query_aware(self) -> bool:
        return any(one.query_aware for one in self.distinct)

    @property
    def masks(self) -> bool:
        return all(one.masks for one in self.distinct)

    def decode_cuts(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        return self.at_layer(layer).decode_cuts(prompt_tokens, layer)

    def cut_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self.at_layer(layer).cut_ops(prompt_tokens, layer, model)

    def held_bytes_per_token(self, layer: LayerView) -> float:
        return self.at_layer(layer).held_bytes_per_token(layer)

    def buffer_bytes(self, layer: LayerView, model: ModelSpec) -> float:
        return self.at_layer(layer).buffer_bytes(layer, model)

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        return frozenset().union(*(one.needs_signals for one in self.distinct))

    @property
    def fits_on_signals(self) -> frozenset[SignalName]:
        return frozenset().union(*(one.fits_on_signals for one in self.distinct))

    @property
    def expected_share(self) -> Prior | None:
        # Each entry has its own, which notes and pricing ask of the layers.
        return None

    @property
    def keeps_newest(self) -> bool:
        return all(one.keeps_newest for one in self.distinct)

    @property
    def moves_budgets(self) -> bool:
        return any(one.moves_budgets for one in self.distinct)

    @property
    def unit_tokens(self) -> int:
        return max(one.unit_tokens for one in self.distinct)

    @property
    def merges(self) -> bool:
        return any(one.merges for one in self.distinct)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        return self.at_layer(layer).keep(kv, layer)

    def selector(self) -> Selector:
        return SelectByPlan(self, {one: one.selector() for one in self.distinct})

    def cut_selector(self, prompt_tokens: int) -> Selector:
        return SelectByPlan(self, {one: one.cut_selector(prompt_tokens) for one in self.distinct})

    def read_mask(self, layer_kv: LayerKv, layer: LayerView) -> BoolArray | None:
        return self.at_layer(layer).read_mask(layer_kv, layer)

    def index_bits(self, layer_kv: LayerKv, layer: LayerView, native_bits: int) -> float:
        return self.at_layer(layer).index_bits(layer_kv, layer, native_bits)


class SelectByPlan(Selector):
    """Lets each layer's own selection choose, each on the whole cache of the prompt."""

    def __init__(self, plan: LayerPlan, selectors: dict[TokenSelection, Selector]) -> None:
        self.plan, self.selectors = plan, selectors
        self.needs_calibration = any(one.needs_calibration for one in selectors.values())

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Fit those that learn."""
        fitted = {of: one.fit(samples) if one.needs_calibration else one for of, one in self.selectors.items()}
        return type(self)(self.plan, fitted)

    def select(self, kv: KvTensors) -> KvTensors:
        """Take from each selection the layers that are its own."""
        own: dict[TokenSelection, list[int]] = {}
        for index in range(kv.num_layers):
            own.setdefault(self.plan.at_layer(layer_view(kv, index)), []).append(index)
        layers = list(kv.layers)
        for selection, indices in own.items():
            for index, layer in zip(indices, self.selectors[selection].select_layers(kv, indices), strict=True):
                layers[index] = layer
        return replace(kv, layers=tuple(layers))


def _ask_its_layers() -> NoReturn:
    msg = "a layer plan has no figures of its own; ask the selection of a layer (at_layer)"
    raise TypeError(msg)
