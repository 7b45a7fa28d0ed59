"""What selections share whose heads keep different numbers of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import BudgetedSelection
from kvsim.compression.selector import Selector, layer_view
from kvsim.errors import NotRunnable

if TYPE_CHECKING:
    from kvsim.tensors import BoolArray, IntArray, KvTensors, LayerKv


class RaggedSelection(BudgetedSelection):
    """A budget per layer that its KV heads share unequally.

    Memory is freed only where each head has pages of its own, and an attention kernel that follows them
    (kernels/decode_attention/ragged_heads). Public code masks instead: everything stays and is read.
    """

    masked: bool = False
    """Mask tokens instead of freeing them, as kvpress does: the quality of the method without its savings."""

    @property
    def granularity(self) -> str:
        return "ragged"

    @property
    def masks(self) -> bool:
        return self.masked

    @property
    def evicts(self) -> bool:
        return not self.masked and self.compression_ratio != 0.0

    def kept_tokens(self, prompt_tokens: int, layer: LayerView) -> int:
        """Tokens of the prompt kept in ``layer``, averaged over its heads."""
        return self.budget(prompt_tokens)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens if self.masked else self.kept_tokens(prompt_tokens, layer))

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.resident_tokens(prompt_tokens, layer)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        raise NotRunnable(self.kind, "its heads keep different numbers of tokens")

    @abstractmethod
    def keep_mask(self, kv: KvTensors, layer: LayerView) -> BoolArray:
        """Choose the tokens of a prompt that stay, (H, n): `kept_tokens` per head on average, at least one each."""

    def selector(self) -> Selector:
        """Give the algorithm."""
        return KeepRagged(self)


class KeepRagged(Selector):
    """Asks a selection, layer by layer, which tokens stay in which head."""

    def __init__(self, selection: RaggedSelection) -> None:
        self.selection = selection

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays, or hide the rest."""
        return replace(kv, layers=self.select_layers(kv, range(kv.num_layers)))

    def select_layers(self, kv: KvTensors, indices: Sequence[int]) -> tuple[LayerKv, ...]:
        """Ask for these layers only."""
        layers = []
        for index in indices:
            kept, layer = self.selection.keep_mask(kv, layer_view(kv, index)), kv.layers[index]
            layers.append(layer.hidden_where(~kept) if self.selection.masked else layer.take_ragged(kept))
        return tuple(layers)
