"""Engine-level fits: a few parameters for devices without kernel tables, from published token rates of whole engines.

Each device has one file in ``calibration/engine``, named by device and content. It lists the rows it was made from, so
that validation leaves them out, and its band comes from leaving one row out at a time: wider than a kernel's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from kvsim.calibration.sealed import SealedSpec, load_sealed
from kvsim.data_files import data_dir
from kvsim.errors import CalibrationError
from kvsim.specs.base import Basis, Spec

if TYPE_CHECKING:
    from kvsim.cost.rates import Rates

FOLDER = "calibration/engine"
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


class ShareRange(Spec):
    """An efficiency and its band; ``low`` is the slow end."""

    value: Share
    low: Share
    high: Share

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self)
        return self


class SecondsRange(Spec):
    """A duration in seconds and its band; ``low`` is the fast end."""

    value: Seconds
    low: Seconds
    high: Seconds

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self)
        return self


def _check_order(found: ShareRange | SecondsRange) -> None:
    if not found.low <= found.value <= found.high:
        msg = "low <= value <= high must hold"
        raise ValueError(msg)


class TableRow(Spec):
    """A row of a published table."""

    file: str
    """Name without folder."""
    row: Annotated[int, Field(gt=0)]
    """Counted from 1 below the header."""


class EngineErrors(Spec):
    """Predicted over measured time, minus 1, of rows that the fit had not seen; None where there are none."""

    n: int
    median_ape: float | None
    p90_ape: float | None
    bias: float | None


class EngineFit(SealedSpec):
    """What engines reach on one device, over everything that a step does.

    ``basis`` is ``fitted`` where rows are this device's own, ``transferred`` where they are another's of its vendor.
    """

    device: str
    basis: Literal[Basis.FITTED, Basis.TRANSFERRED]
    note: str
    """Begins with "engine level"; says what is assumed."""
    stream_efficiency: ShareRange
    """Share of peak bandwidth at which weights and KV are read."""
    layer_overhead_s: SecondsRange
    """Seconds per layer and step that neither bandwidth nor FLOPs explain."""
    prefill_efficiency: ShareRange
    """Share of the dense 16-bit (or native) rate in matrix products."""
    coverage: float
    """Share of rows that ``low`` to ``high`` is made to hold."""
    left_one_out: dict[Literal["decode", "prefill"], EngineErrors]
    """Rows of the fit, each predicted from the others; the band comes from these."""
    other_rows: dict[Literal["decode", "prefill"], EngineErrors]
    """Rows that were never used."""
    rows: tuple[TableRow, ...]
    origins: tuple[str, ...]
    """Source and licence, as the rows state them."""
    software: dict[str, str]

    def applied(self, rates: Rates, elementwise_kernels_per_layer: int) -> Rates:
        """Put this fit in the place of priors, as `apply_engine_fit`."""
        return apply_engine_fit(rates, self, elementwise_kernels_per_layer)

    def save(self, folder: Path) -> Path:
        """Write to ``folder/<device>-<id>.json``."""
        path = folder / f"{self.device}-{self.id}.json"
        self.write_sealed(path)
        return path


def load_engine_fit(path: Path) -> EngineFit:
    """Read a fit and check its hash.

    Raises
    ------
    InvalidSpec
        The file is not an engine-level fit of this schema.
    CalibrationError
        It comes from a later kvsim, or was changed after it was written.
    """
    return load_sealed(EngineFit, path, "run tools/fit_engine_tables.py")


@lru_cache(maxsize=4)
def load_engine_fits(folder: Path | None = None) -> dict[str, EngineFit]:
    """Read every fit by device, from the shipped folder where none is named.

    Raises
    ------
    CalibrationError
        A device has two, or as `load_engine_fit`.
    """
    fits: dict[str, EngineFit] = {}
    place = folder or data_dir(FOLDER)
    for path in sorted(place.glob("*.json")) if place.is_dir() else ():
        fit = load_engine_fit(path)
        if fit.device in fits:
            msg = f"{path}: a second engine-level fit of {fit.device}; keep one"
            raise CalibrationError(msg)
        fits[fit.device] = fit
    return fits


def engine_fit(device: str) -> EngineFit | None:
    """Give a device's engine-level fit, None where it has none."""
    return load_engine_fits().get(device)


def used_rows(fits: Iterable[EngineFit] | None = None) -> frozenset[tuple[str, int]]:
    """(file name, row from 1) of every row that a shipped fit was made from; validation leaves them out."""
    chosen = load_engine_fits().values() if fits is None else fits
    return frozenset((row.file, row.row) for fit in chosen for row in fit.rows)


def apply_engine_fit(rates: Rates, fit: EngineFit, elementwise_kernels_per_layer: int) -> Rates:
    """Put a fit in the place of priors, at the edge that `rates` were built for.

    Attention keeps its prior's ratio to matrix products. The overhead of a layer is spread over its elementwise
    launches, which every step pays; launches of other kernels stay as they were, as they did in the fit.
    """
    side = {"central": ("value", "value"), "optimistic": ("high", "low"), "pessimistic": ("low", "high")}
    share, duration = side[rates.edge.value]
    bandwidth = rates.device.bandwidth_bytes_per_s * getattr(fit.stream_efficiency, share)
    matmul: float = getattr(fit.prefill_efficiency, share)
    return replace(
        rates,
        stream_bytes_per_s=bandwidth,
        weight_bytes_per_s=bandwidth,
        matmul_efficiency=matmul,
        attention_flops_per_s=rates.attention_flops_per_s * matmul / rates.matmul_efficiency,
        elementwise_launch_s=getattr(fit.layer_overhead_s, duration) / elementwise_kernels_per_layer,
    )
