"""Formulas of operations: one file per operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvsim.calibration.laws.all_reduce import AllReduceLaw
from kvsim.calibration.laws.base import Law
from kvsim.calibration.laws.decode_attention import DecodeAttentionLaw
from kvsim.calibration.laws.gemm import GemmLaw
from kvsim.calibration.laws.kernel import KernelLaw
from kvsim.calibration.laws.mla import MlaDecodeLaw, MlaPrefillLaw
from kvsim.calibration.laws.prefill_attention import PrefillAttentionLaw

LAWS: Final[Mapping[str, Law]] = {
    law.operation: law
    for law in (
        DecodeAttentionLaw(),
        PrefillAttentionLaw(),
        MlaDecodeLaw(),
        MlaPrefillLaw(),
        GemmLaw(),
        AllReduceLaw(),
        KernelLaw(),
    )
}
"""Every law, by operation."""


def law_for(operation: str) -> Law:
    """Give the law of an operation; raise KeyError for one that has none."""
    return LAWS[operation]
