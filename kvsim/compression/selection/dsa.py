"""DSA: an indexer chooses the latents that a step reads, as an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import PositiveInt

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selection.full_attention import whole_tokens
from kvsim.errors import NotRunnable
from kvsim.specs.model import LayerGroup, LayerKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvsim.compression.selector import Selector
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import BoolArray, IntArray, KvTensors, LayerKv


class Dsa(TokenSelection):
    """What a model with latent attention would hold and read had it been trained with an indexer (DeepSeek-V3.2).

    Each step scores an indexer key of every token (128 fp8 values and an fp32 scale: 132 B per token and layer, held
    beside the latent and read) and attends the best ``index_topk``. Layers are priced as those of a model whose config
    has an indexer, to the byte: `trained_group`. DeepSeek-V3 with it is DeepSeek-V3.2, but for the indexer's weights,
    which stay out. With ``fp8`` a latent takes vLLM's 656 B. The model must be trained so (arXiv 2512.02556), and
    nothing runs on tensors by itself.

    `read_mask` is an oracle and not the method: the top k by exact attention, which a trained indexer imitates. What
    it loses is what any indexer loses at least; nobody can run it, as it reads every key.
    """

    names: ClassVar = {"dsa": {}}
    summaries: ClassVar = {
        "dsa": "latents held, an indexer's best 2,048 read; for MLA; an architecture, DeepSeek-V3.2, arXiv 2512.02556"
    }
    inline_fields: ClassVar = ("index_topk",)

    family: ClassVar = "sparse reading"

    kind: Literal["dsa"] = "dsa"
    index_topk: PositiveInt = 2048
    """Tokens attended per step and layer."""
    index_head_dim: PositiveInt = 128
    """Elements of an indexer key."""

    def trained_group(self, group: LayerGroup) -> LayerGroup:
        if group.kind is not LayerKind.FULL or not group.is_latent:
            return group
        indexer = {"index_head_dim": self.index_head_dim, "index_topk": self.index_topk}
        return group.model_copy(update={"kind": LayerKind.INDEXED, **indexer})

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens)

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens, self.index_topk)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if any(group.kind is LayerKind.INDEXED for group in model.groups):
            return f"{model.name} has an indexer of its own, which is priced without a strategy"
        if any(self.trained_group(group) is not group for group in model.kv_groups):
            return None
        return f"dsa chooses among latents (MLA), and {model.name} keeps none; nsa is for layers with K and V per head"

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        return None

    def selector(self) -> Selector:
        raise NotRunnable(self.kind, "an architecture: its indexer must be trained with the model")

    def read_mask(self, layer_kv: LayerKv, layer: LayerView) -> BoolArray | None:
        """Which tokens an indexer without error would read: the largest products of each query head, (Hq, m, n)."""
        tokens, dim = layer_kv.num_tokens, layer_kv.keys.shape[2]
        if tokens <= self.index_topk:
            return None
        queries = layer_kv.queries.reshape(layer_kv.num_kv_heads, -1, dim)
        products = queries @ layer_kv.keys.transpose(0, 2, 1)
        best = np.argpartition(-products, self.index_topk - 1, axis=2)[:, :, : self.index_topk]
        reads = np.zeros(products.shape, dtype=bool)
        np.put_along_axis(reads, best, True, axis=2)
        return reads.reshape(*layer_kv.queries.shape[:2], tokens)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        return {"index_topk": whole_tokens("dsa", text)}

    def inline_text(self) -> str | None:
        return str(self.index_topk)
