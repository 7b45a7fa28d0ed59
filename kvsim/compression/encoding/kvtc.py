"""kvtc: decorrelate, split a bit budget, quantise, deflate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import NonNegativeInt, field_validator

from kvsim.compression.codec import Codec
from kvsim.compression.encoding.published_ratio import PublishedRatioEncoding, of_heads_only
from kvsim.errors import InvalidSpec

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec

TARGET_RATIOS: Final = (8, 16, 32)
"""The paper's variants."""


class Kvtc(PublishedRatioEncoding):
    """KV transform coding (arXiv 2511.01815), for tiers.

    The paper's text was not to be had: what is called the paper's comes from its abstract and reviews. The paper's:
    RoPE is undone, keys and values of all layers and heads of a token are decorrelated by principal components of
    calibration sequences, a dynamic programme splits a bit budget among components (some get none), codes go through
    DEFLATE; the first 4 and newest 128 tokens stay native. Bases belong to the model (2.4 % of its parameters,
    secondary reading), not to a cache. ``target_ratio`` is the budget before DEFLATE: 16 bits over it per number.

    Open ports' (two by different authors agree: Hmbown/ZMLX, jfckm/sglang-kvtc): keys and values have bases and
    budgets of their own, of equal size; neighbouring components form groups, each with a 16-bit scale and a 16-bit
    zero point per token; the programme chooses sizes of groups (1, 16, 64, 256, 1024) and types (none, 2, 4, 8 bits) by
    squared error measured on calibration data, and the 32 bits of a group count in the budget.

    Ours: all powers of two from 16 to 1024 and all widths from 1 to 8 bits as integers (ports: fp8 for 8 bits); no
    groups of one, and groups start at multiples of 16; scales are not deflated; as many neighbouring layers per basis
    as the samples can carry (four rows per column) instead of always all; ``objective: kq``. kernels/transform/kvtc is
    the transform with a fixed step per component, layer by layer, and not these groups.
    """

    names: ClassVar = {"kvtc": {}}
    summaries: ClassVar = {
        "kvtc": "principal components, bits by dynamic programming, DEFLATE, for tiers; kvtc, arXiv 2511.01815"
    }
    inline_fields: ClassVar = ("target_ratio",)

    family: ClassVar = "transform coding"

    kind: Literal["kvtc"] = "kvtc"
    target_ratio: int = 8
    """16 bits over the bit budget per number, before DEFLATE: 8, 16 or 32."""
    objective: Literal["kv", "kq"] = "kv"
    """What keys are coded for: their own least squared error, as in the paper, or that of their products with
    calibration queries. The latter is ours, in the manner of arXiv 2608.04074 and 2608.14191 (abstracts)."""
    num_sink_tokens: NonNegativeInt = 4
    """Oldest tokens that stay native."""
    recent_tokens: NonNegativeInt = 128
    """Newest tokens that stay native."""

    @property
    def joins_layers(self) -> bool:
        return True

    @field_validator("target_ratio")
    @classmethod
    def _published(cls, value: int) -> int:
        if value not in TARGET_RATIOS:
            msg = f"must be one of {', '.join(map(str, TARGET_RATIOS))}, the variants with a published ratio"
            raise ValueError(msg)
        return value

    @classmethod
    def inline_parameters(cls, text: str, given: Mapping[str, object]) -> dict[str, object]:
        if not text.removesuffix("x").isdecimal():
            msg = f"kvtc:{text}: the target ratio is one of {', '.join(map(str, TARGET_RATIOS))}, as in kvtc:16"
            raise InvalidSpec(msg)
        return {"target_ratio": int(text.removesuffix("x"))}

    def inline_text(self) -> str | None:
        return str(self.target_ratio)

    @property
    def residual_tokens(self) -> int:
        return self.recent_tokens

    @property
    def sink_tokens(self) -> int:
        return self.num_sink_tokens

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        return super().check(model, device) or of_heads_only(self, model)

    def codec(self) -> Codec:
        from kvsim.compression.encoding.kvtc_codec import KvtcCodec

        return KvtcCodec(self.target_ratio, self.num_sink_tokens, self.recent_tokens, self.objective)
