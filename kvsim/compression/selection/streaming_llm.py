"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import FullAttentionSelection, whole_tokens
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.tensors import IntArray, KvTensors

DEFAULT_SINK_TOKENS = 4
DEFAULT_BUDGET_TOKENS = 2048


class StreamingLlm(FullAttentionSelection):
    """The first ``num_sink_tokens`` and the last ``window_length`` tokens (arXiv 2309.17453).

    Nothing is scored, and memory is bounded from the first token on: the window moves while the prompt is processed.
    ``streaming_llm:2048`` means 2,048 tokens in all, sinks included. ``streaming_llm:0.75`` removes a share of the
    prompt (kvpress's compression_ratio): the window is then known, and starts to move, only when the prompt ends.
    """

    names: ClassVar = {"streaming_llm": {"window_length": DEFAULT_BUDGET_TOKENS - DEFAULT_SINK_TOKENS}}
    aliases: ClassVar = {"streamingllm": "streaming_llm"}
    summaries: ClassVar = {
        "streaming_llm": "4 sinks and a window, 2,048 tokens in all unless set; StreamingLLM, arXiv 2309.17453"
    }
    inline_fields: ClassVar = ("window_length", "compression_ratio")

    family: ClassVar = "eviction"

    kind: Literal["streaming_llm"] = "streaming_llm"
    num_sink_tokens: NonNegativeInt = DEFAULT_SINK_TOKENS
    window_length: PositiveInt | None = None
    """Newest tokens held beside the sinks."""
    compression_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the prompt's KV removed (kvpress's meaning), instead of window_length."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.compression_ratio is None) == (self.window_length is None):
            msg = "give exactly one of window_length and compression_ratio"
            raise ValueError(msg)
        return self

    @model_serializer(mode="wrap")
    def _without_the_other_size(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A scenario that was written before there was a second way to give the size keeps its fingerprint.
        data: dict[str, Any] = handler(self)
        data.pop("compression_ratio" if self.compression_ratio is None else "window_length")
        return data

    def budget(self, prompt_tokens: int) -> int:
        """Most tokens held in one layer once a prompt is in: at least one beside the sinks."""
        if self.compression_ratio is None:
            return self.num_sink_tokens + (self.window_length or 0)
        return max(self.num_sink_tokens + 1, int(prompt_tokens * (1.0 - self.compression_ratio)))

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        if self.compression_ratio == 0.0:
            return growing(prompt_tokens)
        return growing(prompt_tokens, self.budget(prompt_tokens))

    def prefill_resident_tokens(self, processed_tokens: int, layer: LayerView) -> int:
        if self.window_length is None:
            return processed_tokens
        return min(processed_tokens, self.budget(processed_tokens))

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        layer_kv = kv.layers[layer.index]
        tokens = layer_kv.num_tokens
        held = self.budget(tokens)
        if tokens <= held:
            return None
        newest = held - self.num_sink_tokens
        kept = np.concatenate((np.arange(self.num_sink_tokens), np.arange(tokens - newest, tokens)))
        return np.broadcast_to(kept, (layer_kv.num_kv_heads, held)).copy()

    @property
    def evicts(self) -> bool:
        return self.compression_ratio != 0.0

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        if "num_sink_tokens" in given:
            msg = "streaming_llm: num_sink_tokens needs window_length by name beside it, not a value after ':'"
            raise InvalidSpec(msg)
        if _is_share(text):
            return {"compression_ratio": text}
        budget_tokens = whole_tokens("streaming_llm", text)
        if budget_tokens <= DEFAULT_SINK_TOKENS:
            msg = (
                f"'streaming_llm:{text}' leaves no window beside {DEFAULT_SINK_TOKENS} sink tokens; "
                f"use {DEFAULT_SINK_TOKENS + 1} or more"
            )
            raise InvalidSpec(msg)
        return {"window_length": budget_tokens - DEFAULT_SINK_TOKENS}

    def inline_text(self) -> str | None:
        if self.num_sink_tokens != DEFAULT_SINK_TOKENS:
            return None
        return str(self.budget(0) if self.compression_ratio is None else self.compression_ratio)


def _is_share(text: str) -> bool:
    """Whether ``text`` is a fraction below 1 and no number of tokens."""
    try:
        return "." in text and 0 <= float(text) < 1
    except ValueError:
        return False
