"""NSA: native sparse attention over block summaries, chosen blocks and a window, as an architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from kvsim.compression.base import LayerView, TokenCurve, growing
from kvsim.compression.selection.full_attention import FullAttentionSelection, kv_heads
from kvsim.errors import NotRunnable
from kvsim.ops import Component, OpCall, compress_blocks, select_top_k
from kvsim.specs.base import DTYPE_BITS
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.selector import Selector
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import IntArray, KvTensors


class Nsa(FullAttentionSelection):
    """What a model would hold and read had it been trained with native sparse attention (arXiv 2502.11089).

    A step reads a compressed key and value per ``compress_stride`` tokens, the tokens of ``num_select_blocks`` blocks
    (the first and the two newest among them) and those of a window: n/16 + 1,024 + 512 of n, as the paper counts
    (table 4). All tokens are held, and the compressed ones beside them: 1/16 more. Query heads of a group share their
    blocks. The model must be trained so: nothing runs on tensors, and no score carries over.

    The paper's: all sizes, and each branch having K and V of its own. Not counted here: the window's own K and V (as
    many tokens as it is long, per layer), gates, and an MLP wider than one matrix. Projections and prefill stay those
    of the model, with full attention, which is an upper bound of prefill's time.
    """

    names: ClassVar = {"nsa": {}}
    summaries: ClassVar = {
        "nsa": "all tokens held; summaries, 16 blocks of 64 and a window of 512 read; an architecture, arXiv 2502.11089"
    }

    family: ClassVar = "sparse reading"

    kind: Literal["nsa"] = "nsa"
    compress_block_size: PositiveInt = 32
    """Tokens that a compressed key stands for (l)."""
    compress_stride: PositiveInt = 16
    """Tokens from one such block to the next (d)."""
    select_block_size: PositiveInt = 64
    """Tokens of a chosen block (l')."""
    num_select_blocks: PositiveInt = 16
    """Blocks that are read, the first and the newest among them (n)."""
    window_size: PositiveInt = 512
    """Newest tokens that are read in any case (w)."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> Self:
        for name in ("compress_block_size", "select_block_size"):
            size = getattr(self, name)
            if size % self.compress_stride:
                msg = f"{name} {size} is not a multiple of compress_stride {self.compress_stride}"
                raise ValueError(msg)
        if self.compress_block_size > self.select_block_size:
            msg = (
                f"compress_block_size {self.compress_block_size} is larger than select_block_size "
                f"{self.select_block_size}, whose scores are sums over compressed blocks"
            )
            raise ValueError(msg)
        return self

    @property
    def read_tokens(self) -> int:
        """Most tokens whose own K and V a step reads."""
        return self.num_select_blocks * self.select_block_size + self.window_size

    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens)

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        return growing(prompt_tokens, self.read_tokens)

    def scanned_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        return None if kv_heads(layer.group) == 0 else growing(prompt_tokens)

    def scan_bytes_per_token(self, group: LayerGroup, element_bytes: float) -> float:
        return group.kv_elements_per_token * element_bytes / self.compress_stride

    def scan_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        # Softmax over compressed keys and the sum into blocks; their products run on tensor units, below the bytes.
        return 5.0 * model.num_attention_heads / self.compress_stride

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        return self._compress(prompt_tokens, layer, model) if prompt_tokens else ()

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        calls = self._compress(1, layer, model)
        if not calls:
            return ()
        # At least the blocks that are read are ranked; scoring all of them grows with context and is the scan's work.
        rank = select_top_k(self.num_select_blocks, layer.group.num_kv_heads)
        return (*calls, OpCall("select_blocks", rank, Component.COMPRESSION))

    def _compress(self, tokens: int, layer: LayerView, model: ModelSpec) -> tuple[OpCall, ...]:
        group = layer.group
        if kv_heads(group) == 0:
            return ()
        element_bytes = DTYPE_BITS[model.dtype] / 8
        works = (
            compress_blocks(tokens, self.compress_block_size, self.compress_stride, kv_heads(group), dim, element_bytes)
            for dim in (group.k_head_dim, group.v_head_dim)
        )
        return tuple(OpCall("compress_blocks", work, Component.COMPRESSION) for work in works)

    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        return None

    def selector(self) -> Selector:
        raise NotRunnable(self.kind, "an architecture: the model must be trained with it")
