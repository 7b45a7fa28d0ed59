"""What selections share that judge each token when it leaves a window, in prefill and in decode alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, PositiveInt

from kvsim.compression.base import HeadCurves, LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import kv_heads, native_token_bytes
from kvsim.compression.selection.ragged import HeadwiseSelection
from kvsim.ops import Component, OpCall, compact

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec


class DelayedEviction(HeadwiseSelection):
    """Each KV head keeps its newest tokens, and of older ones, prompt or generated, those that pass a test.

    How many pass depends on the data. Pricing takes an expected share: W + (1 - r) (n - W) of n tokens stay, with W the
    window and r the ``compression_ratio``. That mean over heads grows by less than one token a step, so it is stated as
    two kinds of heads that have it together: 1 - r of them keep everything, r of them the window.
    The prompt is charged uncompressed while it is processed, which is what public code holds.
    """

    inline_fields: ClassVar = ("compression_ratio",)
    family: ClassVar = "eviction"

    compression_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share removed, as expected, of the tokens that have left the window."""
    window_size: PositiveInt
    """Newest tokens that always stay."""

    @property
    def evicts(self) -> bool:
        return not self.masked and self.compression_ratio > 0

    @property
    def removed_share(self) -> float | None:
        return self.compression_ratio

    def head_curves(self, prompt_tokens: int, layer: LayerView) -> tuple[HeadCurves, ...]:
        whole, newest = growing(prompt_tokens), growing(prompt_tokens, self.window_size)
        removed = 0.0 if self.masked else self.compression_ratio
        kinds = ((1 - removed, whole), (removed, newest))
        return tuple(HeadCurves(share, curve, curve) for share, curve in kinds if share > 0)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.head_curves(prompt_tokens, layer)[0].resident

    def expected_tokens(self, tokens: int) -> float:
        """Tokens expected to stay of so many, on average over heads."""
        newest = min(tokens, self.window_size)
        return newest + (1 - self.compression_ratio) * (tokens - newest)

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group = layer.group
        if kv_heads(group) == 0 or self.masked or prompt_tokens <= self.window_size:
            return ()
        token_bytes = native_token_bytes(group, model)
        work = compact(self.expected_tokens(prompt_tokens), token_bytes)
        return (OpCall("compact_kv", work, Component.COMPRESSION),)

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group = layer.group
        if kv_heads(group) == 0 or self.masked:
            return ()
        # The token that leaves the window moves to the head's own pages where it stays.
        token_bytes = native_token_bytes(group, model)
        work = compact(1 - self.compression_ratio, token_bytes)
        return (OpCall("keep_or_drop", work, Component.COMPRESSION),)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """``name:0.75`` is a compression_ratio."""
        return {"compression_ratio": text}

    def inline_text(self) -> str | None:
        return str(self.compression_ratio)
