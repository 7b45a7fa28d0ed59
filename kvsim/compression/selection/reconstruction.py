"""How much a model looks at each token when it reads its prompt again: KVzip's scores."""

from __future__ import annotations

import numpy as np

from kvsim.numerics.arrays import DoubleArray, FloatArray
from kvsim.numerics.softmax import log_sum_exp
from kvsim.tensors import KvTensors
from kvsim.tensors.kv import REPEAT_CHUNK

_ROWS = 128
"""Queries whose logits are held at a time."""


def reconstruction_scores(kv: KvTensors, index: int, method: str, sinks: int = 0) -> DoubleArray:
    """Log of the most attention that each token of a layer gets from any query of the second reading, (H, n).

    As in KVzip's code (snu-mllab/KVzip, attention/score.py): the queries of a chunk of `REPEAT_CHUNK` tokens see the
    first ``sinks`` tokens, that chunk of the prompt and the chunk as it is read again, up to themselves; the maximum is
    over these queries and over the query heads of a KV head. Keys of the request to repeat are left out here.

    Raises
    ------
    InvalidSpec
        The cache has no second reading; the message names ``method``.
    """
    kv.signals.check(method, ("repeat_queries",))
    asked, again = kv.signals.repeat_queries, kv.signals.repeat_keys
    assert asked is not None and again is not None  # noqa: S101, PT018  (checked above)
    keys = kv.layers[index].keys
    heads, tokens, dim = keys.shape
    scores = np.empty((heads, tokens))
    for start in range(0, tokens, REPEAT_CHUNK):
        chunk = slice(start, min(start + REPEAT_CHUNK, tokens))
        first = min(sinks, start)
        seen = np.concatenate((keys[:, :first], keys[:, chunk], again[index][:, chunk]), axis=1)
        queries = asked[index][:, chunk].reshape(heads, -1, chunk.stop - start, dim)
        for head in range(heads):
            scores[head, chunk] = _most_attention(queries[head], seen[head], first, kv.attention_scale)
    return scores


def _most_attention(queries: FloatArray, seen: FloatArray, first: int, scale: float) -> DoubleArray:
    """Log of the most attention on each token of a chunk; queries (group, c, D), keys (first + 2 c, D)."""
    count = queries.shape[1]
    best = np.full(count, -np.inf)
    for start in range(0, count, _ROWS):
        part = queries[:, start : start + _ROWS]
        rows = part.shape[1]
        # Of the second reading nothing behind this block's last query is seen.
        logits = (part * np.float32(scale)) @ seen[: first + count + start + rows].T
        logits[..., first + count + start :] += np.triu(np.full((rows, rows), -np.inf, dtype=np.float32), 1)
        of_chunk = logits[..., first : first + count] - log_sum_exp(logits)
        np.maximum(best, of_chunk.max(axis=(0, 1)), out=best)
    return best
