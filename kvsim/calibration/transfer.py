"""A device never measured: parameters learned on other devices, applied to its datasheet.

Donors are one kernel of each measured device. Their fitted laws stand in for their rows: the law is fitted once more
to what they predict on shapes inside their domains, for all of them together, so that a parameter is held by the
devices on which its term binds. Correction tables are left out: they helped no device that was left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from kvsim.calibration.artefact import Artefact, HeldOut, Part, Predictor, RowOrigin
from kvsim.calibration.choice import default_ids
from kvsim.calibration.facts import DeviceFacts, device_facts
from kvsim.calibration.fit import MIN_ROWS, cold_share
from kvsim.calibration.laws import law_for
from kvsim.calibration.laws.base import FloatArray, Law, Shape
from kvsim.calibration.pooled import DeviceRows, fit_pooled
from kvsim.calibration.shapes import sample_shapes
from kvsim.calibration.staleness import OWN_KERNELS
from kvsim.calibration.transfer_errors import transfer_bands, transfer_errors
from kvsim.device_catalog import load_device
from kvsim.errors import UnknownName
from kvsim.specs.base import Basis
from kvsim.specs.device import DeviceSpec

AUTO: Final = "auto"
VERSION: Final = "transferred"
SAME_ARCHITECTURE: Final = 2.0
SAME_FAMILY: Final = 2.0
"""Factors on a donor's weight. Errors with one device left out hardly depend on them: 1, 2, 4 and 16 were tried for
each, and a factor per octave of bandwidth, for vendor and for kind of memory, which did not help at all."""
SAME_CODE: Final = 16.0
"""Factor in the place of both where kernel and architecture are the same: the same machine code, whose instruction
terms no other kernel shares (FA3 over fp8 KV runs at one rate on H100 and H200, whatever the bandwidth)."""
ROWS_PER_PART: Final = 160
FAMILIES: Final[tuple[tuple[str, str], ...]] = (
    ("fa4", "fa4"), ("fa3", "fa3"), ("triton", "triton"), ("trtllm", "trtllm|torch_flow"), ("flashinfer", "flashinfer"),
    ("fa2", "flash_att"), ("deepgemm", "deepgemm"), ("cutlass", "cutlass|scaled_mm"), ("torch", "torch|sglang|default"),
)  # fmt: skip
"""Families of kernels by what their names contain, the first that matches; others are families of their own."""


@dataclass(frozen=True)
class Donor:
    """A measured kernel and how much it says about another device; weights of all donors sum to 1."""

    artefact: Artefact
    weight: float


def kernel_family(kernel: str) -> str:
    """Family of a kernel, whatever engine carries it: ``sglang/fa3`` and ``vllm/flash_attn_fa3`` are ``fa3``."""
    name = kernel.rpartition("/")[2]
    return next((family for family, pattern in FAMILIES if re.search(pattern, name)), name)


def find_donors(
    artefacts: Iterable[Artefact], spec: DeviceSpec, operation: str, dtype: str, kv_dtype: str, kernel: str = AUTO
) -> tuple[Donor, ...]:
    """Choose one kernel of each other device: of the same family where a kernel is named, else its default.

    Formats must be the same. kvsim's own kernels are no donors: their compiled clocks say more.
    """
    wanted = (operation, dtype, kv_dtype)
    found = [
        one
        for one in artefacts
        if (one.operation, one.dtype, one.kv_dtype) == wanted
        and one.device != spec.name
        and one.basis is Basis.FITTED
        and not one.kernel.startswith(OWN_KERNELS)
    ]
    chosen: list[Donor] = []
    for device in dict.fromkeys(one.device for one in found):
        mine = [one for one in found if one.device == device]
        related = [one for one in mine if kernel != AUTO and one.kernel == kernel.partition("@")[0]] or [
            one
            for one in mine
            if kernel != AUTO and kernel_family(one.kernel) == kernel_family(kernel.partition("@")[0])
        ]
        defaults = default_ids(related or mine)
        taken = next(one for one in mine if one.id in defaults)
        chosen.append(Donor(taken, _weight(taken, spec, kernel.partition("@")[0], related=bool(related))))
    total = sum(donor.weight for donor in chosen)
    return tuple(replace(donor, weight=donor.weight / total) for donor in chosen)


def _weight(donor: Artefact, spec: DeviceSpec, kernel: str, *, related: bool) -> float:
    same_architecture = _device(donor.device).architecture == spec.architecture
    if same_architecture and donor.kernel == kernel:
        return SAME_CODE
    return (SAME_ARCHITECTURE if same_architecture else 1.0) * (SAME_FAMILY if related else 1.0)


def transferred(
    artefacts: Sequence[Artefact], spec: DeviceSpec, operation: str, dtype: str, kv_dtype: str, *, kernel: str = AUTO
) -> Predictor | None:
    """Predict an operation on a device from artefacts of others; None where no other device has the format.

    Parameters
    ----------
    artefacts : sequence of Artefact
        Those of a set; any of `spec` itself are left out.
    kernel : str
        Kernel whose family is looked for on other devices, or ``auto`` for their defaults.
    """
    artefact = transferred_artefact(artefacts, spec, operation, dtype, kv_dtype, kernel=kernel)
    return artefact.predictor(device_facts(spec)) if artefact is not None else None


def transferred_artefact(
    artefacts: Sequence[Artefact], spec: DeviceSpec, operation: str, dtype: str, kv_dtype: str, *, kernel: str = AUTO
) -> Artefact | None:
    """Give the artefact behind `transferred`: basis ``transferred``, bands of devices that were left out in turn."""
    donors = find_donors(artefacts, spec, operation, dtype, kv_dtype, kernel)
    if not donors:
        return None
    law = law_for(operation)
    wanted = (operation, dtype, kv_dtype)
    errors = transfer_errors(*wanted, spec.name)
    nearest = max(donors, key=lambda donor: donor.weight).artefact
    return Artefact(
        device=spec.name,
        operation=operation,
        kernel=nearest.kernel if kernel == AUTO else kernel.partition("@")[0],
        version=VERSION,
        dtype=dtype,
        kv_dtype=kv_dtype,
        basis=Basis.TRANSFERRED,
        law=law.name,
        parts=tuple(_pooled_part(law, donors, selector) for selector in _selectors(law, donors)),
        domain=_joint_domain(donors),
        rows=sum(donor.artefact.rows for donor in donors),
        held_out={"cold": HeldOut.model_validate(errors)} if errors else {},
        bands=transfer_bands(*wanted, spec.name),
        origins=tuple(_origins(donors)),
        software=nearest.software,
    )


def _origins(donors: Sequence[Donor]) -> Iterable[RowOrigin]:
    return dict.fromkeys(origin for donor in donors for origin in donor.artefact.origins)


def _joint_domain(donors: Sequence[Donor]) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each column over all donors."""
    domains = [donor.artefact.domain for donor in donors]
    return {name: (min(one[name][0] for one in domains), max(one[name][1] for one in domains)) for name in domains[0]}


def _selectors(law: Law, donors: Sequence[Donor]) -> list[dict[str, int]]:
    """Categories that any donor has; the law is fitted for each, from the nearest category of donors without it.

    What only some frameworks split by (groups, windows) is not carried over.
    """
    parts = [part.selector for donor in donors for part in donor.artefact.parts]
    found = {tuple((name, one[name]) for name in law.categories if name in one) for one in parts}
    named = [dict(one) for one in sorted(found) if one]
    return named or [{}]


def _pooled_part(law: Law, donors: Sequence[Donor], selector: Mapping[str, int]) -> Part:
    """Fit one category, in the cold and cached domain where donors have shapes of both."""
    tables = [(donor, *_predicted(donor.artefact, tuple(selector.items()))) for donor in donors]
    cold = [_rows_of(donor, shape, seconds, is_cold) for donor, shape, seconds, is_cold in tables]
    cached = [_rows_of(donor, shape, seconds, ~is_cold) for donor, shape, seconds, is_cold in tables]
    both = [_weighted([rows for rows in domain if len(rows.seconds) >= MIN_ROWS]) for domain in (cold, cached)]
    first, *rest = [domain for domain in both if domain]
    parameters = fit_pooled(law, first)
    shared = {name: parameters[name] for name in law.per_item_parameters}
    return Part(
        selector=dict(selector),
        cold=_stored(parameters),
        cached=_stored(fit_pooled(law, rest[0], shared)) if rest else None,
    )


def _stored(parameters: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in parameters.items()}


def _weighted(rows: Sequence[DeviceRows]) -> list[DeviceRows]:
    total = sum(one.weight for one in rows)
    return [replace(one, weight=one.weight / total) for one in rows]


def _rows_of(donor: Donor, shape: Shape, seconds: FloatArray, part: npt.NDArray[np.bool_]) -> DeviceRows:
    facts, key = _facts(donor.artefact.device), _key(donor.artefact)
    return DeviceRows({name: column[part] for name, column in shape.items()}, seconds[part], facts, key, donor.weight)


_PREDICTED: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[Shape, FloatArray, npt.NDArray[np.bool_]]] = {}
MAX_KEPT: Final = 512


def _predicted(
    artefact: Artefact, selector: tuple[tuple[str, int], ...]
) -> tuple[Shape, FloatArray, npt.NDArray[np.bool_]]:
    """Shapes within an artefact's domain, what it predicts there, and which of them are cold."""
    key = (artefact.id, selector)
    if key not in _PREDICTED:
        if len(_PREDICTED) >= MAX_KEPT:
            _PREDICTED.clear()
        facts = _facts(artefact.device)
        predictor = artefact.predictor(facts)
        shape, seconds = sample_shapes(predictor, dict(selector), ROWS_PER_PART)
        _PREDICTED[key] = (shape, seconds, cold_share(predictor.law, shape, _key(artefact), facts) >= 1.0)
    return _PREDICTED[key]


def _key(artefact: Artefact) -> dict[str, str]:
    names = ("device", "operation", "kernel", "version", "dtype", "kv_dtype")
    return {name: str(getattr(artefact, name)) for name in names}


@lru_cache(maxsize=256)
def _device(name: str) -> DeviceSpec:
    try:
        return load_device(name).spec
    except UnknownName as error:
        error.locate("calibration artefact")
        raise


@lru_cache(maxsize=256)
def _facts(name: str) -> DeviceFacts:
    return device_facts(_device(name))
