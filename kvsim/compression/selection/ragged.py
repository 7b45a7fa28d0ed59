"""What selections share whose heads keep different numbers of tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import BudgetedSelection, FullAttentionSelection
from kvsim.compression.selector import Selector, layer_view
from kvsim.errors import NotRunnable

if TYPE_CHECKING:
    from kvsim.tensors import BoolArray, IntArray, KvTensors


class HeadwiseSelection(FullAttentionSelection):
    """A selection whose KV heads keep different numbers of tokens.

    Memory is freed only where each head has pages of its own, and an attention kernel that follows them
    (kernels/decode_attention/ragged_heads). Some public code masks instead (``masked_in``): everything stays and is
    read.
    """

    masked: bool = False
    """Mask tokens instead of freeing them, as kvpress does: the quality of the method without its savings."""

    @property
    def granularity(self) -> str:
        return "ragged"

    @property
    def masks(self) -> bool:
        return self.masked

    def fullest_rank(self, ranks: int) -> float:
        """Most that one of ``ranks`` tensor-parallel ranks can hold in a layer, over the mean of all.

        One rank may hold all that is kept, unless that is more than there is.
        """
        removed = self.removed_share
        return float(ranks) if removed is None or removed == 1 else min(float(ranks), 1 / (1 - removed))

    @property
    @abstractmethod
    def removed_share(self) -> float | None:
        """Largest share of its tokens that a layer loses on average; None where that depends on the prompt's length."""

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        raise NotRunnable(self.kind, "its heads keep different numbers of tokens")

    @abstractmethod
    def selector(self) -> Selector:
        """Give the algorithm."""


class RaggedSelection(HeadwiseSelection, BudgetedSelection):
    """A budget per layer that its KV heads share unequally, once after the prompt; generated tokens all stay."""

    @property
    def evicts(self) -> bool:
        return not self.masked and self.compression_ratio != 0.0

    @property
    def removed_share(self) -> float | None:
        return self.compression_ratio

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        """Tokens of the prompt kept in ``layer``, averaged over its heads."""
        return self.budget(prompt_tokens)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens if self.masked else self.kept_tokens(prompt_tokens, layer))

    @abstractmethod
    def keep_mask(self, kv: KvTensors, layer: LayerView) -> BoolArray:
        """Choose the tokens of a prompt that stay, (H, n): `kept_tokens` per head on average, at least one each."""

    def keep_masks(self, kv: KvTensors) -> list[BoolArray]:
        """Choose in all layers; another way than layer by layer where one budget is shared out over them."""
        return [self.keep_mask(kv, layer_view(kv, index)) for index in range(kv.num_layers)]

    def selector(self) -> Selector:
        """Give the algorithm."""
        return KeepRagged(self)


class KeepRagged(Selector):
    """Asks a selection which tokens stay in which head."""

    def __init__(self, selection: RaggedSelection) -> None:
        self.selection = selection

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays, or hide the rest."""
        return keep_where(kv, self.selection.keep_masks(kv), masked=self.selection.masked)


def keep_where(kv: KvTensors, kept: list[BoolArray], *, masked: bool) -> KvTensors:
    """Take the tokens of ``kept``, (H, n) per layer, or hide the others."""
    layers = (
        layer.hidden_where(~mask) if masked else layer.take_ragged(mask)
        for layer, mask in zip(kv.layers, kept, strict=True)
    )
    return replace(kv, layers=tuple(layers))
