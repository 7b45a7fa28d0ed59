"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

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
    ``streaming_llm:2048`` means 2,048 tokens in all, sinks included.
    """

    names: ClassVar = {"streaming_llm": {"window_length": DEFAULT_BUDGET_TOKENS - DEFAULT_SINK_TOKENS}}
    aliases: ClassVar = {"streamingllm": "streaming_llm"}
    summaries: ClassVar = {
        "streaming_llm": "4 sinks and a window, 2,048 tokens in all unless set; StreamingLLM, arXiv 2309.17453"
    }
    inline_fields: ClassVar = ("window_length",)

    family: ClassVar = "eviction"

    kind: Literal["streaming_llm"] = "streaming_llm"
    num_sink_tokens: NonNegativeInt = DEFAULT_SINK_TOKENS
    window_length: PositiveInt

    @property
    def budget_tokens(self) -> int:
        """Most tokens ever held in one layer."""
        return self.num_sink_tokens + self.window_length

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens, self.budget_tokens)

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.resident_tokens(prompt_tokens, layer)

    def prefill_resident_tokens(self, processed_tokens: int, layer: LayerView) -> int:
        return min(processed_tokens, self.budget_tokens)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        layer_kv = kv.layers[layer.index]
        tokens = layer_kv.num_tokens
        if tokens <= self.budget_tokens:
            return None
        kept = np.concatenate((np.arange(self.num_sink_tokens), np.arange(tokens - self.window_length, tokens)))
        return np.broadcast_to(kept, (layer_kv.num_kv_heads, self.budget_tokens)).copy()

    @property
    def evicts(self) -> bool:
        return True

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        if "num_sink_tokens" in given:
            msg = "streaming_llm: num_sink_tokens needs window_length by name beside it, not a value after ':'"
            raise InvalidSpec(msg)
        budget_tokens = whole_tokens("streaming_llm", text)
        if budget_tokens <= DEFAULT_SINK_TOKENS:
            msg = (
                f"'streaming_llm:{text}' leaves no window beside {DEFAULT_SINK_TOKENS} sink tokens; "
                f"use {DEFAULT_SINK_TOKENS + 1} or more"
            )
            raise InvalidSpec(msg)
        return {"window_length": budget_tokens - DEFAULT_SINK_TOKENS}

    def inline_text(self) -> str | None:
        return str(self.budget_tokens) if self.num_sink_tokens == DEFAULT_SINK_TOKENS else None
