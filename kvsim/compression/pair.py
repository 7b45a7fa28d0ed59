"""Compression: a token selection and a KV encoding. The two unions here are the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final, get_args

from pydantic import Field

from kvsim.compression.base import KvEncoding, StrategyPart, TokenSelection
from kvsim.compression.encoding.block_fp4 import MxFp4, NvFp4
from kvsim.compression.encoding.fp8 import Fp8
from kvsim.compression.encoding.kivi import Kivi
from kvsim.compression.encoding.low_rank import LowRank
from kvsim.compression.encoding.native import Native
from kvsim.compression.encoding.per_token_head import PerTokenHead
from kvsim.compression.encoding.turboquant import TurboQuant
from kvsim.compression.selection.h2o import H2O
from kvsim.compression.selection.keep_all import KeepAll
from kvsim.compression.selection.pyramidkv import PyramidKV
from kvsim.compression.selection.quest import Quest
from kvsim.compression.selection.snapkv import SnapKV
from kvsim.compression.selection.streaming_llm import StreamingLlm
from kvsim.specs.base import Spec
from kvsim.specs.model import LayerGroup, LayerKind

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

_Selections = KeepAll | StreamingLlm | SnapKV | H2O | PyramidKV | Quest
_Encodings = Native | Fp8 | PerTokenHead | NvFp4 | MxFp4 | Kivi | TurboQuant | LowRank

AnySelection = Annotated[_Selections, Field(discriminator="kind")]
AnyEncoding = Annotated[_Encodings, Field(discriminator="kind")]
SELECTIONS: Final[tuple[type[TokenSelection], ...]] = get_args(_Selections)
ENCODINGS: Final[tuple[type[KvEncoding], ...]] = get_args(_Encodings)


class Compression(Spec):
    """A pair: which tokens, and how they are stored."""

    selection: AnySelection = KeepAll()
    encoding: AnyEncoding = Native()

    @property
    def name(self) -> str:
        """Canonical spelling, such as ``native``, ``fp8`` or ``snapkv+kivi-2``; ``parse_compression`` reads it back."""
        if isinstance(self.selection, KeepAll):
            return spell(self.encoding)
        if self.encoding.is_native:
            return spell(self.selection)
        return f"{spell(self.selection)}+{spell(self.encoding)}"

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        """Why this model or device cannot run the strategy, or None: the first reason found."""
        return self.selection.check(model, device) or self.encoding.check(model, device)

    def encoding_for_layer(
        self, index: int, model: ModelSpec, engine_skip_layers: Sequence[int | str] = ()
    ) -> AnyEncoding:
        """Give the encoding of layer ``index``: native where the engine or the format itself skips the layer.

        ``engine_skip_layers`` is vLLM's ``kv_cache_dtype_skip_layers``: indices, or ``sliding_window``.
        """
        is_sliding = _group_of(index, model).kind is LayerKind.SLIDING
        skipped = index in engine_skip_layers or (is_sliding and "sliding_window" in engine_skip_layers)
        return Native() if skipped or self._is_boundary(index, model) else self.encoding

    def _is_boundary(self, index: int, model: ModelSpec) -> bool:
        """Whether the format keeps this first or last layer native.

        vLLM's rule spares models that mix attention with linear or state-space layers (its ``is_hybrid``).
        """
        if not self.encoding.skips_boundary_layers or any(group.kind is LayerKind.LINEAR for group in model.groups):
            return False
        width = min(self.encoding.skips_boundary_layers, model.num_layers // 2)
        return index < width or index >= model.num_layers - width


def spell(part: StrategyPart) -> str:
    """Shortest spelling of one half: a published name, then ``:value``, then ``(field=value,…)`` for the rest."""
    values = part.model_dump(mode="json", exclude={"kind"})
    fields = type(part).model_fields
    defaults = {field: fields[field].default for field in values}
    name = next((name for name, means in part.names.items() if means.items() <= values.items()), next(iter(part.names)))
    defaults |= part.names[name]
    changed = {field: value for field, value in values.items() if value != defaults[field]}
    inline = part.inline_text() if any(field in changed for field in part.inline_fields) else None
    named = [
        f"{field}={value}"
        for field, value in changed.items()
        if value is not None and not (inline is not None and field in part.inline_fields)
    ]
    return name + (f":{inline}" if inline is not None else "") + (f"({','.join(named)})" if named else "")


def _group_of(index: int, model: ModelSpec) -> LayerGroup:
    return next(group for group in model.groups if index in group.layers)
