"""Arithmetic coding over codes at rest."""

from __future__ import annotations

from typing import ClassVar, Literal

from kvsim.compression.codec import Coder, Symbols
from kvsim.compression.coding.base import Coding
from kvsim.numerics.entropy import context_rows
from kvsim.numerics.stream_coders import adaptive_bits, range_bits


class Arithmetic(Coding):
    """Range coding (constriction's) under a law per channel: learned on the way, or written down beforehand.

    ``adaptive`` starts every head from nothing and predicts each channel from the tokens before; nothing but the
    stream is stored. ``channel`` stores a 12-bit table per channel, which pays off only in long sequences of few
    levels. CacheGen, whose laws per channel are learned offline, is the encoding ``cachegen``.
    """

    names: ClassVar = {"arithmetic": {}}
    summaries: ClassVar = {"arithmetic": "range coding under adaptive laws per channel, for tiers and transfers"}

    family: ClassVar = "entropy coding"

    kind: Literal["arithmetic"] = "arithmetic"
    model: Literal["adaptive", "channel"] = "adaptive"

    @property
    def unpriced_coder(self) -> str | None:
        return self.kind

    def coder(self) -> Coder:
        return _AdaptiveCoder() if self.model == "adaptive" else _ChannelCoder()


class _AdaptiveCoder(Coder):
    def code(self, symbols: Symbols) -> float:
        return sum(adaptive_bits(head, symbols.levels)[0] for head in symbols.codes)


class _ChannelCoder(Coder):
    def code(self, symbols: Symbols) -> float:
        return range_bits(context_rows(symbols.codes, "channel"), symbols.levels)
