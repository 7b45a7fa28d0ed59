"""Compression: which tokens, which dimensions, how a number is stored, how codes are coded.

The four unions here are the registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final, Self, get_args

from pydantic import Field, model_validator

from kvsim.compression.base import KvEncoding, LayerView, StrategyPart
from kvsim.compression.coding.arithmetic import Arithmetic
from kvsim.compression.coding.base import Coding
from kvsim.compression.coding.deflate import Deflate
from kvsim.compression.coding.huffman import Huffman
from kvsim.compression.coding.none import NoCoding
from kvsim.compression.coding.rans import Rans
from kvsim.compression.coding.zstd import Zstd
from kvsim.compression.encoding.block_fp4 import MxFp4, NvFp4
from kvsim.compression.encoding.cachegen import CacheGen
from kvsim.compression.encoding.fp8 import Fp8
from kvsim.compression.encoding.ggml import Ggml
from kvsim.compression.encoding.kivi import Kivi
from kvsim.compression.encoding.kv_adaquant import KvAdaQuant
from kvsim.compression.encoding.kvquant import KvQuant
from kvsim.compression.encoding.kvtc import Kvtc
from kvsim.compression.encoding.layer_encodings import LayerEncodings
from kvsim.compression.encoding.lossless import Lossless
from kvsim.compression.encoding.native import Native
from kvsim.compression.encoding.per_token_head import PerTokenHead
from kvsim.compression.encoding.quarot import QuaRot
from kvsim.compression.encoding.rdkv import Rdkv
from kvsim.compression.encoding.rotatekv import RotateKv
from kvsim.compression.encoding.turboquant import TurboQuant
from kvsim.compression.encoding.turboquant_paper import TurboQuantPaper
from kvsim.compression.reduction.base import Reduction
from kvsim.compression.reduction.eigen_attention import EigenAttention
from kvsim.compression.reduction.low_rank import LowRank
from kvsim.compression.reduction.minicache import MiniCache
from kvsim.compression.reduction.mla import Mla
from kvsim.compression.reduction.none import NoReduction
from kvsim.compression.reduction.shared_layers import CrossLayerAttention, KvSharer
from kvsim.compression.reduction.think import ThinK
from kvsim.compression.reduction.xkv import Xkv
from kvsim.compression.rules import conflict
from kvsim.compression.selection.adakv import AdaKV
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selection.cam import Cam
from kvsim.compression.selection.chunkkv import ChunkKV
from kvsim.compression.selection.cur import Cur
from kvsim.compression.selection.d2o import D2O
from kvsim.compression.selection.dms import Dms
from kvsim.compression.selection.dsa import Dsa
from kvsim.compression.selection.duo_attention import DuoAttention
from kvsim.compression.selection.expected_attention import ExpectedAttention
from kvsim.compression.selection.h2o import H2O
from kvsim.compression.selection.infokv import InfoKV
from kvsim.compression.selection.keep_all import KeepAll
from kvsim.compression.selection.keydiff import KeyDiff
from kvsim.compression.selection.knorm import Knorm
from kvsim.compression.selection.kvzap import KVzap
from kvsim.compression.selection.kvzip import KVzip
from kvsim.compression.selection.lagkv import LagKv
from kvsim.compression.selection.layer_plan import LayerPlan
from kvsim.compression.selection.merging import Merging
from kvsim.compression.selection.nsa import Nsa
from kvsim.compression.selection.prefill_decoding import PrefillDecoding
from kvsim.compression.selection.pyramidkv import PyramidKV
from kvsim.compression.selection.qfilter import QFilter
from kvsim.compression.selection.quest import Quest
from kvsim.compression.selection.random import RandomEviction
from kvsim.compression.selection.rkv import RKV
from kvsim.compression.selection.snapkv import SnapKV
from kvsim.compression.selection.streaming_llm import StreamingLlm
from kvsim.compression.selection.tova import Tova
from kvsim.compression.selection.weighted_atoms import WeightedAtoms
from kvsim.compression.spelling import spell_part
from kvsim.compression.stacked import StackedEncoding
from kvsim.specs.base import Spec
from kvsim.specs.model import LayerKind

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

_Eviction = StreamingLlm | SnapKV | H2O | PyramidKV | Tova | Knorm | KeyDiff | ExpectedAttention | QFilter
_MoreEviction = ChunkKV | LagKv | Cur | RandomEviction
_HeadBudgets = AdaKV | DuoAttention
_Foreseeing = KVzip | KVzap | Dms
_Decoding = PrefillDecoding | RKV | InfoKV
_Merging = Merging | Cam | D2O | WeightedAtoms
_SparseReading = Quest | Nsa | Dsa
_Selections = KeepAll | _Eviction | _MoreEviction | _HeadBudgets | _Foreseeing | _Decoding | _Merging | _SparseReading
_Reductions = NoReduction | LowRank | EigenAttention | Xkv | Mla | ThinK | MiniCache | KvSharer | CrossLayerAttention
_Rotations = TurboQuant | TurboQuantPaper | QuaRot | RotateKv | KvQuant
_AtRest = Lossless | CacheGen | Kvtc
_Encodings = Native | Fp8 | PerTokenHead | Ggml | NvFp4 | MxFp4 | Kivi | KvAdaQuant | _Rotations | Rdkv | _AtRest
_Codings = NoCoding | Huffman | Rans | Arithmetic | Deflate | Zstd

_LayerSelection = Annotated[_Selections, Field(discriminator="kind")]
_LayerEncoding = Annotated[_Encodings, Field(discriminator="kind")]


class PlannedSelections(LayerPlan):
    """A layer plan whose entries may be written as any selection is."""

    layers: tuple[_LayerSelection, ...] = Field(min_length=1)


class PlannedEncodings(LayerEncodings):
    """A plan of encodings whose entries may be written as any encoding is."""

    layers: tuple[_LayerEncoding, ...] = Field(min_length=1)


AnySelection = Annotated[_Selections | PlannedSelections, Field(discriminator="kind")]
AnyReduction = Annotated[_Reductions, Field(discriminator="kind")]
AnyEncoding = Annotated[_Encodings | PlannedEncodings, Field(discriminator="kind")]
AnyCoding = Annotated[_Codings, Field(discriminator="kind")]
SELECTIONS: Final[tuple[type[TokenSelection], ...]] = get_args(_Selections)
REDUCTIONS: Final[tuple[type[Reduction], ...]] = get_args(_Reductions)
ENCODINGS: Final[tuple[type[KvEncoding], ...]] = get_args(_Encodings)
CODINGS: Final[tuple[type[Coding], ...]] = get_args(_Codings)
PLANS: Final[tuple[type[LayerPlan | LayerEncodings], ...]] = (PlannedSelections, PlannedEncodings)
"""Parts that are a list over layers; their entries are of the others."""


class Compression(Spec):
    """Four choices: which tokens, which dimensions or layers of them, how a number is stored, how codes are coded."""

    selection: AnySelection = KeepAll()
    reduction: AnyReduction = NoReduction()
    encoding: AnyEncoding = Native()
    coding: AnyCoding = NoCoding()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        reason = conflict(self.selection, self.reduction, self.encoding, self.coding)
        if reason:
            raise ValueError(reason)
        return self

    @property
    def name(self) -> str:
        """Canonical spelling, such as ``native``, ``fp8`` or ``snapkv+kivi-2``; ``parse_compression`` reads it back."""
        parts = [self.selection] if not isinstance(self.selection, KeepAll) else []
        spoken = "+".join([spell(part) for part in parts] + ([] if self.stores_native else [spell(self.stored)]))
        return spoken or spell(self.encoding)

    @property
    def active_parts(self) -> tuple[StrategyPart, ...]:
        """The parts that do something: those of any family but ``baseline``."""
        parts = (self.selection, self.reduction, self.encoding, self.coding)
        return tuple(part for part in parts if part.family != "baseline")

    @property
    def families(self) -> tuple[str, ...]:
        """Families of those parts, each once, ``baseline`` where there are none."""
        return tuple(dict.fromkeys(part.family for part in self.active_parts)) or ("baseline",)

    @property
    def family(self) -> str:
        """The same in one line, such as ``eviction + quantisation``."""
        return " + ".join(self.families)

    @property
    def keeps_all_tokens(self) -> bool:
        """Whether no token is dropped, skipped or merged."""
        return isinstance(self.selection, KeepAll) and not self.encoding.evicts

    @property
    def stores_native(self) -> bool:
        """Whether kept tokens are stored as the model made them."""
        return self.reduction.is_none and self.encoding.is_native and self.coding.is_none

    @property
    def stored(self) -> KvEncoding:
        """Reduction, encoding and coding as one encoding: what a layer that no rule exempts stores."""
        return _stack(self.reduction, self.encoding, self.coding)

    @property
    def rate_note(self) -> str | None:
        """What a reader must know of bytes that depend on the data, or None where they are exact."""
        rate = self.stored.rate
        if rate is None:
            return None
        uncoded = "a 16-bit cache" if self.coding.is_none else f"codes of fixed width ({spell(self.encoding)})"
        return (
            f"KV bytes of {spell(self.stored)} depend on the data: {rate.value:.3f} of {uncoded} are taken, "
            f"{rate.low:.3f} to {rate.high:.3f} are possible ({rate.source}); no band of this report spans them"
        )

    @property
    def refused_in_pool(self) -> str | None:
        """Why attention cannot read KV stored like this, so that only tiers and transfers may hold it, or None."""
        if not self.stored.is_storage_only:
            return None
        return (
            f"{spell(self.stored)} is decoded as a whole before attention reads it, so it serves engine.kv_tiers and "
            "transfers but not the device's pool; of the entropy codings, huffman is decoded inside attention"
        )

    @property
    def bars_prefix_reuse(self) -> str | None:
        """What the strategy does that keeps another request from using a cached prefix, or None."""
        if self.selection.evicts or self.encoding.evicts:
            return "evicts tokens"
        by_prompt = self.reduction.depends_on_prompt or self.encoding.depends_on_prompt
        return "stores tokens by what the whole prompt holds" if by_prompt else None

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        """Why this model or device cannot run the strategy, or None: the first reason found."""
        reason = self.selection.check(model, device) or self.reduction.check(model, device)
        return reason or self._check_encoding(model, device) or self.coding.check(model, device)

    def _check_encoding(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        reason = self.encoding.check(self._reduced(model), device)
        if reason is None or self.encoding.check(model, device) is not None:
            return reason
        return f"{spell(self.encoding)} cannot store what {spell(self.reduction)} leaves: {reason}"

    def _reduced(self, model: ModelSpec) -> ModelSpec:
        """Give the model with the shapes that the encoding sees."""
        trained = tuple(self.selection.trained_group(group) for group in model.groups)
        return model.model_copy(update={"groups": tuple(self.reduction.reduced_group(group) for group in trained)})

    def encoding_for_layer(
        self, index: int, model: ModelSpec, engine_skip_layers: Sequence[int | str] = ()
    ) -> KvEncoding:
        """Give the encoding of layer ``index``: native where the engine or the format itself skips the layer.

        ``engine_skip_layers`` is vLLM's ``kv_cache_dtype_skip_layers``: indices, or ``sliding_window``.
        """
        group = next(group for group in model.groups if index in group.layers)
        is_hybrid = any(group.kind is LayerKind.LINEAR for group in model.groups)
        return self.encoding_at(LayerView(index, model.num_layers, group), engine_skip_layers, is_hybrid=is_hybrid)

    def encoding_at(
        self, layer: LayerView, engine_skip_layers: Sequence[int | str] = (), *, is_hybrid: bool = False
    ) -> KvEncoding:
        """Give the encoding of one layer; as :meth:`encoding_for_layer`, for who has a layer but no model.

        ``is_hybrid``: whether the model mixes attention with linear or state-space layers.
        """
        is_sliding = layer.group.kind is LayerKind.SLIDING
        together = self.reduction.stored_with(layer)
        if set(together) & set(engine_skip_layers) or (is_sliding and "sliding_window" in engine_skip_layers):
            return Native()
        encoding, coding = self.encoding.at_layer(layer), self.coding
        if encoding.stores_prompt_once and layer.group.window_tokens is not None:
            return Native()
        if not is_hybrid and any(_is_boundary(encoding, index, layer.num_layers) for index in together):
            encoding, coding = Native(), NoCoding()
        return _stack(self.reduction.at_layer(layer), encoding, coding)


def _is_boundary(encoding: KvEncoding, index: int, num_layers: int) -> bool:
    """Whether the format keeps this first or last layer native.

    vLLM's rule spares models that mix attention with linear or state-space layers (its ``is_hybrid``).
    """
    width = min(encoding.skips_boundary_layers, num_layers // 2)
    return index < width or index >= num_layers - width


def _stack(reduction: Reduction, encoding: KvEncoding, coding: Coding) -> KvEncoding:
    if reduction.is_none and coding.is_none:
        return encoding
    return StackedEncoding(reduction=reduction, encoding=encoding, coding=coding)


def spell(part: StrategyPart) -> str:
    """Spell a part, or parts that are one encoding."""
    if isinstance(part, StackedEncoding):
        return "+".join(spell(one) for one in part.spoken)
    return spell_part(part)
