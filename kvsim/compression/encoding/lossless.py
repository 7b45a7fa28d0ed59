"""Lossless coding of 16-bit KV: exponents are entropy-coded, the rest stays as it is."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import numpy as np

from kvsim.compression.codec import Codec, LayerCodec, StoredLayer
from kvsim.compression.encoding.published_ratio import PublishedRatioEncoding
from kvsim.errors import InvalidSpec
from kvsim.numerics.float_words import (
    MANTISSA_BITS,
    HalfFormat,
    Words,
    exponent_levels,
    from_words,
    join,
    split,
    to_words,
)
from kvsim.numerics.stream_coders import rans_bits
from kvsim.tensors import FloatArray, KvTensors, LayerKv

SEGMENT_TOKENS: Final = 256


class Lossless(PublishedRatioEncoding):
    """Exponents of bf16 or fp16 through rANS, sign and mantissa as they are: exact, bit for bit.

    The idea of DietGPU's float codec (rANS), ZipNN and DFloat11 (arXiv 2504.11651; Huffman): of a bf16 number's 8
    exponent bits only about 2.6 are information. Ours are one static table per head of K and of V, and segments of
    256 tokens. DietGPU codes on the GPU; our kernel entropy/rans would take the exponents as codes.
    """

    names: ClassVar = {"lossless": {}}
    summaries: ClassVar = {
        "lossless": "exact: entropy-coded exponents, for tiers; as DietGPU, ZipNN, DFloat11 (2504.11651)"
    }

    family: ClassVar = "entropy coding"

    kind: Literal["lossless"] = "lossless"

    @property
    def is_exact(self) -> bool:
        return True

    def codec(self) -> Codec:
        return _LosslessCodec()


class _LosslessCodec(LayerCodec):
    def store_layer(self, layer: LayerKv, index: int, kv: KvTensors) -> StoredLayer:
        keys, key_bits = _code(layer.keys, f"keys of layer {index}")
        values, value_bits = _code(layer.values, f"values of layer {index}")
        return StoredLayer(keys, values, payload_bits=key_bits + value_bits)


def _code(tensor: FloatArray, what: str) -> tuple[FloatArray, float]:
    """Code one tensor, (H, n, D); give what comes back and the bits that it took."""
    for half in MANTISSA_BITS:
        words = to_words(tensor, half)
        if words is not None:
            return from_words(coded_words(words, half), half), word_bits(words, half)
    msg = f"lossless codes 16-bit floats, and the {what} hold numbers that are neither bf16 nor fp16; round them first"
    raise InvalidSpec(msg)


def coded_words(words: Words, half: HalfFormat) -> Words:
    """Split words and join them again: what a decoder gives; raise RuntimeError where it differs (a bug)."""
    back = join(*split(words, half), half)
    if not np.array_equal(back, words):
        msg = f"splitting and joining {half} words changed them"
        raise RuntimeError(msg)
    return back


def word_bits(words: Words, half: HalfFormat) -> float:
    """Bits of words (H, n, D): coded exponents with their tables, and what is not coded."""
    exponents, _ = split(words, half)
    heads, _, channels = words.shape
    coded = rans_bits(exponents.reshape(heads, -1), exponent_levels(half), SEGMENT_TOKENS * max(1, channels))
    return coded + (MANTISSA_BITS[half] + 1) * words.size
