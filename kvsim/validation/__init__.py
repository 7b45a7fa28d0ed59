"""Predictions against measurements: one suite per kind of data, each with counted exclusions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, cast

from kvsim.device_catalog import load_device
from kvsim.errors import UnknownName
from kvsim.validation.suite import Options, Result, Score, Skipped, Suite

_MODULES: Final[Mapping[str, str]] = {
    "kernel-timings": "kernel_timings",
    "vllm-serving": "vllm_serving",
    "vllm-requests": "vllm_requests",
    "engine-tables": "engine_tables",
    "kv-quant": "kv_quant",
    "edge": "edge",
}
SUITES: Final = tuple(_MODULES)
"""Names of all suites."""


def load_suite(name: str) -> Suite:
    """Give a suite by name; only its own module is imported.

    Raises
    ------
    UnknownName
        No suite has that name.
    """
    if name not in _MODULES:
        raise UnknownName(kind="suite", name=name, known=SUITES)
    return cast("Suite", import_module(f"kvsim.validation.{_MODULES[name]}").SUITE)


def run_suite(name: str, data: Path, options: Options | None = None) -> Result:
    """Score one suite.

    Raises
    ------
    UnknownName
        The suite, or the device of ``as_unseen``, is not known.
    InvalidSpec
        The data is not there or not of the suite's format.
    CalibrationError
        The calibration set is missing or not to be trusted.
    """
    suite, options = load_suite(name), options or Options()
    if options.as_unseen is not None:
        device = load_device(options.as_unseen).spec.name
        options = Options(device, options.calibration, options.workers, options.progress)
    return suite.run(data, options)


__all__ = ["SUITES", "Options", "Result", "Score", "Skipped", "Suite", "load_suite", "run_suite"]
