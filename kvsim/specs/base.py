"""The base of every noun: a frozen value that refuses unknown keys and non-finite numbers."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Spec(BaseModel):
    """Frozen pydantic model: parameters in, nothing learned, no state."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Further names that the input may use: (name, field)."""


class Basis(StrEnum):
    """Where a number comes from, best first; every number shown carries one."""

    MEASURED = "measured"
    FITTED = "fitted"
    COMPILED = "compiled"
    TRANSFERRED = "transferred"
    DATASHEET = "datasheet"
    LITERATURE = "literature"


class Dtype(StrEnum):
    """Number formats of weights, arithmetic and KV elements."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    FP8 = "fp8"
    INT8 = "int8"
    FP4 = "fp4"
    INT4 = "int4"


DTYPE_BITS: dict[Dtype, int] = {
    Dtype.FP32: 32,
    Dtype.BF16: 16,
    Dtype.FP16: 16,
    Dtype.FP8: 8,
    Dtype.INT8: 8,
    Dtype.FP4: 4,
    Dtype.INT4: 4,
}
