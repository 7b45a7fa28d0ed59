"""What an entropy coding answers: how many bits the codes of an encoding really take."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsim.compression.base import KvBytes, KvEncoding, StrategyPart
from kvsim.compression.rates import coding_share, load_rates
from kvsim.compression.spelling import bare_name
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.compression.codec import Coder
    from kvsim.ops import OpCall
    from kvsim.specs.model import ModelSpec


class Coding(StrategyPart):
    """Lossless coding of what an encoding stores.

    Its rate depends on the data, so it carries a basis: shares of the fixed width measured on ensembles, in
    ``calibration/priors/kv_rates.yaml``. The codes change their length, what they say does not.
    """

    def coded(self, plain: KvBytes, encoding: KvEncoding, group: LayerGroup, native: Dtype) -> KvBytes:
        """Expected bytes of one token in one layer that ``encoding`` alone stores in ``plain`` bytes."""
        rate = self.rate(encoding)
        return plain if rate is None else KvBytes(plain.payload_bytes * rate.value, plain.metadata_bytes)

    def rate(self, encoding: KvEncoding) -> Prior | None:
        """Expected share of the fixed width that codes of ``encoding`` take, tables included; None if not measured."""
        return coding_share(encoding, self)

    @property
    def is_none(self) -> bool:
        """Whether nothing is coded."""
        return False

    @property
    def is_fused(self) -> bool:
        """Whether attention decodes as it reads, so that decode steps too move coded bytes."""
        return False

    @property
    def unpack_family(self) -> str | None:
        """Name of the unpack-rate prior that bounds reading coded KV, or None for the encoding's own."""
        return None

    def append_ops(self, group: LayerGroup, model: ModelSpec) -> Iterable[OpCall]:
        """Work to code one new token in one layer."""
        return ()

    @property
    def unpriced_coder(self) -> str | None:
        """Name of the coder whose speed no prior gives, so that a tier must state it, or None."""
        return None

    def refuses(self, encoding: KvEncoding) -> str | None:
        """Why codes of ``encoding`` cannot be coded, or None."""
        if encoding.is_native:
            return f"{self.kind} codes the codes of an encoding, and native KV has none; lossless codes native KV"
        if encoding.rate is not None:
            return f"{encoding.kind} has an entropy coder of its own, so {self.kind} after it would find nothing"
        if self.rate(encoding) is None:
            return (
                f"no rate of {self.kind} has been measured for codes of {bare_name(encoding)}, so its bytes are "
                f"unknown; measured: {', '.join(load_rates().codings)}"
            )
        return None

    @abstractmethod
    def coder(self) -> Coder:
        """Give the coder, as code that runs on codes."""
