"""KVzap: guess from hidden states what KVzip would score, and drop what falls below a threshold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.delayed import DelayedEviction
from kvsim.compression.selection.full_attention import kv_heads
from kvsim.compression.selection.ragged import keep_where
from kvsim.compression.selection.reconstruction import reconstruction_scores
from kvsim.compression.selector import Selector
from kvsim.errors import InvalidSpec, NotRunnable
from kvsim.numerics.regression import AffineMap, ridge
from kvsim.ops import Component, OpCall, predict_scores
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.numerics.arrays import DoubleArray
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import BoolArray, KvTensors, SignalName

PUBLISHED_REMOVED: Final = (0.57, 0.75)
"""Shares removed at the paper's operating points: Qwen3-32B on LongBench, Qwen3-8B on AIME25 (arXiv 2601.07891)."""


class KVzap(DelayedEviction):
    """A linear map or small MLP per layer predicts log KVzip scores per head; a threshold decides (arXiv 2601.07891).

    Scored once, from what the layer's attention reads, and judged when it leaves the window, in prefill and in decode
    (kvpress: DMSPress over KVzapPress). Only the surrogate's FLOPs are charged; its weights, at most 1.1 % of the
    linear layers', are read with theirs and are left out, as is the window's buffer of scores.

    On tensors the linear map is fitted by ridge regression on other sequences (kvpress does so too, on 2 million
    tokens). Ours: targets are KVzip's scores, not KVzip+'s, which weigh by norms of the output projection that a cache
    does not hold; and without a ``threshold`` the one is taken that removes ``compression_ratio`` of the calibration
    tokens older than the window. What it removes of another sequence is another share.
    """

    names: ClassVar = {
        "kvzap": {"compression_ratio": 0.66, "surrogate": "mlp"},
        "kvzap_linear": {"compression_ratio": 0.66, "surrogate": "linear"},
    }
    summaries: ClassVar = {
        "kvzap": "an MLP guesses KVzip's scores, threshold behind a window of 128; KVzap, arXiv 2601.07891",
        "kvzap_linear": "a linear map guesses KVzip's scores, threshold behind a window; KVzap, arXiv 2601.07891",
    }
    masked_in: ClassVar = "NVIDIA/kvpress, kvpress/presses/dms_press.py and attention_patch.py"

    kind: Literal["kvzap"] = "kvzap"
    window_size: PositiveInt = 128
    """Newest tokens that always stay (kvpress's ``sliding_window_size``)."""
    surrogate: Literal["linear", "mlp"]
    """What predicts the scores."""
    mlp_width: PositiveInt = 512
    """Hidden units of the MLP (kvpress, kvzap/train.py)."""
    threshold: Annotated[float, Field(le=0)] | None = None
    """Predicted log of the most attention below which a token goes; None takes it from the calibration sequences."""

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        return frozenset({"hidden"})

    @property
    def fits_on_signals(self) -> frozenset[SignalName]:
        return frozenset({"hidden", "repeat_queries"})

    @property
    def expected_share(self) -> Prior | None:
        if not self.evicts:
            return None
        kept, (least, most) = 1 - self.compression_ratio, PUBLISHED_REMOVED
        source = f"{least:.0%} to {most:.0%} removed over the paper's models and tasks, arXiv 2601.07891"
        return Prior(value=kept, low=min(kept, 1 - most), high=max(kept, 1 - least), source=source)

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return (*self._scoring(prompt_tokens, layer, model), *super().prefill_ops(prompt_tokens, layer, model))

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return (*self._scoring(1, layer, model), *super().decode_ops(layer, model))

    def _scoring(self, tokens: int, layer: LayerView, model: ModelSpec) -> tuple[OpCall, ...]:
        heads = kv_heads(layer.group)
        if heads == 0 or self.compression_ratio == 0:
            return ()
        width = self.mlp_width if self.surrogate == "mlp" else None
        work = predict_scores(tokens, model.hidden_size, heads, width, DTYPE_BITS[model.dtype] / 8)
        return (OpCall("predict_scores", work, Component.COMPRESSION),)

    def selector(self) -> Selector:
        """Give the algorithm, which must be fitted; raise NotRunnable for the MLP."""
        if self.surrogate == "mlp":
            reason = "its MLP is trained on millions of tokens; kvzap_linear fits on the calibration sequences"
            raise NotRunnable(self.kind, reason)
        return KVzapSelector(self)


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What guesses scores: one map per layer, and the threshold."""

    maps: tuple[AffineMap, ...]
    threshold: float


class KVzapSelector(Selector):
    """Drops tokens behind the window whose predicted score is below the threshold."""

    def __init__(self, selection: KVzap, surrogate: Surrogate | None = None) -> None:
        self.selection = selection
        self.surrogate = surrogate
        self.needs_calibration = selection.compression_ratio > 0

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Regress KVzip's scores on hidden states, and choose the threshold unless it is given.

        Raises
        ------
        InvalidSpec
            There are no samples, or they lack hidden states or a second reading.
        """
        if not samples:
            msg = "kvzap learns to guess scores on calibration sequences, and there are none"
            raise InvalidSpec(msg)
        for sample in samples:
            sample.signals.check(self.selection.kind, ("hidden", "repeat_queries"))
        maps = tuple(self._fit_layer(samples, index) for index in range(samples[0].num_layers))
        threshold = self.selection.threshold
        if threshold is None:
            threshold = self._quantile(samples, maps)
        return type(self)(self.selection, Surrogate(maps, threshold))

    def _fit_layer(self, samples: Sequence[KvTensors], index: int) -> AffineMap:
        hidden = [sample.signals.hidden[index] for sample in samples if sample.signals.hidden is not None]
        scores = [reconstruction_scores(sample, index, self.selection.kind).T for sample in samples]
        return ridge(np.concatenate(hidden), np.concatenate(scores))

    def _quantile(self, samples: Sequence[KvTensors], maps: Sequence[AffineMap]) -> float:
        """The threshold that removes the ratio of calibration tokens older than the window, over layers and heads."""
        window = self.selection.window_size
        older = [guess[:, :-window].ravel() for sample in samples for guess in predicted_scores(sample, maps)]
        guesses = np.concatenate(older)
        return float(np.quantile(guesses, self.selection.compression_ratio)) if guesses.size else -np.inf

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays, or hide the rest."""
        if not self.needs_calibration:
            return kv
        kv.signals.check(self.selection.kind, ("hidden",))
        if self.surrogate is None:
            msg = "kvzap learns to guess scores on calibration sequences first, and has seen none"
            raise InvalidSpec(msg)
        kept = [self._kept(guess, self.surrogate.threshold) for guess in predicted_scores(kv, self.surrogate.maps)]
        return keep_where(kv, kept, masked=self.selection.masked)

    def _kept(self, guess: DoubleArray, threshold: float) -> BoolArray:
        kept: BoolArray = guess >= threshold
        kept[:, -self.selection.window_size :] = True
        return kept


def predicted_scores(kv: KvTensors, maps: Sequence[AffineMap]) -> list[DoubleArray]:
    """Guessed log scores of each layer's tokens, (H, n)."""
    return [affine(hidden).T for affine, hidden in zip(maps, kv.signals.hidden or (), strict=True)]
