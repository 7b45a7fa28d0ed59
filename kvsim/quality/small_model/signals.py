"""What the small model's prefill knows of its tokens beside K, V and Q, taken down where a method asks for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from kvsim.quality.small_model.architecture import ForwardPass, Shape, SmallTransformer
from kvsim.quality.small_model.tasks import ASK
from kvsim.tensors import FloatArray, PromptSignals, SignalName
from kvsim.tensors.kv import ENTROPY_CANDIDATES

_Batched = dict[str, Any]
"""Fields of PromptSignals with a first axis of sequences."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def take_signals(model: SmallTransformer, tokens: Tensor, names: Collection[SignalName]) -> tuple[PromptSignals, ...]:
    """Read prompts, (B, n), once more and give the signals asked for, sequence by sequence."""
    found: _Batched = {}
    once = model(tokens, round_kv=True, keep_hidden=True)
    for name in names:
        found |= _TAKEN[name](model, tokens, once)
    return tuple(_row(found, row) for row in range(len(tokens)))


def by_cache(found: ForwardPass, shape: Shape) -> tuple[Tensor, ...]:
    """Queries of the layers that share a cache, so that those of one KV head stay together."""
    every = shape.layers_per_cache
    joined = []
    for index in range(shape.num_caches):
        layers = found.queries[index * every : (index + 1) * every]
        grouped = [queries.unflatten(1, (shape.num_kv_heads, -1)) for queries in layers]
        joined.append(torch.cat(grouped, dim=2).flatten(1, 2))
    return tuple(joined)


def _hidden(model: SmallTransformer, tokens: Tensor, once: ForwardPass) -> _Batched:
    """Give what the layers read that make K and V."""
    return {"hidden": tuple(_array(read) for read in once.read[:: model.shape.layers_per_cache])}


def _second_reading(model: SmallTransformer, tokens: Tensor, once: ForwardPass) -> _Batched:
    """Let the model read each prompt again right after itself.

    The first token, which opens every sequence, is replaced by the mark that opens a question: the model was never
    asked to repeat in words.
    """
    count = tokens.shape[1]
    again = torch.cat((torch.full_like(tokens[:, :1], ASK), tokens[:, 1:]), dim=1)
    both = model(torch.cat((tokens, again), dim=1), round_kv=True)
    return {
        "repeat_queries": tuple(_array(queries[:, :, count:]) for queries in by_cache(both, model.shape)),
        "repeat_keys": tuple(_array(new.keys[:, :, count:]) for new in both.caches),
    }


def _entropy(model: SmallTransformer, tokens: Tensor, once: ForwardPass) -> _Batched:
    return {"entropy": next_token_entropy(once.logits)}


def _distance(model: SmallTransformer, tokens: Tensor, once: ForwardPass) -> _Batched:
    return {"distance": layer_distance(once, model.shape)}


def next_token_entropy(logits: Tensor) -> FloatArray:
    """Entropy in nats over the likeliest 256 tokens, (B, T) of logits (B, T, vocabulary)."""
    likeliest = logits.topk(min(ENTROPY_CANDIDATES, logits.shape[-1]), dim=-1).values.log_softmax(dim=-1)
    entropy: FloatArray = -(likeliest.exp() * likeliest).sum(dim=-1).numpy()
    return entropy


def layer_distance(found: ForwardPass, shape: Shape) -> FloatArray:
    """Cosine distance from the last layer's output, (B, caches, T), of the output of each layer that makes K and V."""
    own = torch.stack(found.written[:: shape.layers_per_cache], dim=1)
    distance: FloatArray = (1 - torch.cosine_similarity(own, found.written[-1][:, None], dim=-1)).numpy()
    return distance


_TAKEN: Final[Mapping[SignalName, Callable[[SmallTransformer, Tensor, ForwardPass], _Batched]]] = {
    "hidden": _hidden,
    "repeat_queries": _second_reading,
    "entropy": _entropy,
    "distance": _distance,
}


def _row(found: _Batched, row: int) -> PromptSignals:
    """One sequence's signals: arrays per layer, or one array."""
    fields: dict[str, Any] = {
        name: tuple(part[row] for part in value) if isinstance(value, tuple) else value[row]
        for name, value in found.items()
    }
    return PromptSignals(**fields)


def _array(tensor: Tensor) -> FloatArray:
    """Round as K, V and Q are."""
    array: FloatArray = tensor.bfloat16().float().numpy()
    return array
