"""From the small model's prompts to KV tensors, and from what a strategy gives back to logits of the answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selector import layer_view
from kvsim.quality.small_model.architecture import PastKv, Shape, SmallTransformer
from kvsim.quality.small_model.signals import by_cache, take_signals
from kvsim.quality.small_model.tasks import TaskBatch
from kvsim.quality.store import StoredCache
from kvsim.tensors import FloatArray, KvTensors, LayerKv, PromptSignals, Rope, SignalName

_Element = TypeVar("_Element", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of one layout after prefill, uncompressed.

    Attributes
    ----------
    batch : TaskBatch
    sees_question : bool
        Whether the first question belongs to what is compressed.
    prompt_tokens : int
        Tokens in the cache.
    start : int
        First token that is read with the cache. Where the answer begins right after the prompt, the prompt's last
        token is read once more, as engines do on a full prefix-cache hit, and its cache entry is hidden: otherwise
        the first token of the answer would come from the uncompressed prefill.
    keys, values, queries : tuple of (B, heads, n, D) in bf16
        Per cache; queries are of all layers that read it, grouped by KV head.
    raw_keys : tuple of (B, H, 1, D) or None
        What the first token read smears its key with: one vector per sequence and layer, held uncompressed.
    signals : tuple of PromptSignals
        Per sequence, where a method has asked for some; else empty.
    """

    batch: TaskBatch
    sees_question: bool
    prompt_tokens: int
    start: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    raw_keys: tuple[Tensor | None, ...]
    shape: Shape
    signals: tuple[PromptSignals, ...] = ()

    @property
    def count(self) -> int:
        """Sequences."""
        return len(self.batch.tokens)

    def sequence(self, row: int, *, later_queries: Sequence[Tensor] = ()) -> KvTensors:
        """One sequence's cache; without ``later_queries`` no method can look at what comes after the prompt."""
        layers = []
        for index, keys in enumerate(self.keys):
            asked = _numpy(self.queries[index][row])
            none = asked[:, :0]
            layers.append(
                LayerKv(
                    keys=_numpy(keys[row]),
                    values=_numpy(self.values[index][row]),
                    positions=np.tile(np.arange(self.prompt_tokens), (keys.shape[1], 1)),
                    queries=_numpy(later_queries[index][row]) if later_queries else none,
                    prompt_queries=asked,
                )
            )
        dim = self.shape.head_dim
        source = f"small model {self.shape.architecture}, {self.batch.task}"
        signals = self.signals[row] if self.signals else PromptSignals()
        return KvTensors(tuple(layers), Rope.plain(dim, self.shape.rope_theta), dim**-0.5, source, signals=signals)

    def uncompressed(self) -> tuple[PastKv, ...]:
        """All caches as they are."""
        return tuple(
            PastKv(keys.float(), values.float(), self._not_read_again(keys), raw)
            for keys, values, raw in zip(self.keys, self.values, self.raw_keys, strict=True)
        )

    def _not_read_again(self, keys: Tensor) -> Tensor:
        return (torch.arange(self.prompt_tokens) < self.start).expand(keys.shape[:3])


@torch.no_grad()  # type: ignore[untyped-decorator]
def prefill(model: SmallTransformer, batch: TaskBatch, *, sees_question: bool = False) -> Prompts:
    """Read the prompts of a batch."""
    first = batch.questions[0]
    prompt_tokens = first.answer if sees_question else batch.context_tokens
    start = min(prompt_tokens, first.answer - 1)
    tokens = torch.from_numpy(batch.tokens[:, :prompt_tokens])
    found = model(tokens, round_kv=True)
    before = found if start == prompt_tokens else model(tokens[:, :start], round_kv=True)
    return Prompts(
        batch=batch,
        sees_question=sees_question,
        prompt_tokens=prompt_tokens,
        start=start,
        keys=tuple(new.keys.bfloat16() for new in found.caches),
        values=tuple(new.values.bfloat16() for new in found.caches),
        queries=tuple(queries.bfloat16() for queries in by_cache(found, model.shape)),
        raw_keys=tuple(new.last_raw_key for new in before.caches),
        shape=model.shape,
    )


def with_signals(model: SmallTransformer, prompts: Prompts, names: Collection[SignalName]) -> Prompts:
    """Give the prompts with the signals that a method asks for; none asked, none taken."""
    if not names:
        return prompts
    tokens = torch.from_numpy(prompts.batch.tokens[:, : prompts.prompt_tokens])
    return replace(prompts, signals=take_signals(model, tokens, names))


@torch.no_grad()  # type: ignore[untyped-decorator]
def answer(model: SmallTransformer, prompts: Prompts, past: Sequence[PastKv]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Read questions and answers with a cache; give logits of every token after ``prompts.start``, and queries."""
    tokens = torch.from_numpy(prompts.batch.tokens[:, prompts.start : -1])
    before = torch.from_numpy(prompts.batch.tokens[:, prompts.start - 1 : prompts.start])
    found = model(tokens, past, prompts.start, before, round_kv=True)
    return found.logits, by_cache(found, prompts.shape)


@torch.no_grad()  # type: ignore[untyped-decorator]
def calibration_caches(
    model: SmallTransformer, batches: Sequence[TaskBatch], signals: Collection[SignalName] = ()
) -> list[KvTensors]:
    """Whole caches with the queries that read them, for codecs that learn from samples."""
    samples = []
    for batch in batches:
        prompts = with_signals(model, prefill(model, batch), signals)
        _, later = answer(model, prompts, prompts.uncompressed())
        samples += [prompts.sequence(row, later_queries=later) for row in range(prompts.count)]
    return samples


def as_past(prompts: Prompts, stored: Sequence[StoredCache], selection: TokenSelection) -> tuple[PastKv, ...]:
    """Put what was read back, one StoredCache per sequence, where the model reads it."""
    past = []
    for index, raw in enumerate(prompts.raw_keys):
        stacked = stack_layers([cache.kv.layers[index] for cache in stored], prompts.start, raw)
        past.append(replace(stacked, read_mask=_reader(selection, stored, index, stacked.keys.shape[2])))
    return tuple(past)


def stack_layers(layers: Sequence[LayerKv], start: int, raw_key: Tensor | None) -> PastKv:
    """Put one layer of several sequences side by side for tokens from ``start`` on, which see no entry of later ones.

    ``raw_key`` is that of the token before, where keys are smeared.
    """
    width = max(layer.num_tokens for layer in layers)
    positions = torch.from_numpy(np.stack([_padded(layer.positions, width, -1) for layer in layers]))
    keys, values = (
        torch.from_numpy(np.stack([_padded(array, width, 0) for array in arrays]))
        for arrays in ([layer.keys for layer in layers], [layer.values for layer in layers])
    )
    visible = (positions >= 0) & (positions < start)
    return PastKv(keys, values, visible, raw_key, log_weights=_log_weights(layers, width))


def _log_weights(layers: Sequence[LayerKv], width: int) -> Tensor | None:
    """(B, H, n), or None where all entries weigh the same."""
    if all(layer.log_weights is None for layer in layers):
        return None
    rows = [np.zeros_like(layer.positions, dtype=np.float32) if layer.log_weights is None else layer.log_weights
            for layer in layers]  # fmt: skip
    return torch.from_numpy(np.stack([_padded(row, width, 0) for row in rows]))


def _reader(
    selection: TokenSelection, stored: Sequence[StoredCache], index: int, width: int
) -> Callable[[Tensor], Tensor] | None:
    """Let a selection that reads sparsely choose for the queries that really come."""
    selection = selection.at_layer(layer_view(stored[0].kv, index))
    if type(selection).read_mask is TokenSelection.read_mask:
        return None

    def read(queries: Tensor) -> Tensor:
        rows = []
        for row, cache in enumerate(stored):
            layer = replace(cache.kv.layers[index], queries=queries[row].numpy())
            mask = selection.read_mask(layer, layer_view(cache.kv, index))
            if mask is None:
                mask = np.ones((*queries.shape[1:3], layer.num_tokens), dtype=np.bool_)
            rows.append(_padded(mask.swapaxes(1, 2), width, 0).swapaxes(1, 2))
        return torch.from_numpy(np.stack(rows))

    return read


def _padded(array: NDArray[_Element], width: int, fill: int) -> NDArray[_Element]:
    """Fill axis 1 up to ``width``."""
    rest = width - array.shape[1]
    if not rest:
        return array
    return np.pad(array, [(0, 0), (0, rest)] + [(0, 0)] * (array.ndim - 2), constant_values=fill)


def _numpy(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.float().numpy()
    return array
