"""kvsim's own kernels where they were compiled but never run: clocks from machine code, the rest from measured kernels.

An entry of ``calibration/compiled`` says how many clocks of a multiprocessor the busiest pipe needs for a token and KV
head. Launch, streaming efficiency and how the two overlap are those of plain decode attention on the same device, or
transferred to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from kvsim.calibration.artefact import COVERAGE, Artefact, Band, Part, Predictor
from kvsim.calibration.choice import default_ids
from kvsim.calibration.facts import device_facts
from kvsim.calibration.fit import cold_share
from kvsim.calibration.kv_formats import bytes_per_element
from kvsim.calibration.laws.decode_attention import ELEMENTS_PER_CLOCK
from kvsim.calibration.shapes import sample_shapes
from kvsim.calibration.staleness import OWN_KERNELS
from kvsim.calibration.transfer import transferred_artefact
from kvsim.device_catalog import load_device
from kvsim.specs.base import Basis
from kvsim.specs.device import DeviceSpec

OPERATION: Final = "decode_attention"
COST_UNIT: Final = "token_kv_head"
COMPILE_CASE: Final = "llama-3-8b"
ELEMENTS_PER_UNIT: Final = 256.0
"""K and V of one token and KV head at head size 128, that of COMPILE_CASE; other sizes take clocks in proportion."""
NEAREST_TARGET: Final[Mapping[str, str]] = {
    "sm_86": "sm_80", "sm_87": "sm_80", "sm_89": "sm_80", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120",
    "gfx950": "gfx942", "gfx90a": "gfx942",
}  # fmt: skip
"""Targets whose clocks stand for those of a target that was not compiled: the nearest with the same instructions."""
PIPE_EFFICIENCY: Final = 0.6
"""Share of the busiest pipe's peak that a kernel reaches, where no kernel of kvsim was measured. A judgement: the count
leaves out latencies and stalls; SGLang's Triton kernel, counted in the same way, lay between 0.4 and 0.9."""
UNMEASURED_LOG: Final = (-0.45, 0.60)
MEASURED_LOG: Final = (-0.25, 0.35)
"""Bands (natural logarithm) of the instruction term's error, before and after a kernel of that format was measured on
another device; judgements until enough devices are measured to leave one out."""
EFFICIENCIES: Final = np.exp(np.linspace(np.log(0.1), 0.0, 47))
ROWS: Final = 120


def compiled_predictor(entry: Mapping[str, Any], spec: DeviceSpec, artefacts: Sequence[Artefact]) -> Predictor | None:
    """Predict decode attention over a format by kvsim's kernel; None where it does not compile for the device.

    Parameters
    ----------
    entry : mapping
        One file of ``calibration/compiled``: a variant of decode attention, counted per token and KV head.
    artefacts : sequence of Artefact
        Those of a set: plain kernels on this device or others, and kvsim's own where they were measured.
    """
    artefact = compiled_artefact(entry, spec, artefacts)
    return artefact.predictor(device_facts(spec)) if artefact is not None else None


def compiled_artefact(entry: Mapping[str, Any], spec: DeviceSpec, artefacts: Sequence[Artefact]) -> Artefact | None:
    """Give the artefact behind `compiled_predictor`: basis ``compiled``."""
    clocks = clocks_per_unit(entry, spec)
    kv_format = entry.get("kv_format")
    if clocks is None or not isinstance(kv_format, str) or not _is_known(kv_format):
        return None
    plain = _plain_kernel(spec, artefacts)
    if plain is None:
        return None
    learned = [
        found
        for one in artefacts
        if one.operation == OPERATION and one.kernel.startswith(OWN_KERNELS) and one.kv_dtype == kv_format
        if one.device != spec.name and (found := _efficiency_of(one, entry, artefacts)) is not None
    ]
    efficiency = float(np.exp(np.mean(np.log(learned)))) if learned else PIPE_EFFICIENCY
    rate = efficiency * ELEMENTS_PER_UNIT / (clocks * ELEMENTS_PER_CLOCK)
    low, high = MEASURED_LOG if learned else UNMEASURED_LOG
    bands = {
        domain: Band(coverage=COVERAGE, log_low=min(band.log_low, low), log_high=max(band.log_high, high))
        for domain, band in plain.bands.items()
    }
    source = str(entry["source_sha256"])
    return plain.model_copy(
        update={
            "device": spec.name,
            "kernel": f"{OWN_KERNELS}{entry['form']}",
            "version": source[:12],
            "kv_dtype": kv_format,
            "basis": Basis.COMPILED,
            "parts": tuple(_with_rate(part, rate) for part in plain.parts),
            "bands": bands,
            "held_out": {},
            "kernel_source_sha256": source,
        }
    )


def clocks_per_unit(entry: Mapping[str, Any], spec: DeviceSpec) -> float | None:
    """Clocks of a multiprocessor's busiest pipe per token and KV head, by the best configuration.

    None where the entry has no such count: another operation, unit or shape, a target that it does not support, or
    machine code in which something has no price or a loop was counted once.
    """
    if (entry.get("operation"), entry.get("cost_unit"), entry.get("compile_case")) != (
        OPERATION,
        COST_UNIT,
        COMPILE_CASE,
    ):
        return None
    targets = entry.get("targets", {})
    wanted = spec.compile_target or ""
    section = targets.get(wanted) or targets.get(NEAREST_TARGET.get(wanted, ""))
    counts = [config["count"] for config in (section or {}).get("configs", ()) if "count" in config]
    whole = [count for count in counts if not count["unpriced"] and not count["loops_counted_once"]]
    return min((max(count["clocks"].values()) for count in whole), default=None)


def _is_known(kv_format: str) -> bool:
    try:
        bytes_per_element(kv_format)
    except KeyError:
        return False
    return True


def _plain_kernel(spec: DeviceSpec, artefacts: Sequence[Artefact]) -> Artefact | None:
    """Decode attention over bf16 KV: kvsim's own kernel on the device, else its default, else transferred."""
    wanted = (spec.name, OPERATION, "bf16")
    mine = [
        one
        for one in artefacts
        if (one.device, one.operation, one.dtype) == wanted and one.kv_dtype in ("bf16", "native")
    ]
    own = [one for one in mine if one.kernel.startswith(OWN_KERNELS)]
    if mine:
        defaults = default_ids(own or mine)
        return next(one for one in own or mine if one.id in defaults)
    return transferred_artefact(artefacts, spec, OPERATION, "bf16", "bf16")


def _with_rate(part: Part, rate: float) -> Part:
    def changed(parameters: Mapping[str, float] | None) -> dict[str, float] | None:
        return None if parameters is None else {**parameters, "unpack_rate": float(f"{rate:.6g}")}

    return part.model_copy(update={"cold": changed(part.cold), "cached": changed(part.cached), "correction": None})


def _efficiency_of(own: Artefact, entry: Mapping[str, Any], artefacts: Sequence[Artefact]) -> float | None:
    """Share of the busiest pipe that a measured kernel of kvsim reaches: what fits its cold calls best."""
    spec = load_device(own.device).spec
    clocks, plain = clocks_per_unit(entry, spec), _plain_kernel(spec, artefacts)
    if clocks is None or plain is None:
        return None
    facts = device_facts(spec)
    measured = own.predictor(facts)
    shape, seconds = sample_shapes(measured, {}, ROWS)
    cold = cold_share(measured.law, shape, measured.key, facts) >= 1.0
    if not cold.any():
        return None
    cold_shape = {name: column[cold] for name, column in shape.items()}
    errors = []
    for efficiency in EFFICIENCIES:
        rate = float(efficiency) * ELEMENTS_PER_UNIT / (clocks * ELEMENTS_PER_CLOCK)
        parts = tuple(_with_rate(part, rate) for part in plain.parts)
        trial = plain.model_copy(update={"kv_dtype": own.kv_dtype, "parts": parts})
        predicted = Predictor(trial, replace(facts)).seconds(cold_shape)
        errors.append(np.median(np.abs(np.log(predicted / seconds[cold]))))
    return float(EFFICIENCIES[int(np.argmin(errors))])
