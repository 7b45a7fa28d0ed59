"""Static Huffman codes that attention decodes as it reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import PositiveInt

from kvsim.compression.codec import Coder, Symbols
from kvsim.compression.coding.base import Coding
from kvsim.numerics import huffman
from kvsim.numerics.entropy import count_rows
from kvsim.ops import Component, OpCall, Work
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.specs.model import ModelSpec

OFFSET_BITS: Final = 32
"""Where a block starts, in bits from the start of its head."""
ENCODE_FLOPS: Final = 4.0
"""Per value: look up the code, shift it into place, merge it, advance."""


class Huffman(Coding):
    """Canonical Huffman codes, one table per head of K and of V, in blocks that decode independently.

    After KVComp (arXiv 2509.00579, of which only the abstract was read): Huffman codes of error-bounded integers,
    decoded inside the matrix-vector product so that decode steps read the coded bytes. Ours are the table per head
    (4-bit code lengths, at most 15 bits a code), the block of ``block_tokens`` tokens of one head, and its 32-bit
    offset. Tables come from the codes themselves; a cache that grows keeps those of its prompt.

    We have no kernel for it; the prior ``huffman`` covers decoding and restoring the value together.
    """

    names: ClassVar = {"huffman": {}}
    summaries: ClassVar = {"huffman": "Huffman codes decoded inside attention; after KVComp, arXiv 2509.00579"}

    family: ClassVar = "entropy coding"

    kind: Literal["huffman"] = "huffman"
    block_tokens: PositiveInt = 16
    """Tokens of one head that decode together: vLLM's page unless set."""

    @property
    def is_fused(self) -> bool:
        return True

    @property
    def unpack_family(self) -> str | None:
        return "huffman"

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        if group.kv_elements_per_token == 0:
            return ()
        work = Work(vector_flops=ENCODE_FLOPS * group.kv_elements_per_token)
        return (OpCall("huffman_encode", work, Component.COMPRESSION),)

    def coder(self) -> Coder:
        return _HuffmanCoder(self.block_tokens)


class _HuffmanCoder(Coder):
    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens

    def code(self, symbols: Symbols) -> float:
        heads, tokens, channels = symbols.codes.shape
        rows = symbols.codes.reshape(heads, -1)
        blocks = heads * -(-tokens // self._block_tokens)
        bits = heads * symbols.levels * huffman.LENGTH_BITS + blocks * OFFSET_BITS
        for row, counts in zip(rows, count_rows(rows, symbols.levels), strict=True):
            stream = huffman.encode(row, huffman.code_lengths(counts), self._block_tokens * channels)
            self.check_equal(row, huffman.decode(stream))
            bits += stream.num_bits
        return float(bits)
