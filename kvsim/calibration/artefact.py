"""A fitted kernel as a file: parameters, corrections, errors on held-out shapes, and where all of it came from.

Files are never changed: a new fit is a new file, named by its content. No code is stored, only numbers.
"""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from kvsim.calibration.facts import DeviceFacts
from kvsim.calibration.fit import FittedLaw, cold_share
from kvsim.calibration.laws import law_for
from kvsim.calibration.laws.base import FloatArray, Shape
from kvsim.calibration.sealed import SealedSpec, load_sealed
from kvsim.calibration.staleness import is_stale_source
from kvsim.calibration.table import CorrectionTable
from kvsim.errors import CalibrationError
from kvsim.specs.base import Basis, Spec
from kvsim.specs.device import Slug

STEPS_PER_UNIT = 4096.0
"""Corrections are stored as 16-bit integers in steps of 1/4096 of a natural logarithm (0.02 %)."""
COVERAGE = 0.8
"""Share of held-out rows that a band is made to hold."""
MAX_WORD_CHARACTERS = 48
"""Of a kernel's name in a file's name; the hash keeps files apart."""
Domain = Literal["cold", "cached"]


class StoredTable(Spec):
    """A correction table: little-endian int16 steps in row-major order of ``shape``, deflated (zlib), in base64."""

    origin: tuple[float, ...]
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    values: str

    @classmethod
    def pack(cls, table: CorrectionTable) -> Self:
        """Store a table's values rounded to steps."""
        steps = np.rint(table.values * STEPS_PER_UNIT).astype("<i2")
        return cls(
            origin=table.origin,
            spacing=table.spacing,
            shape=table.values.shape,
            values=base64.b64encode(zlib.compress(steps.tobytes(), 9)).decode("ascii"),
        )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        size = int(np.prod(self.shape))
        if not len(self.origin) == len(self.spacing) == len(self.shape):
            msg = "origin, spacing and shape must name the same axes"
            raise ValueError(msg)
        if len(self._inflated()) != 2 * size:
            msg = f"values must hold {size} numbers of 16 bits"
            raise ValueError(msg)
        return self

    def _inflated(self) -> bytes:
        try:
            # One byte more than the table holds shows a longer one, and nothing longer is ever inflated.
            return zlib.decompressobj().decompress(
                base64.b64decode(self.values, validate=True), 2 * int(np.prod(self.shape)) + 1
            )
        except zlib.error as error:
            msg = "values must be deflated numbers of 16 bits in base64"
            raise ValueError(msg) from error

    def unpack(self) -> CorrectionTable:
        """Give the table back."""
        steps = np.frombuffer(self._inflated(), dtype="<i2").reshape(self.shape)
        return CorrectionTable(self.origin, self.spacing, steps.astype(np.float64) / STEPS_PER_UNIT)


class Part(Spec):
    """The fit of one category of shapes, such as one head size; the nearest category serves shapes without one."""

    selector: dict[str, int] = Field(default_factory=dict)
    """The law's categories and the value they have in this part; empty for the only part."""
    cold: dict[str, float]
    """Parameters of calls that find nothing in cache."""
    cached: dict[str, float] | None = None
    """Parameters of calls whose working set fits the cache, where they differ."""
    correction: StoredTable | None = None


class HeldOut(Spec):
    """Errors on shapes that the fit had not seen, as fractions of the measured time."""

    n: Annotated[int, Field(ge=0)]
    median_ape: float | None
    p90_ape: float | None
    bias: float | None


class Band(Spec):
    """Logarithms of measured over predicted that hold ``coverage`` of held-out rows between them."""

    coverage: Annotated[float, Field(gt=0, lt=1)]
    log_low: float
    log_high: float


UNTESTED_BAND = Band(coverage=COVERAGE, log_low=-0.5, log_high=0.5)
"""Where rows of one shape left none to hold out: about what fits of few shapes miss by."""


class ExcludedRows(Spec):
    """Rows left out, and why."""

    reason: str
    count: int


class RowOrigin(Spec):
    """A file that rows came from."""

    path: str
    sha256: str
    origin: str
    licence: str


class Artefact(SealedSpec):
    """One kernel on one device, fitted."""

    device: Slug
    operation: str
    kernel: str
    version: str
    dtype: str
    kv_dtype: str
    basis: Basis
    law: str
    parts: tuple[Part, ...] = Field(min_length=1)
    domain: dict[str, tuple[float, float]]
    """Smallest and largest value of each shape column among the rows fitted."""
    rows: Annotated[int, Field(gt=0)]
    held_out_by: tuple[str, ...] = ()
    """Columns whose equal rows were held out together."""
    held_out: dict[Domain, HeldOut]
    bands: dict[Domain, Band]
    excluded: tuple[ExcludedRows, ...] = ()
    origins: tuple[RowOrigin, ...]
    software: dict[str, str]
    probe: dict[str, float] = Field(default_factory=dict)
    """One shape and the ``seconds`` predicted for it when it was fitted: a law or datasheet that was changed since, so
    that the parameters no longer mean the same, is found by it."""
    kernel_source_sha256: str | None = None
    """Hash (or its beginning) of kvsim's own kernel as it was measured; None for kernels of others."""

    @property
    def file_name(self) -> str:
        """Name of its file, which carries the hash."""
        key = (self.device, self.operation, self.kernel, self.version, self.dtype, self.kv_dtype)
        return artefact_file_name(key, self.id)

    @property
    def is_stale(self) -> bool:
        """Whether kvsim's own kernel was changed since it was measured; False for kernels of others."""
        return self.kernel_source_sha256 is not None and is_stale_source(self.kernel_source_sha256)

    def _stated(self) -> dict[str, Any]:
        # Defaults are left out, so that a field added later does not change the hash of what is there already.
        return {"schema_version": self.schema_version, **self.model_dump(mode="json", exclude_defaults=True)}

    def save(self, folder: Path) -> Path:
        """Write to ``folder/<device>/<file name>``; an artefact that exists already is left as it is."""
        path = folder / self.device / self.file_name
        if not path.exists():
            self.write_sealed(path)
        return path

    def predictor(self, facts: DeviceFacts) -> Predictor:
        """Make it ready to predict on its device (or, transferred, on another with the same law)."""
        return Predictor(self, facts)


def artefact_file_name(key: tuple[str, str, str, str, str, str], artefact_id: str) -> str:
    """Name of the file that holds the artefact of a key (KEY_COLUMNS), without its device's folder."""
    words = [re.sub(r"[^A-Za-z0-9.]+", "_", word)[:MAX_WORD_CHARACTERS] for word in key[1:] if word]
    return f"{'-'.join(words)}-{artefact_id}.json"


def load_artefact(path: Path) -> Artefact:
    """Read an artefact and check its hash.

    Raises
    ------
    InvalidSpec
        The file is not an artefact of this schema.
    CalibrationError
        It comes from a later kvsim, or was changed after it was written.
    """
    return load_sealed(Artefact, path, "fit again with `kvsim calibrate`")


@dataclass(frozen=True)
class _Ready:
    selector: Mapping[str, int]
    fitted: FittedLaw


class Predictor:
    """Seconds and bands of an artefact's operation."""

    def __init__(self, artefact: Artefact, facts: DeviceFacts) -> None:
        self.artefact = artefact
        self.facts = facts
        law = law_for(artefact.operation)
        if law.name != artefact.law:
            msg = f"artefact {artefact.id} was fitted with law {artefact.law}; this kvsim has {law.name}: fit again"
            raise CalibrationError(msg)
        self.law = law
        self.key = {
            name: str(getattr(artefact, name))
            for name in ("device", "operation", "kernel", "version", "dtype", "kv_dtype")
        }
        self._parts = tuple(_Ready(part.selector, self._fitted(part)) for part in artefact.parts)

    def _fitted(self, part: Part) -> FittedLaw:
        return FittedLaw(
            law=self.law,
            key=self.key,
            facts=self.facts,
            parameters=part.cold,
            correction=part.correction.unpack() if part.correction else None,
            cached=part.cached,
        )

    def seconds(self, shape: Shape) -> FloatArray:
        """Seconds of each row of `shape`; each row is served by the nearest part."""
        distance = np.stack([self.law.category_distance(part.selector, shape) for part in self._parts])
        nearest = distance.argmin(0)
        result = np.empty(len(nearest))
        for index, part in enumerate(self._parts):
            mine = nearest == index
            if mine.any():
                result[mine] = part.fitted.seconds({name: column[mine] for name, column in shape.items()})
        return result

    def band(self, shape: Shape) -> tuple[FloatArray, FloatArray]:
        """Factors (low, high) on `seconds` that hold the stated share of measurements."""
        share = cold_share(self.law, shape, self.key, self.facts)
        bands = self.artefact.bands
        cold = bands.get("cold") or bands.get("cached") or UNTESTED_BAND
        cached = bands.get("cached") or cold
        low = share * cold.log_low + (1.0 - share) * cached.log_low
        high = share * cold.log_high + (1.0 - share) * cached.log_high
        return np.exp(np.minimum(low, 0.0)), np.exp(np.maximum(high, 0.0))

    def in_domain(self, shape: Shape) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether each row lies within the rows fitted, column by column."""
        rows = len(next(iter(shape.values())))
        inside = np.ones(rows, dtype=bool)
        for name, (low, high) in self.artefact.domain.items():
            inside &= (shape[name] >= low) & (shape[name] <= high)
        return inside
