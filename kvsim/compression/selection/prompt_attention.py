"""Attention that prompt queries give to the prompt's own tokens: what evicting methods rank by."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kvsim.errors import InvalidSpec
from kvsim.numerics.arrays import DoubleArray
from kvsim.numerics.softmax import softmax
from kvsim.tensors import FloatArray, IntArray, LayerKv

_CHUNK = 128
"""Queries whose weights are held at a time."""


def received_attention(layer_kv: LayerKv, attention_scale: float, window: int | None = None) -> FloatArray:
    """Sum over the last ``window`` prompt queries (None: all there are) of causal attention, (H, n).

    A query at position p sees tokens up to p. Query heads of a group are averaged.

    Raises
    ------
    InvalidSpec
        The cache has no prompt queries.
    """
    queries = known_prompt_queries(layer_kv)
    queries = queries if window is None else queries[:, -window:]
    heads, tokens, dim = layer_kv.keys.shape
    count = queries.shape[1]
    keys = layer_kv.keys.astype(np.float64)
    total = np.zeros((heads, tokens))
    for start in range(0, count, _CHUNK):
        part = queries[:, start : start + _CHUNK].reshape(heads, -1, min(_CHUNK, count - start), dim)
        logits = attention_scale * np.einsum("hgqd,hnd->hgqn", part.astype(np.float64), keys)
        last_seen = tokens - count + start + np.arange(part.shape[2])
        logits = np.where(np.arange(tokens) <= last_seen[:, None], logits, -np.inf)
        total += softmax(logits).sum(axis=2).mean(axis=1)
    return total.astype(np.float32)


def known_prompt_queries(layer_kv: LayerKv) -> FloatArray:
    """Queries of the prompt's last tokens, (Hq, w, D), no more than there are tokens.

    Raises
    ------
    InvalidSpec
        The cache has none.
    """
    if layer_kv.prompt_queries.size == 0:
        msg = "the method scores tokens with the prompt's queries, and the KV tensors have no prompt_queries"
        raise InvalidSpec(msg)
    return layer_kv.prompt_queries[:, -layer_kv.num_tokens :]


def neighbourhoods(scores: FloatArray | DoubleArray, kernel_size: int) -> FloatArray | DoubleArray:
    """Scores of each token's ``kernel_size`` neighbours, itself among them, (H, n, kernel_size); 0 beyond the ends."""
    before = kernel_size // 2
    padded = np.pad(scores, ((0, 0), (before, kernel_size - 1 - before)))
    return sliding_window_view(padded, kernel_size, axis=1)


def heaviest_and_newest(older_scores: FloatArray, heavy: int, newest: int) -> IntArray:
    """Indices of the ``heavy`` best tokens of those scored, (H, older), and of the ``newest`` after them, ascending.

    Of equal scores the earlier token stays.
    """
    heads, older = older_scores.shape
    best = np.argsort(-older_scores, axis=1, kind="stable")[:, :heavy]
    last = np.broadcast_to(np.arange(older, older + newest), (heads, newest))
    return np.concatenate((np.sort(best, axis=1), last), axis=1).astype(np.int64)
