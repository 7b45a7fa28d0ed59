"""R-KV: important and not redundant, every 128 decoded tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from kvsim.compression.base import LayerView
from kvsim.compression.selection.cuts import CutScoredSelection
from kvsim.compression.selection.full_attention import kv_heads
from kvsim.compression.selection.prompt_attention import known_prompt_queries, neighbourhoods
from kvsim.compression.selection.window_scored import WindowScoredSelection
from kvsim.numerics.softmax import softmax
from kvsim.ops import Work, joint_scores, key_similarity
from kvsim.specs.base import DTYPE_BITS

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import FloatArray, KvTensors, LayerKv

DEFAULT_BUDGET_TOKENS = 1024
"""A budget that the authors' README reports on (lossless on MATH-500 with R1-Llama-8B)."""
_ROWS = 512
"""Keys whose similarities are held at a time."""


class RKV(CutScoredSelection, WindowScoredSelection):
    """Z = mix_lambda · importance - (1 - mix_lambda) · redundancy (arXiv 2505.24133; rules of the authors' code).

    Importance: softmax over older tokens of the largest logit among the heads of a group, meaned over the last
    ``window_size`` queries, largest of ``kernel_size`` neighbours. Redundancy: softmax of a key's mean cosine with all
    others, where no key counts the latest one that resembles it. The window itself stays.

    The released code cuts while decoding only. Ours: a prompt above the budget is cut when it ends, so that a sequence
    taken up again after a preemption is cut as it was; ``prefill_decoding(prefilling=keep_all,decoding=rkv)`` leaves
    the prompt to the first cut. Where a key resembles no other, the released code spares the first key; ours none.
    """

    names: ClassVar = {"rkv": {"budget_tokens": DEFAULT_BUDGET_TOKENS}}
    aliases: ClassVar = {"r_kv": "rkv"}
    summaries: ClassVar = {
        "rkv": "1,024 tokens unless set, cut back every 128 decoded ones, neither unread nor alike; R-KV, "
        "arXiv 2505.24133"
    }

    kind: Literal["rkv"] = "rkv"
    window_size: PositiveInt = 8
    """Observation tokens: the newest queries, which score, and whose tokens stay."""
    kernel_size: PositiveInt = 7
    """Neighbouring tokens of whose importance the largest counts."""
    mix_lambda: Annotated[float, Field(ge=0, le=1)] = 0.1
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] = 0.5
    """Cosine above which two keys are alike."""

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.budget_tokens is not None and self.budget_tokens <= self.window_size:
            msg = f"budget_tokens {self.budget_tokens} must be more than window_size {self.window_size}, which is kept"
            raise ValueError(msg)
        return self

    def scores(self, kv: KvTensors, layer: LayerView) -> FloatArray:
        layer_kv = kv.layers[layer.index]
        found = np.full(layer_kv.keys.shape[:2], np.inf, dtype=np.float32)
        older = layer_kv.num_tokens - self.least_tokens(layer_kv.num_tokens)
        if older:
            importance = self._importance(layer_kv, kv.attention_scale, older)
            redundancy = softmax(mean_similarity(layer_kv.keys, self.similarity_threshold).astype(np.float64))
            found[:, :older] = self.mix_lambda * importance - (1.0 - self.mix_lambda) * redundancy[:, :older]
        return found

    def _importance(self, layer_kv: LayerKv, attention_scale: float, older: int) -> FloatArray:
        queries = known_prompt_queries(layer_kv)[:, -self.window_size :]
        heads, _, dim = layer_kv.keys.shape
        grouped = queries.reshape(heads, -1, queries.shape[1], dim).astype(np.float64)
        logits = attention_scale * np.einsum("hgqd,hnd->hgqn", grouped, layer_kv.keys[:, :older].astype(np.float64))
        weights = softmax(logits.max(axis=1)).mean(axis=1)
        pooled: FloatArray = neighbourhoods(weights, self.kernel_size).max(axis=2)
        return pooled

    def score_works(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Mapping[str, Work]:
        group, heads = layer.group, kv_heads(layer.group)
        element_bytes = DTYPE_BITS[model.dtype] / 8
        return {
            **super().score_works(prompt_tokens, layer, model),
            "key_similarity": key_similarity(prompt_tokens, heads, group.k_head_dim, element_bytes),
            "joint_scores": joint_scores(prompt_tokens, heads),
        }


def mean_similarity(keys: FloatArray, threshold: float) -> FloatArray:
    """Mean over all keys of the cosine with each key, (H, n); a key's own and the latest above ``threshold`` count 0.

    So of keys that are alike the latest one looks least redundant.
    """
    heads, count, _ = keys.shape
    unit = keys / (np.linalg.norm(keys, axis=2, keepdims=True) + 1e-8)
    total = np.zeros((heads, count))
    columns = np.arange(count)
    for start in range(0, count, _ROWS):
        cosines = unit[:, start : start + _ROWS] @ unit.transpose(0, 2, 1)
        rows = np.arange(cosines.shape[1])
        alike = cosines > threshold
        alike[:, rows, start + rows] = False
        cosines[:, rows, start + rows] = 0.0
        latest = np.where(alike, columns, -1).max(axis=2, keepdims=True)
        cosines[columns == latest] = 0.0
        total += cosines.sum(axis=1)
    mean: FloatArray = (total / count).astype(np.float32)
    return mean
