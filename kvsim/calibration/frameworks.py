"""A calibration set as one serving engine uses it: its own kernels before those of other engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from kvsim.calibration.choice import default_ids
from kvsim.calibration.sets import CalibrationSet, Pin

ATTENTION: Final = ("decode_attention", "prefill_attention", "mla_decode", "mla_prefill")
COLLECTIVES: Final = ("all_reduce",)
RUN_AS_TIMED: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": (*ATTENTION, *COLLECTIVES, "gemm"),
    "sglang": (*ATTENTION, *COLLECTIVES, "gemm"),
    # TensorRT-LLM's linear layers were timed without the scales of a checkpoint and without tuning
    # (aiconfigurator collector/trtllm/collect_gemm.py): FP8 rows hold the kernels that find a tensor's scale, 12 us at
    # the smallest shapes where other engines take 5, and NVFP4 rows the tactic that is taken where none was tuned.
    "trtllm": (*ATTENTION, *COLLECTIVES),
}
"""Operations whose public timings are of what the framework runs when it serves."""
MAX_KEPT: Final = 64
_KEPT: dict[tuple[int, str, str, tuple[str, ...]], tuple[CalibrationSet, CalibrationSet]] = {}
"""Derived sets; the set that each comes from is kept too, so that ids stay theirs and ready kernels are found again."""


def preferring(
    calibration: CalibrationSet, device: str, framework: str, operations: tuple[str, ...] | None = None
) -> CalibrationSet:
    """Let ``auto`` take a framework's kernels on a device, for each operation and format that it was timed on.

    Which of several it takes is decided as among all frameworks (`kvsim.calibration.choice`). What the framework has
    no kernel for stays as it is. Raises CalibrationError as `CalibrationSet.load`.

    Parameters
    ----------
    framework : str
        Begin of the kernels' names, such as ``sglang``.
    operations : tuple of str, optional
        Operations to choose for; None are those of `RUN_AS_TIMED`, and none of a framework without an entry.
    """
    wanted = RUN_AS_TIMED.get(framework, ()) if operations is None else operations
    key = (id(calibration), device, framework, wanted)
    found = _KEPT.get(key)
    if found is None or found[0] is not calibration:
        if len(_KEPT) >= MAX_KEPT:
            _KEPT.clear()
        own = [
            pin
            for pin in calibration.pins
            if pin.device == device and pin.operation in wanted and pin.kernel.startswith(f"{framework}/")
        ]
        found = _KEPT[key] = (calibration, _taking(calibration, own))
    return found[1]


def _taking(calibration: CalibrationSet, own: list[Pin]) -> CalibrationSet:
    """Make the best of `own` the default of each of their formats."""
    taken = default_ids([calibration.load(pin) for pin in own])
    formats = {_format(pin) for pin in own}

    def chosen(pin: Pin) -> Pin:
        return pin.model_copy(update={"default": pin.id in taken}) if _format(pin) in formats else pin

    return replace(calibration, pins=tuple(chosen(pin) for pin in calibration.pins))


def _format(pin: Pin) -> tuple[str, str, str, str]:
    return (pin.device, pin.operation, pin.dtype, pin.kv_dtype)
