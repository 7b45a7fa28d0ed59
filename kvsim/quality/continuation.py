"""What the model says next with a stored cache in the place of its own: the risk that comes nearest to a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kvsim.compression import Compression
from kvsim.compression.selector import layer_view
from kvsim.quality.capture import Captured
from kvsim.quality.model_attention import attention_of
from kvsim.quality.run import ContinuationRisk
from kvsim.quality.store import StoredCache
from kvsim.tensors import BoolArray, FloatArray, LayerKv


def continue_with(model: Any, captured: Captured, compression: Compression, stored: StoredCache) -> ContinuationRisk:
    """Let the model read the continuation with the stored cache before it, and compare next-token distributions.

    The continuation's own K and V stay native. Where queries choose what they read (Quest), they choose anew.
    """
    found = _log_probabilities(model, captured, compression, stored)
    truth = captured.log_probabilities.astype(np.float64)
    divergence = (np.exp(truth) * (truth - found)).sum(axis=-1)
    same = truth.argmax(axis=-1) == found.argmax(axis=-1)
    # Rounding may leave a divergence of nothing a little below zero.
    return ContinuationRisk(tuple(np.maximum(0.0, divergence).tolist()), float(same.mean()))


def _log_probabilities(model: Any, captured: Captured, compression: Compression, stored: StoredCache) -> FloatArray:
    import torch

    start = captured.kv.layers[0].num_tokens
    ids = torch.tensor([list(captured.continuation)], device=model.device)
    positions = torch.arange(start, start + ids.shape[1], device=model.device)[None]
    reader = _Reader(compression, stored)
    with torch.no_grad(), attention_of(model, reader.attend):
        logits = model(ids, position_ids=positions, use_cache=False).logits[0]
    found: FloatArray = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
    return found


class _Reader:
    """Attention over a stored cache, and causally over new tokens."""

    def __init__(self, compression: Compression, stored: StoredCache) -> None:
        self.compression, self.stored = compression, stored

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any
    ) -> tuple[Any, None]:
        """Stand in for a function of transformers' attention interface; tensors are (1, heads, tokens, D)."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        layer = self.stored.kv.layers[module.layer_idx]
        keys, values = (
            torch.cat((torch.from_numpy(old)[None].to(new), new), dim=2)
            for old, new in ((layer.keys, key), (layer.values, value))
        )
        new_tokens = query.shape[2]
        causal = torch.ones(new_tokens, new_tokens, dtype=torch.bool, device=query.device).tril()
        old_tokens = torch.from_numpy(self._read(module.layer_idx, query)).to(query.device)
        seen = torch.cat((old_tokens, causal.expand(query.shape[1], -1, -1)), dim=2)
        mask = self._weighted(layer, seen)[None]
        output = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    @staticmethod
    def _weighted(layer: LayerKv, seen: Any) -> Any:
        """Turn what is seen, (Hq, m, kept + m), into what is added to logits; as it is where nothing has weights."""
        import torch

        if layer.log_weights is None:
            return seen
        added = torch.where(seen, 0.0, float("-inf"))
        weights = torch.from_numpy(np.repeat(layer.log_weights, len(seen) // layer.num_kv_heads, axis=0))
        added[..., : layer.num_tokens] += weights[:, None].to(added)
        return added

    def _read(self, index: int, query: Any) -> BoolArray:
        """Which stored tokens each query reads, (Hq, m, kept)."""
        layer = self.stored.kv.layers[index]
        shape = (query.shape[1], query.shape[2], layer.num_tokens)
        if self.stored.read_masks[index] is None:
            return np.ones(shape, dtype=bool)
        asked = replace(layer, queries=query[0].float().cpu().numpy())
        mask = self.compression.selection.read_mask(asked, layer_view(self.stored.kv, index))
        return np.ones(shape, dtype=bool) if mask is None else mask.reshape(shape)
