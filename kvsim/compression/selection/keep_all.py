"""Keep and read every token: the uncompressed baseline's selection."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.base import TokenSelection

if TYPE_CHECKING:
    from kvsim.tensors import IntArray, KvTensors


class KeepAll(TokenSelection):
    """Every token stays and every token is read."""

    names: ClassVar = {"keep_all": {}}
    aliases: ClassVar = {"full_kv": "keep_all", "fullkv": "keep_all", "no_press": "keep_all"}
    summaries: ClassVar = {"keep_all": "every token is kept and read"}

    family: ClassVar = "baseline"

    kind: Literal["keep_all"] = "keep_all"

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens)

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        return None
