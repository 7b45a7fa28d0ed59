"""ThinK: key channels that the prompt's last queries hardly use are not stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt

from kvsim.compression.codec import Reduced, ReductionCodec
from kvsim.compression.reduction.base import Reduction
from kvsim.errors import InvalidSpec
from kvsim.ops import Component, OpCall, gather_channels, score_channels
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.tensors import FloatArray, IntArray, KvTensors, LayerKv

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class ThinK(Reduction):
    """Query-driven pruning of key channels, per head and sequence (arXiv 2407.21018).

    At the end of the prompt a channel's score is the mean square of the last ``window_size`` queries times that of all
    keys: what dropping it costs in the Frobenius norm of QK^T, channel by channel. The lowest
    ``floor(ratio x head_dim)`` are dropped; a mask of head_dim bits per head says which. Values stay whole.

    kvpress's ThinKPress has the same scores and defaults, but sets the channels to zero and frees no memory. In the
    paper keys of generated tokens stay whole; here the mask holds for them too, so a load that mostly generates is
    priced too low.
    """

    names: ClassVar = {"think": {}}
    summaries: ClassVar = {
        "think": "40 % of each head's key channels left out, scored by the last 32 queries; ThinK, arXiv 2407.21018"
    }
    inline_fields: ClassVar = ("key_channel_compression_ratio",)
    family: ClassVar = "channel pruning"
    masked_in: ClassVar = "NVIDIA/kvpress, kvpress/presses/think_press.py (zeroes channels)"

    kind: Literal["think"] = "think"
    key_channel_compression_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Share of key channels removed (kvpress's name)."""
    window_size: PositiveInt = 32
    """Last queries of the prompt, which score."""

    def kept_channels(self, head_dim: int) -> int:
        """Key channels stored per head."""
        return head_dim - int(head_dim * self.key_channel_compression_ratio)

    @property
    def depends_on_prompt(self) -> bool:
        return True

    def reduced_group(self, group: LayerGroup) -> LayerGroup:
        if group.kv_elements_per_token == 0:
            return group
        return group.model_copy(update={"k_head_dim": self.kept_channels(group.k_head_dim)})

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        return group.num_kv_heads * group.k_head_dim / 8 if group.kv_elements_per_token else 0.0

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        return (self._gather("gather_key_channels", group.num_kv_heads, group, model),)

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.num_kv_heads == 0:
            return ()
        return (self._gather("gather_query_channels", model.num_attention_heads, group, model),)

    def _gather(self, name: str, rows: int, group: LayerGroup, model: ModelSpec) -> OpCall:
        kept = self.kept_channels(group.k_head_dim)
        work = gather_channels(rows, group.k_head_dim, kept, DTYPE_BITS[model.dtype] / 8)
        return OpCall(name, work, Component.COMPRESSION)

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        work = score_channels(
            prompt_tokens, self.window_size, model.num_attention_heads, group.num_kv_heads, group.k_head_dim,
            DTYPE_BITS[model.dtype] / 8,
        )  # fmt: skip
        return (OpCall("score_channels", work, Component.COMPRESSION),)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """``think:0.5`` is a key_channel_compression_ratio."""
        return {"key_channel_compression_ratio": text}

    def inline_text(self) -> str | None:
        return str(self.key_channel_compression_ratio)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.is_latent for group in model.kv_groups):
            return f"think prunes the key channels of each KV head, but {model.name} keeps one latent for all (MLA)"
        return None

    def codec(self) -> ReductionCodec:
        return _ThinKCodec(self)


class _ThinKCodec(ReductionCodec):
    def __init__(self, method: ThinK) -> None:
        self._method = method

    def reduce(self, kv: KvTensors) -> Reduced:
        """Drop the channels of each layer that its own prompt's queries need least."""
        kept = tuple(self._kept(layer) for layer in kv.layers)
        layers = tuple(
            replace(layer, keys=np.take_along_axis(layer.keys, rows, axis=2))
            for layer, rows in zip(kv.without_queries().layers, kept, strict=True)
        )

        def restore(stored: KvTensors) -> KvTensors:
            widened = (
                replace(layer, keys=_scatter(narrow.keys, rows, layer.keys.shape), values=narrow.values)
                for layer, narrow, rows in zip(kv.layers, stored.layers, kept, strict=True)
            )
            return replace(kv, layers=tuple(widened))

        mask_bits = tuple(float(layer.num_kv_heads * layer.keys.shape[2]) for layer in kv.layers)
        # Pairs of channels that RoPE turned together are torn apart, so it cannot be undone any more.
        return Reduced(replace(kv, layers=layers, rope=None), restore, mask_bits)

    def _kept(self, layer: LayerKv) -> IntArray:
        """Indices of the channels to store, (H, 1, kept) ascending."""
        scores = channel_scores(layer, self._method.window_size)
        count = self._method.kept_channels(scores.shape[1])
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        return np.sort(best, axis=1)[:, None, :]


def channel_scores(layer: LayerKv, window_size: int) -> FloatArray:
    """Mean square of queries times mean square of keys, per KV head and channel, (H, D).

    Raises
    ------
    InvalidSpec
        The cache has no prompt queries.
    """
    queries = layer.prompt_queries[:, -window_size:].astype(np.float64)
    if queries.size == 0:
        msg = "think scores channels with the prompt's last queries, and the KV tensors have no prompt_queries"
        raise InvalidSpec(msg)
    heads, dim = layer.num_kv_heads, layer.keys.shape[2]
    of_queries = (queries**2).mean(axis=1).reshape(heads, -1, dim).mean(axis=1)
    of_keys = (layer.keys.astype(np.float64) ** 2).sum(axis=1) / max(1, layer.num_tokens)
    scores: FloatArray = (of_queries * of_keys).astype(np.float32)
    return scores


def _scatter(narrow: FloatArray, rows: IntArray, shape: tuple[int, ...]) -> FloatArray:
    full = np.zeros(shape, dtype=np.float32)
    np.put_along_axis(full, np.broadcast_to(rows, narrow.shape), narrow, axis=2)
    return full
