"""DuoAttention: some heads look far back and keep everything, the others keep sinks and what is recent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from kvsim.compression.base import HeadCurves, LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import kv_heads, native_token_bytes
from kvsim.compression.selection.ragged import HeadwiseSelection, keep_where
from kvsim.compression.selector import Selector
from kvsim.errors import InvalidSpec
from kvsim.numerics.positional_attention import early_attention
from kvsim.ops import Component, OpCall, compact
from kvsim.tensors import attend

if TYPE_CHECKING:
    from kvsim.specs.model import LayerGroup, ModelSpec
    from kvsim.tensors import BoolArray, FloatArray, KvTensors, LayerKv, Rope

PROFILE_TOKENS = 500
"""Positions over which a head is profiled (kvpress, ``duo_attention_on_the_fly``)."""


class DuoAttention(HeadwiseSelection):
    """Retrieval heads keep all tokens; streaming heads the first and the newest, in decode too (arXiv 2410.10819).

    The paper trains a gate per head on synthetic passkeys. Here heads are ranked on calibration sequences, by kvpress's
    quick profile (``on_the_fly_scoring``) or by one of ours, nearer to the paper's aim. As in kvpress, the prompt
    is compressed once it is processed; the authors' own code bounds streaming heads while it is processed as well.
    """

    names: ClassVar = {"duo_attention": {}}
    aliases: ClassVar = {"duoattention": "duo_attention"}
    summaries: ClassVar = {
        "duo_attention": "half of the heads, unless set, keep 128 sinks and 256 recent; DuoAttention, arXiv 2410.10819"
    }
    inline_fields: ClassVar = ("head_compression_ratio",)
    family: ClassVar = "eviction"
    masked_in: ClassVar = "NVIDIA/kvpress, kvpress/presses/duo_attention_press.py and attention_patch.py"
    freed_in: ClassVar = "mit-han-lab/duo-attention (a cache of its own for streaming heads)"

    kind: Literal["duo_attention"] = "duo_attention"
    head_compression_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the KV heads that stream (kvpress's name); the rest are retrieval heads."""
    sink_size: NonNegativeInt = 128
    """First tokens that a streaming head keeps (kvpress on the fly: 128; DuoAttention's README: 64)."""
    recent_size: PositiveInt = 256
    """Newest tokens that a streaming head keeps."""
    profile: Literal["mean_attention", "output_change"] = "mean_attention"
    """What ranks heads: kvpress's profile, or (ours) how much their output changes if they stream."""

    @property
    def evicts(self) -> bool:
        return not self.masked and self.head_compression_ratio > 0

    @property
    def removed_share(self) -> float | None:
        return self.head_compression_ratio

    @property
    def streaming_tokens(self) -> int:
        """Most tokens that a streaming head holds."""
        return self.sink_size + self.recent_size

    def streaming_heads(self, heads: int) -> int:
        """How many of a model's KV heads stream."""
        return round(heads * self.head_compression_ratio)

    def streaming_share(self, group: LayerGroup) -> float:
        """Share of a layer's KV heads that stream, averaged over the layers of its group; which ones is profiled."""
        heads = group.num_kv_heads * len(group.layers)
        return self.streaming_heads(heads) / heads

    def head_curves(self, prompt_tokens: int, layer: LayerView) -> tuple[HeadCurves, ...]:
        whole, bounded = growing(prompt_tokens), growing(prompt_tokens, self.streaming_tokens)
        share = 0.0 if self.masked else self.streaming_share(layer.group)
        kinds = ((1 - share, whole), (share, bounded))
        return tuple(HeadCurves(part, curve, curve) for part, curve in kinds if part > 0)

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return self.head_curves(prompt_tokens, layer)[0].resident

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        group = layer.group
        if kv_heads(group) == 0 or self.masked or prompt_tokens <= self.streaming_tokens:
            return ()
        moved = self.streaming_share(group) * self.streaming_tokens
        work = compact(moved, native_token_bytes(group, model))
        return (OpCall("compact_kv", work, Component.COMPRESSION),) if moved else ()

    def selector(self) -> Selector:
        """Give the algorithm, which must be fitted unless no head streams."""
        return StreamingHeads(self)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """``duo_attention:0.5`` is a head_compression_ratio."""
        return {"head_compression_ratio": text}

    def inline_text(self) -> str | None:
        return str(self.head_compression_ratio)


class StreamingHeads(Selector):
    """Keeps everything in retrieval heads, sinks and recent tokens in streaming heads."""

    def __init__(self, selection: DuoAttention, is_streaming: BoolArray | None = None) -> None:
        self.selection = selection
        self.is_streaming = is_streaming
        """(L, H), once fitted."""
        self.needs_calibration = selection.head_compression_ratio > 0

    def fit(self, samples: Sequence[KvTensors]) -> Self:
        """Rank heads; of equal ones the earlier streams.

        Raises
        ------
        InvalidSpec
            There are no samples, or they lack what the profile looks at.
        """
        if not samples:
            msg = "duo_attention profiles heads on calibration sequences, and there are none"
            raise InvalidSpec(msg)
        scores = np.mean([self._scores(kv) for kv in samples], axis=0)
        is_streaming = np.zeros(scores.size, dtype=bool)
        is_streaming[np.argsort(scores, axis=None, kind="stable")[: self.selection.streaming_heads(scores.size)]] = True
        return type(self)(self.selection, is_streaming.reshape(scores.shape))

    def select(self, kv: KvTensors) -> KvTensors:
        """Take what stays, or hide the rest."""
        if not self.needs_calibration:
            return kv
        if self.is_streaming is None:
            msg = "duo_attention profiles heads on calibration sequences first, and has seen none"
            raise InvalidSpec(msg)
        kept = [
            self._is_near(layer) | ~streams[:, None]
            for layer, streams in zip(kv.layers, self.is_streaming, strict=True)
        ]
        return keep_where(kv, kept, masked=self.selection.masked)

    def _is_near(self, layer: LayerKv) -> BoolArray:
        """Tokens that a streaming head keeps, (n,)."""
        place = np.arange(layer.num_tokens)
        is_near: BoolArray = (place < self.selection.sink_size) | (
            place >= layer.num_tokens - self.selection.recent_size
        )
        return is_near

    def _scores(self, kv: KvTensors) -> FloatArray:
        if self.selection.profile == "mean_attention":
            return head_scores(kv)
        return np.stack([output_change(layer, kv.attention_scale, self._is_near(layer)) for layer in kv.layers])


def output_change(layer: LayerKv, attention_scale: float, is_near: BoolArray) -> FloatArray:
    """Relative squared change of each KV head's outputs if its queries see near tokens only, (H,).

    The queries are those that come after the prompt, which ask for what lies far back, as the paper's passkeys do.

    Raises
    ------
    InvalidSpec
        The cache has no such queries.
    """
    if layer.queries.size == 0:
        msg = "duo_attention's profile output_change runs the queries after the prompt, and the KV tensors have none"
        raise InvalidSpec(msg)
    whole = attend(layer, attention_scale).outputs.astype(np.float64)
    far = np.broadcast_to(~is_near, layer.keys.shape[:2])
    change = attend(layer.hidden_where(far), attention_scale).outputs - whole
    sums = [(one**2).reshape(layer.num_kv_heads, -1).sum(axis=1) for one in (change, whole)]
    relative: FloatArray = (sums[0] / np.maximum(sums[1], np.finfo(np.float64).tiny)).astype(np.float32)
    return relative


def head_scores(kv: KvTensors) -> FloatArray:
    """How early each KV head's attention lies by its mean query and key before RoPE, (L, H); low ones may stream.

    kvpress's profile, with the mean over the prompt queries that the cache has instead of over all.

    Raises
    ------
    InvalidSpec
        The cache has no RoPE or no prompt queries.
    """
    if kv.rope is None or any(layer.prompt_queries.size == 0 for layer in kv.layers):
        msg = "duo_attention profiles heads by RoPE and prompt_queries, and the KV tensors lack one of them"
        raise InvalidSpec(msg)
    return np.stack([_layer_scores(layer, kv.rope, kv.attention_scale) for layer in kv.layers])


def _layer_scores(layer: LayerKv, rope: Rope, attention_scale: float) -> FloatArray:
    asked = layer.prompt_queries.shape[1]
    asked_at = np.arange(layer.num_tokens - asked, layer.num_tokens)
    query = rope.undo(layer.prompt_queries, asked_at).mean(axis=1, keepdims=True)
    key = rope.undo(layer.keys, layer.positions).mean(axis=1, keepdims=True)
    places = np.arange(PROFILE_TOKENS)
    keys = rope.rotate(np.repeat(key, PROFILE_TOKENS, axis=1), places)
    queries = rope.rotate(query, places[-1:])[:, 0].reshape(layer.num_kv_heads, -1, query.shape[2])
    scores: FloatArray = early_attention(queries, keys[:, None], attention_scale).mean(axis=1)
    return scores
