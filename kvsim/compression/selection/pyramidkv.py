"""PyramidKV: SnapKV's scores, more tokens in the first layers than in the last."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO
from kvsim.compression.selection.window_scored import WindowScoredSelection


class PyramidKV(WindowScoredSelection):
    """Budgets fall linearly over the layers of a group around SnapKV's budget (arXiv 2406.02069).

    Beside the window, the last layer keeps 1/beta of the average and the first one what keeps the sum, at most the
    prompt. Rounding is symmetric, so the total equals SnapKV's to the token.
    """

    names: ClassVar = {"pyramidkv": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"pyramid_kv": "pyramidkv"}
    summaries: ClassVar = {
        "pyramidkv": "SnapKV's scores and total, budgets falling from layer to layer; PyramidKV, arXiv 2406.02069"
    }

    kind: Literal["pyramidkv"] = "pyramidkv"
    beta: Annotated[int, Field(ge=1)] = 20
    """The last layer keeps 1/beta of the average beside its window; 1 gives every layer the same."""

    def layer_band(self, layer: LayerView) -> int:
        return layer.index

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        average = self.average_tokens(prompt_tokens)
        layers = layer.group.layers
        scored = average - min(prompt_tokens, self.window_size)
        if len(layers) == 1 or scored == 0:
            return average
        widest = prompt_tokens - self.window_size - scored
        swing = min(scored - scored // self.beta, widest)
        # Layers i and L-1-i get opposite offsets, so the offsets of a group add up to zero.
        numerator = swing * (len(layers) - 1 - 2 * layers.index(layer.index))
        offset = (abs(numerator) + (len(layers) - 1) // 2) // (len(layers) - 1)
        return average + (offset if numerator > 0 else -offset)
