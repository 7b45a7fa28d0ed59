"""CacheGen: deltas to anchor tokens, coarser in later layers, arithmetic-coded under offline laws."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from kvsim.compression.codec import Codec
from kvsim.compression.encoding.published_ratio import PublishedRatioEncoding, of_heads_only

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class CacheGen(PublishedRatioEncoding):
    """CacheGen (arXiv 2310.07240), a KV stream for tiers and transfers.

    The paper's: groups of ten tokens whose first, the anchor, is coded by itself and finer, and the others as deltas
    to it; earlier layers get more levels; arithmetic coding under one law per layer and channel, learned offline.
    From LMCache's encoder (which codes no deltas): one 16-bit scale per token, tensor and layer over all heads; 32
    levels for keys of the first 10 of 32 layers and values of the first 2, 16 elsewhere. Ours: 8 bits for anchors,
    deltas to the anchor as it is decoded, and each channel's law smoothed by that of the layer. Only abstract,
    code and a quotation of the paper were read. We have no kernel for it.
    """

    names: ClassVar = {"cachegen": {}}
    summaries: ClassVar = {"cachegen": "anchor deltas, arithmetic coding, for tiers; CacheGen, arXiv 2310.07240"}

    family: ClassVar = "entropy coding"

    kind: Literal["cachegen"] = "cachegen"
    group_tokens: PositiveInt = 10
    """Tokens that share an anchor, which is the first of them."""

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        return super().check(model, device) or of_heads_only(self, model)

    def codec(self) -> Codec:
        from kvsim.compression.encoding.cachegen_codec import CacheGenCodec

        return CacheGenCodec(self.group_tokens)
