"""A device: datasheet facts only, each with its source. Efficiencies and prices live elsewhere."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from kvsim.specs.base import Dtype, Spec
from kvsim.specs.prior import Banded
from kvsim.units import Bytes, BytesPerSecond, FlopsPerSecond, Hertz, Joules, Watts

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]
Confidence = Literal["high", "medium", "low"]


class Source(Spec):
    """Where a figure was read."""

    title: str
    as_of: date
    url: str | None = None
    note: str | None = None


class BytesFact(Spec):
    value: Bytes
    source: str


class BandwidthFact(Spec):
    value: BytesPerSecond
    source: str


class FlopsFact(Spec):
    dtype: Dtype
    value: FlopsPerSecond
    source: str


class VectorFlopsFact(Spec):
    value: FlopsPerSecond
    source: str


class PowerFact(Spec):
    value: Watts
    source: str


class EnergyFact(Spec):
    value: Joules
    source: str


class ShareFact(Banded):
    """A share, and the span of what the source saw."""

    value: Annotated[float, Field(gt=0, le=1)]
    low: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(gt=0, le=1)]


class ClockFact(Spec):
    value: Hertz
    source: str


class CountFact(Spec):
    value: Annotated[int, Field(gt=0)]
    source: str


class NativeDtypesFact(Spec):
    value: tuple[Dtype, ...]
    source: str


class DeviceSpec(Spec):
    """One accelerator, GPU or SoC. Absent facts are None: unknown, never guessed.

    ``memory_capacity`` is the JEDEC size (a "80 GB" HBM part holds 80 GiB); what the driver leaves to the
    engine is modelled in :mod:`kvsim.memory`. ``dense_flops`` are dense tensor rates without sparsity.
    Links are per direction.
    """

    name: Slug
    title: str
    vendor: str
    kind: Literal["gpu", "accelerator", "edge", "mobile"]
    architecture: str
    """Family that decides kernels, such as ampere, hopper, blackwell, cdna3, tpu-v6, apple-m4."""
    compile_target: str | None = None
    """Triton target of this architecture, such as sm_90 or gfx942."""
    aliases: tuple[str, ...] = ()
    confidence: Confidence
    memory_capacity: BytesFact
    memory_kind: str
    memory_bandwidth: BandwidthFact
    dense_flops: tuple[FlopsFact, ...]
    vector_flops: VectorFlopsFact | None = None
    """Non-tensor FP32 rate; bounds how fast quantised elements are unpacked."""
    cache: BytesFact | None = None
    """Last-level cache or shared on-chip memory."""
    num_compute_units: CountFact | None = None
    boost_clock: ClockFact | None = None
    scale_up_link: BandwidthFact | None = None
    scale_up_domain: CountFact | None = None
    """Devices that the scale-up link joins; None where no source states it, and the usual server stands in."""
    host_link: BandwidthFact | None = None
    tdp: PowerFact | None = None
    decode_power: PowerFact | None = None
    """Power that a source measured while a language model decodes."""
    sustained_decode: ShareFact | None = None
    """Decode rate after minutes of it, beside that of a cold start: what heat leaves."""
    battery: EnergyFact | None = None
    """Of the product that the title names."""
    native_dtypes: NativeDtypesFact
    sources: dict[str, Source] = Field(min_length=1)

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        for field in type(self).model_fields:
            value = getattr(self, field)
            for fact in value if isinstance(value, tuple) else (value,):
                source = getattr(fact, "source", None)
                if source is not None and source not in self.sources:
                    msg = f"{field} names source {source!r}, which 'sources' does not list"
                    raise ValueError(msg)
        if not any(fact.dtype in (Dtype.BF16, Dtype.FP16) for fact in self.dense_flops):
            msg = "dense_flops needs a bf16 or fp16 rate"
            raise ValueError(msg)
        return self

    def dense_flops_per_s(self, dtype: Dtype) -> float | None:
        """Dense tensor rate for ``dtype`` in FLOP/s, or None where the device has no native path."""
        for fact in self.dense_flops:
            if fact.dtype is dtype:
                return fact.value
        return None

    @property
    def dense_half_flops_per_s(self) -> float:
        """Dense bf16 rate, or fp16 where bf16 has none, in FLOP/s."""
        rate = self.dense_flops_per_s(Dtype.BF16) or self.dense_flops_per_s(Dtype.FP16)
        return float(rate or 0.0)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Peak memory bandwidth in bytes/s."""
        return self.memory_bandwidth.value

    @property
    def capacity_bytes(self) -> int:
        """JEDEC memory size in bytes."""
        return self.memory_capacity.value

    def supports(self, dtype: Dtype) -> bool:
        """Whether arithmetic in ``dtype`` is native."""
        return dtype in self.native_dtypes.value
