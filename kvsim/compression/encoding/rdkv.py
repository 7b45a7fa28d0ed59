"""RDKV: each token of a head gets the bits that its error in attention is worth, down to none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from kvsim.compression.base import KvBytes, KvEncoding, StrategyPart
from kvsim.compression.codec import Codec
from kvsim.compression.encoding.rdkv_codec import METADATA_BITS, WIDTHS, RdkvCodec
from kvsim.ops import (
    Component,
    OpCall,
    Work,
    compact,
    compression_calls,
    project_rows,
    quantize,
    score_with_window,
    select_top_k,
)
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

DEFAULT_COMPRESSION_RATIO = 0.75


class Rdkv(KvEncoding):
    """Bits and eviction as one allocation by reverse water-filling, once after the prompt (after arXiv 2605.08317).

    The paper's, by its abstract: eviction is a width of zero bits; weights come from the distortion that compression
    induces on attention; each token or channel gets a width from full precision down to zero, after prefill.
    Ours: tokens per KV head and no channels, K and V of one width out of 0, 2, 4, 8 and 16 bits; the weights (see
    `RdkvCodec`); rotated integers over a vector's own range; a budget per layer; the newest ``window_size`` tokens
    beside it; tokens that are generated later stay native.
    """

    names: ClassVar = {"rdkv": {}}
    spellings: ClassVar = ("rdkv:0.9",)
    summaries: ClassVar = {
        "rdkv": "0 to 16 bits per token and head by reverse water-filling, 75 % less unless set; after arXiv 2605.08317"
    }
    inline_fields: ClassVar = ("compression_ratio",)
    family: ClassVar = "joint bits and eviction"

    kind: Literal["rdkv"] = "rdkv"
    compression_ratio: Annotated[float, Field(ge=0, lt=1)] = DEFAULT_COMPRESSION_RATIO
    """Share of the bytes of the prompt's older tokens that is removed (kvpress's meaning)."""
    window_size: PositiveInt = 64
    """Newest tokens of the prompt, whose queries weigh the others and which stay native."""

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        """Bytes that the budget gives an older token on average, scales and zero points included."""
        return KvBytes((1 - self.compression_ratio) * group.kv_elements_per_token * DTYPE_BITS[native] / 8)

    def fixed_bytes_per_sequence(self, group: LayerGroup, native: Dtype) -> float:
        """Bytes that count a head's tokens of each width; those of a width lie together, in any order."""
        return 0.0 if group.kv_elements_per_token == 0 else 4.0 * (len(WIDTHS) - 1) * group.num_kv_heads

    def stored_elements_per_token(self, group: LayerGroup) -> int:
        """Most numbers to unpack per token: those that are left if every token that stays has the fewest bits."""
        elements = group.kv_elements_per_token
        if elements == 0:
            return 0
        least_bits = WIDTHS[1] * elements + METADATA_BITS * group.num_kv_heads
        held_bits = (1 - self.compression_ratio) * elements * WIDTHS[-1]
        return min(elements, int(elements * held_bits / least_bits))

    @property
    def sink_tokens(self) -> int:
        return self.window_size

    @property
    def evicts(self) -> bool:
        return self.compression_ratio > 0

    @property
    def stores_prompt_once(self) -> bool:
        return True

    @property
    def depends_on_prompt(self) -> bool:
        return True

    @property
    def unpack_family(self) -> str | None:
        return "rdkv"

    def refuses(self, reduction: StrategyPart) -> str | None:
        return f"rdkv weighs whole keys and values by the prompt's queries, which do not fit those of {reduction.kind}"

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if not any(group.is_latent for group in model.kv_groups):
            return None
        return f"rdkv chooses bits per KV head, but {model.name} keeps one latent vector for all heads (MLA)"

    def prefill_ops(self, prompt_tokens: int, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        heads, elements = 0 if group.shares_kv else group.num_kv_heads, group.kv_elements_per_token
        if heads == 0 or prompt_tokens <= self.window_size:
            return ()
        works = self._works(prompt_tokens, heads, elements, group, model)
        return compression_calls(works)

    def _works(self, tokens: int, heads: int, elements: int, group: LayerGroup, model: ModelSpec) -> Mapping[str, Work]:
        element_bytes = DTYPE_BITS[model.dtype] / 8
        queries, dim = model.num_attention_heads, group.k_head_dim
        read, widths = elements * tokens * element_bytes, len(WIDTHS) - 2
        return {
            "score_with_window": score_with_window(tokens, self.window_size, queries, heads, dim, element_bytes),
            "rotate_kv": project_rows(2.0 * heads * tokens, dim, dim, element_bytes),
            # Each width is tried, and its error in keys is weighed by the window's queries as its logits were.
            "try_widths": Work(
                flops=widths * 2.0 * self.window_size * tokens * dim * queries,
                bytes_read=widths * read,
                bytes_written=widths * 4.0 * heads * tokens,
                vector_flops=widths * 4.0 * elements * tokens,
            ),
            "sort_steps": select_top_k(tokens * (len(WIDTHS) - 1), heads),
            "encode": quantize(elements * tokens, read, (1 - self.compression_ratio) * read),
            "compact_kv": compact(self.window_size, elements * element_bytes),
        }

    def decode_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Turn queries as keys were turned, and the output back."""
        if group.num_kv_heads == 0:
            return ()
        element_bytes = DTYPE_BITS[model.dtype] / 8
        works = [
            project_rows(model.num_attention_heads, dim, dim, element_bytes)
            for dim in (group.k_head_dim, group.v_head_dim)
            if dim
        ]
        return tuple(OpCall("rotate_query_and_output", work, Component.COMPRESSION) for work in works)

    def codec(self) -> Codec:
        return RdkvCodec(self.compression_ratio, self.window_size)

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        """``rdkv:0.9`` is a compression_ratio."""
        return {"compression_ratio": text}

    def inline_text(self) -> str | None:
        return str(self.compression_ratio)
