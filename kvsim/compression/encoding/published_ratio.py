"""What codecs share whose size depends on the data, so that pricing takes a published ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvsim.compression.base import KvBytes, KvEncoding, StrategyPart
from kvsim.compression.rates import codec_share
from kvsim.specs.base import DTYPE_BITS, Dtype
from kvsim.specs.model import LayerGroup
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class PublishedRatioEncoding(KvEncoding):
    """A codec at rest: bytes of the 16-bit cache over the ratio in ``calibration/priors/kv_coders.yaml``.

    A tier that names it uses the same figure, and the published rates of its coder.
    """

    def bytes_per_token(self, group: LayerGroup, native: Dtype) -> KvBytes:
        native_bytes = group.kv_elements_per_token * DTYPE_BITS[native] / 8
        return KvBytes(native_bytes * self.rate.value)

    @property
    def rate(self) -> Prior:
        return codec_share(self)

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        if DTYPE_BITS[model.dtype] != 16:
            return f"the ratio of {self.kind} is of a 16-bit cache, and that of {model.name} is {model.dtype.value}"
        return None

    @property
    def is_storage_only(self) -> bool:
        return True

    @property
    def unpriced_coder(self) -> str | None:
        return str(self.kind)

    def refuses(self, reduction: StrategyPart) -> str | None:
        return f"the published ratio of {self.kind} is of whole keys and values, not of what {reduction.kind} leaves"


def of_heads_only(encoding: KvEncoding, model: ModelSpec) -> str | None:
    """Why a codec of K and V per head has no published ratio for this model, or None."""
    if any(group.is_latent for group in model.kv_groups):
        return (
            f"the ratio of {encoding.kind} is published for K and V per head, but {model.name} keeps one latent vector "
            "for all heads (MLA); lossless and fp8 can store it"
        )
    return None
