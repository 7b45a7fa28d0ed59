"""What a Hugging Face model knows of a prompt beside K, V and Q, taken down where a method asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvsim.errors import InvalidSpec
from kvsim.quality.model_attention import attention_of
from kvsim.tensors import FloatArray, KvTensors, LayerKv
from kvsim.tensors.kv import ENTROPY_CANDIDATES, REPEAT_CHUNK

FIRST_REQUEST: Final = "\n\nRepeat the previous context exactly."
LATER_REQUEST: Final = "\n\nRepeat the part of the previous context exactly, starting with"
"""What KVzip asks a model before each chunk (arXiv 2505.23416); of a later chunk it also says how it begins."""
_LEAD_IN: Final = 8
"""Tokens before a later chunk that are quoted in the request."""


@dataclass(frozen=True)
class Requests:
    """Token ids of the two requests to read again; nothing, where a model was never taught to follow them."""

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()

    @staticmethod
    def encoded(tokenizer: Any) -> Requests:
        """As the model's tokenizer spells them."""
        first, later = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (FIRST_REQUEST, LATER_REQUEST)
        )
        return Requests(first, later)


@contextmanager
def hidden_states(model: Any, prompt: int) -> Iterator[list[FloatArray]]:
    """Take down what each attention block reads of the first ``prompt`` tokens, (n, width) per layer in order."""
    found: list[FloatArray] = []

    def note(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        read = named["hidden_states"] if "hidden_states" in named else given[0]
        found.append(_array(read[0, :prompt]))

    hooks = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in model.base_model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def layer_outputs(model: Any, prompt: int) -> Iterator[list[Any]]:
    """Take down what each layer puts out of the first ``prompt`` tokens, (n, width) tensors in order."""
    found: list[Any] = []

    def note(_module: Any, _given: Any, output: Any) -> None:
        written = output[0] if isinstance(output, tuple) else output
        found.append(written[0, :prompt].cpu())

    hooks = [layer.register_forward_hook(note) for layer in model.base_model.layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def distance_from_last(written: Sequence[Any]) -> FloatArray:
    """Cosine distance of each layer's output from the last layer's, (L, n); before the model's final norm."""
    from torch import cosine_similarity

    last = written[-1].float()
    return np.stack([_array(1 - cosine_similarity(one.float(), last, dim=-1)) for one in written])


def next_token_entropy(logits: Any) -> FloatArray:
    """Entropy in nats over the likeliest `ENTROPY_CANDIDATES` tokens, (n,) of logits (n, vocabulary)."""
    likeliest = logits.topk(min(ENTROPY_CANDIDATES, logits.shape[-1]), dim=-1).values.float().log_softmax(dim=-1)
    return _array(-(likeliest.exp() * likeliest).sum(dim=-1))


def second_reading(
    model: Any, token_ids: Sequence[int], kv: KvTensors, requests: Requests
) -> dict[str, tuple[FloatArray, ...]]:
    """Let the model read the cached prompt again after itself, `REPEAT_CHUNK` tokens at a time.

    Each chunk is read right after the prompt and the request to repeat it. Of the request nothing is recorded.

    Raises
    ------
    InvalidSpec
        The prompt, a request and a chunk are more than the model's context.
    """
    chunks = [token_ids[start : start + REPEAT_CHUNK] for start in range(0, len(token_ids), REPEAT_CHUNK)]
    reader = _SecondReader(kv)
    with attention_of(model, reader.attend):
        for index, chunk in enumerate(chunks):
            request = (*requests.later, *chunks[index - 1][-_LEAD_IN:]) if index else requests.first
            reader.recorded = len(chunk)
            _read(model, (*request, *chunk), len(token_ids))
    return {
        name: tuple(np.concatenate([read[index] for read in parts], axis=1) for index in range(kv.num_layers))
        for name, parts in (("repeat_queries", reader.queries), ("repeat_keys", reader.keys))
    }


def _read(model: Any, ids: Sequence[int], start: int) -> None:
    import torch

    limit = model.config.max_position_embeddings
    if start + len(ids) > limit:
        msg = (
            f"a second reading of {start} tokens takes {start + len(ids)} positions, more than the model's context of "
            f"{limit}; capture fewer tokens, or without repeat_queries"
        )
        raise InvalidSpec(msg)
    positions = torch.arange(start, start + len(ids), device=model.device)[None]
    with torch.no_grad():
        # The language model's head is not needed.
        model.base_model(torch.tensor([list(ids)], device=model.device), position_ids=positions, use_cache=False)


class _SecondReader:
    """Attention over a cached prompt, and causally over what is read after it; keeps the last queries and keys."""

    def __init__(self, kv: KvTensors) -> None:
        self.kv = kv
        self.recorded = 0
        self.queries: list[dict[int, FloatArray]] = []
        self.keys: list[dict[int, FloatArray]] = []

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any
    ) -> tuple[Any, None]:
        """Stand in for a function of transformers' attention interface; tensors are (1, heads, tokens, D)."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        if module.layer_idx == 0:
            self.queries.append({})
            self.keys.append({})
        self.queries[-1][module.layer_idx] = _array(query[0, :, -self.recorded :])
        self.keys[-1][module.layer_idx] = _array(key[0, :, -self.recorded :])
        layer: LayerKv = self.kv.layers[module.layer_idx]
        keys, values = (
            torch.cat((torch.from_numpy(old)[None].to(new), new), dim=2)
            for old, new in ((layer.keys, key), (layer.values, value))
        )
        held, new_tokens = layer.num_tokens, query.shape[2]
        seen = torch.ones(new_tokens, held + new_tokens, dtype=torch.bool, device=query.device).tril(held)
        output = scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None


def _array(tensor: Any) -> FloatArray:
    array: FloatArray = tensor.detach().float().cpu().numpy()
    return np.ascontiguousarray(array)
