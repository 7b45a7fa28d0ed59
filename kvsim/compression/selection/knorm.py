"""Knorm: short keys are attended to most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from kvsim.compression.base import LayerView
from kvsim.compression.selection.full_attention import DEFAULT_COMPRESSION_RATIO, kv_heads
from kvsim.compression.selection.scored import KeyScoredSelection
from kvsim.ops import Work, score_keys
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.tensors import FloatArray, KvTensors


class Knorm(KeyScoredSelection):
    """Keep the keys of least Euclidean length, -‖k‖ (arXiv 2406.11430, in kvpress's form: in every layer, no window).

    Its authors' code can leave layers whole (``skip_layers``, such as 0 and 1); kvpress and this do not.
    """

    names: ClassVar = {"knorm": {"compression_ratio": DEFAULT_COMPRESSION_RATIO}}
    aliases: ClassVar = {"l2norm": "knorm", "l2_norm": "knorm"}
    summaries: ClassVar = {"knorm": "half of the prompt removed unless set, longest keys first; arXiv 2406.11430"}

    kind: Literal["knorm"] = "knorm"

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        lengths: FloatArray = np.linalg.norm(kv.layers[layer.index].keys, axis=2)
        return -lengths

    def key_works(self, prompt_tokens: int, group: LayerGroup, element_bytes: float) -> Mapping[str, Work]:
        return {"score_keys": score_keys(prompt_tokens, kv_heads(group), group.k_head_dim, element_bytes)}
