"""Random eviction: what any method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal
from zlib import crc32

import numpy as np
from pydantic import NonNegativeInt

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.scored import KeyScoredSelection
from kvsim.ops import Work, draw_scores
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.tensors import FloatArray, KvTensors


class RandomEviction(KeyScoredSelection):
    """Keep tokens drawn at random, head by head (kvpress's RandomPress).

    Drawn from ``seed`` and what the head's keys hold: the same cache always keeps the same tokens, other sequences,
    layers and heads keep others, and ``seed`` gives another draw of all. (kvpress draws from torch's generator.)
    """

    names: ClassVar = {"random": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    summaries: ClassVar = {
        "random": "half of the prompt removed unless set, tokens drawn at random: the baseline of eviction (kvpress)"
    }

    kind: Literal["random"] = "random"
    seed: NonNegativeInt = 0
    """Which draw."""

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        keys = kv.layers[layer.index].keys
        draws = (np.random.default_rng((self.seed, crc32(head.tobytes()))) for head in keys)
        return np.stack([draw.random(keys.shape[1], dtype=np.float32) for draw in draws])

    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        return {"draw_scores": draw_scores(prompt_tokens, kv_heads(group))}
