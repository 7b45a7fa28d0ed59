"""KeyDiff: keys unlike the others are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final, Literal

import numpy as np

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.scored import KeyScoredSelection
from kvsim.ops import Work, score_key_directions
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.tensors import FloatArray, KvTensors

_SHORTEST: Final = 1e-12
"""What a length is taken to be at least, so that a key of zeros has a direction (kvpress)."""


class KeyDiff(KeyScoredSelection):
    """Keep the keys that point away from the mean direction, -cos(k, mean of k/‖k‖) (arXiv 2504.15364).

    kvpress's form: the mean is that of the normalised keys, the prompt is compressed once and at the end. The paper
    compresses block by block, so that prefill too is bounded; that form is not modelled.
    """

    names: ClassVar = {"keydiff": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"key_diff": "keydiff"}
    summaries: ClassVar = {
        "keydiff": "half of the prompt removed unless set, keys most like the mean key first; KeyDiff, arXiv 2504.15364"
    }

    kind: Literal["keydiff"] = "keydiff"

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        keys = kv.layers[layer.index].keys
        directions = keys / np.maximum(np.linalg.norm(keys, axis=2, keepdims=True), _SHORTEST)
        anchor = directions.mean(axis=1, keepdims=True)
        anchor /= np.maximum(np.linalg.norm(anchor, axis=2, keepdims=True), _SHORTEST)
        cosines: FloatArray = (directions * anchor).sum(axis=2)
        return -cosines

    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        return {
            "score_key_directions": score_key_directions(
                prompt_tokens, kv_heads(group), group.k_head_dim, element_bytes
            )
        }
