"""What an entropy coding answers: how many bits the codes of an encoding really take."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsim.compression.base import KvBytes, KvEncoding, StrategyPart
from kvsim.specs.base import Dtype
from kvsim.specs.model import LayerGroup

if TYPE_CHECKING:
    from kvsim.compression.codec import Coder
    from kvsim.ops import OpCall
    from kvsim.specs.device import DeviceSpec
    from kvsim.specs.model import ModelSpec


class Coding(StrategyPart):
    """Lossless coding of what an encoding stores; its rate depends on the data and so carries a basis."""

    @abstractmethod
    def coded(self, plain: KvBytes, encoding: KvEncoding, group: LayerGroup, native: Dtype) -> KvBytes:
        """Expected bytes of one token in one layer that ``encoding`` alone stores in ``plain`` bytes."""

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

    def check(self, model: ModelSpec, device: DeviceSpec) -> str | None:
        """Why this model or device cannot run the coding, or None."""
        return None

    def refuses(self, encoding: KvEncoding) -> str | None:
        """Why codes of ``encoding`` cannot be coded, or None."""
        return None

    @abstractmethod
    def coder(self) -> Coder:
        """Give the coder, as code that runs on codes."""
