"""How wrong transferred predictions are: errors of each measured device when everything measured on it is left out.

``calibration/transfer/errors.json`` holds quantiles per device: a band for a device comes from the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import Field

from kvsim.calibration.artefact import COVERAGE, Band, Domain
from kvsim.calibration.laws.base import FloatArray
from kvsim.data_files import data_dir
from kvsim.documents import load_json, validate
from kvsim.specs.base import Spec

LEVELS: Final = tuple(round(0.02 * step, 2) for step in range(51))
"""Quantile levels that are stored, 0 to 1."""
MIN_DEVICES: Final = 2
"""Other devices that a format needs to have a band of its own."""
UNKNOWN_LOG: Final = 0.7
"""Half-width (natural logarithm) of a band where no device was ever left out for an operation: a factor 2."""


class DeviceErrors(Spec):
    """One device left out, one operation, format and domain."""

    device: str
    operation: str
    kernel: str
    dtype: str
    kv_dtype: str
    domain: Domain
    n: Annotated[int, Field(gt=0)]
    median_ape: float
    p90_ape: float
    bias: float
    log_quantiles: tuple[float, ...] = Field(min_length=len(LEVELS), max_length=len(LEVELS))
    """Logarithm of measured over predicted at LEVELS."""


class ErrorsFile(Spec):
    """``calibration/transfer/errors.json``."""

    schema_version: Literal[1]
    note: str
    entries: tuple[DeviceErrors, ...]


@lru_cache(maxsize=1)
def load_errors() -> tuple[DeviceErrors, ...]:
    """Read the shipped errors; none where they are not there."""
    path = data_dir("calibration/transfer") / "errors.json"
    return validate(ErrorsFile, load_json(path), str(path)).entries if path.is_file() else ()


def others(
    entries: Sequence[DeviceErrors], operation: str, dtype: str, kv_dtype: str, device: str, domain: str = "cold"
) -> list[DeviceErrors]:
    """Entries of other devices with the format; of every format of the operation where too few have it."""
    mine = [one for one in entries if one.operation == operation and one.device != device and one.domain == domain]
    same = [one for one in mine if (one.dtype, one.kv_dtype) == (dtype, kv_dtype)]
    return same if len({one.device for one in same}) >= MIN_DEVICES else mine


def transfer_errors(operation: str, dtype: str, kv_dtype: str, device: str) -> dict[str, Any]:
    """Errors over other devices left out in turn: rows, and the mean over devices of median, p90 and bias."""
    found = others(load_errors(), operation, dtype, kv_dtype, device)
    if not found:
        return {}
    mean = {name: float(np.mean([getattr(one, name) for one in found])) for name in ("median_ape", "p90_ape", "bias")}
    return {"n": sum(one.n for one in found), **{name: float(f"{value:.6g}") for name, value in mean.items()}}


def transfer_bands(operation: str, dtype: str, kv_dtype: str, device: str) -> dict[Domain, Band]:
    """Bands for a device from the errors of the others, by domain."""
    bands: dict[Domain, Band] = {}
    domains: tuple[Domain, ...] = ("cold", "cached")
    for domain in domains:
        found = others(load_errors(), operation, dtype, kv_dtype, device, domain)
        if found:
            bands[domain] = band_of([np.asarray(one.log_quantiles) for one in found])
    return bands or {"cold": Band(coverage=COVERAGE, log_low=-UNKNOWN_LOG, log_high=UNKNOWN_LOG)}


def band_of(quantiles: list[FloatArray]) -> Band:
    """Band that holds the coverage of a new device's rows, from quantiles of devices that were left out.

    Devices count the same whatever their rows. With K devices the tails are taken at (K - 1) / (K + 1) of their nominal
    size: a conformal guarantee over devices (Dunn, Wasserman and Ramdas 2022) would need nine of them for 80 %, so this
    is a heuristic between the pooled quantile and the guarantee; its coverage is tested with each device left out.
    """
    count = len(quantiles)
    tail = (1.0 - COVERAGE) / 2.0 * max(0.0, count - 1.0) / (count + 1.0)
    pooled = np.sort(np.concatenate(quantiles))
    low, high = np.quantile(pooled, [tail, 1.0 - tail])
    # A single device says nothing about the spread between devices.
    extra = UNKNOWN_LOG / 2.0 if count == 1 else 0.0
    return Band(
        coverage=COVERAGE,
        log_low=float(f"{min(0.0, float(low)) - extra:.6g}"),
        log_high=float(f"{max(0.0, float(high)) + extra:.6g}"),
    )
