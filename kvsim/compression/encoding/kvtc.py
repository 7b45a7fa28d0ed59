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

    The paper's: RoPE is undone, keys and values of all layers and heads are decorrelated by principal components of
    calibration sequences, a dynamic programme splits the bit budget among components (some get none), codes go
    through DEFLATE; the first 4 and newest 128 tokens stay native. ``target_ratio`` is the budget before DEFLATE: 16
    bits over it per number. Bases belong to the model (2.4 % of its parameters, secondary reading), not to a cache.

    Ours: bits per component and not per run of components with a type and a scale per token, a uniform quantiser
    whose clip is the best on the calibration sequences, and as many neighbouring layers per basis as these can carry
    (four rows per column) instead of always all. kernels/transform/kvtc does transform and quantiser, layer by layer.
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

        return KvtcCodec(self.target_ratio, self.num_sink_tokens, self.recent_tokens)
