"""Codes are stored at their fixed width: the neutral coding."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvsim.compression.base import KvEncoding
from kvsim.compression.coding.base import Coding
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.compression.codec import Coder


class NoCoding(Coding):
    """Fixed-width codes."""

    names: ClassVar = {"fixed_width": {}}
    summaries: ClassVar = {"fixed_width": "codes are stored at their fixed width"}

    family: ClassVar = "baseline"

    kind: Literal["fixed_width"] = "fixed_width"

    @property
    def is_none(self) -> bool:
        return True

    def rate(self, encoding: KvEncoding) -> Prior | None:
        return None

    def refuses(self, encoding: KvEncoding) -> str | None:
        return None

    def coder(self) -> Coder:
        from kvsim.compression.codec import FixedWidth

        return FixedWidth()
