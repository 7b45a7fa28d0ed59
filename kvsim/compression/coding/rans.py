"""Range asymmetric numeral systems over codes at rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from kvsim.compression.codec import Coder, Symbols
from kvsim.compression.coding.base import Coding
from kvsim.numerics.entropy import context_rows
from kvsim.numerics.stream_coders import rans_bits
from kvsim.ops import Component, OpCall, Work
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec


class Rans(Coding):
    """rANS (Duda, arXiv 1311.2540) with one static table per head of K and of V, for KV at rest.

    The algorithm is that of kernels/entropy/rans and of DietGPU; streams here are constriction's, one per head and
    ``segment_tokens`` tokens with a 32-bit length, under 12-bit tables. At DietGPU's 250 to 410 GB/s on an A100 a
    decoder is several times slower than memory, so attention does not read it.
    """

    names: ClassVar = {"rans": {}}
    aliases: ClassVar = {"ans": "rans"}
    summaries: ClassVar = {
        "rans": "rANS over codes at rest, for tiers and transfers; Duda, arXiv 1311.2540, as DietGPU"
    }

    family: ClassVar = "entropy coding"

    kind: Literal["rans"] = "rans"
    segment_tokens: PositiveInt = 256
    """Tokens of one head that one stream holds."""

    @property
    def unpack_family(self) -> str | None:
        return "rans"

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        # DietGPU gives one range of rates for both directions, so encoding takes a decoder's operations.
        work = Work(decoded_elements=group.kv_elements_per_token, unpack_family="rans")
        return (OpCall("rans_encode", work, Component.COMPRESSION),)

    def coder(self) -> Coder:
        return _RansCoder(self.segment_tokens)


class _RansCoder(Coder):
    def __init__(self, segment_tokens: int) -> None:
        self._segment_tokens = segment_tokens

    def code(self, symbols: Symbols) -> float:
        rows = context_rows(symbols.codes, "head")
        return rans_bits(rows, symbols.levels, self._segment_tokens * symbols.codes.shape[2])
