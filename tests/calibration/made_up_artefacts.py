"""Artefacts fitted to made-up rows of a known law: what stores and sets are tested on without any measurement."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from kvsim.calibration.artefact import Artefact
from kvsim.calibration.build import fit_artefacts
from kvsim.calibration.sets import pins_of, set_text
from kvsim.calibration.timings import Origin, Timings
from kvsim.device_catalog import load_device


def gemm_timings(
    device: str = "h100-sxm", kernel: str = "vllm/linear", version: str = "1.0", *, dtype: str = "bf16",
    rows_per_shape: int = 8, slowness: float = 1.0,
) -> Timings:  # fmt: skip
    """Rows of a roofline with a launch: 10 weight shapes, batches in powers of two."""
    n, k = (axis.ravel() for axis in np.meshgrid([1024, 2048, 4096, 8192, 16384], [2048, 4096]))
    m = 2 ** np.arange(rows_per_shape)
    rows = [(int(b), int(x), int(y)) for x, y in zip(n, k, strict=True) for b in m]
    work = np.asarray(rows, dtype=float)
    moved_s = 2.0 * (work[:, 1] * work[:, 2] + work[:, 0] * (work[:, 1] + work[:, 2])) / 3.35e12
    computed_s = 2.0 * work.prod(1) / 989e12
    seconds = slowness * (5e-6 + 1.2 * np.maximum(moved_s, computed_s))
    frame = pl.DataFrame(rows, schema=["m", "n", "k"], orient="row").with_columns(seconds=pl.Series(seconds))
    keys = {"device": device, "operation": "gemm", "kernel": kernel, "version": version, "dtype": dtype, "kv_dtype": ""}
    frame = frame.select(*(pl.lit(value).alias(name) for name, value in keys.items()), "m", "n", "k", "seconds")
    return Timings("gemm", frame, origins=(Origin("made_up.csv", "0" * 64, "made up for tests", "CC0-1.0"),))


@cache
def gemm_artefact(
    device: str = "h100-sxm", kernel: str = "vllm/linear", version: str = "1.0", slowness: float = 1.0,
    dtype: str = "bf16",
) -> Artefact:  # fmt: skip
    pytest.importorskip("scipy")
    timings = gemm_timings(device, kernel, version, slowness=slowness, dtype=dtype)
    (artefact,), excluded = fit_artefacts(timings, load_device(device).spec)
    assert not excluded
    return artefact


def write_set(folder: Path, *artefacts: Artefact, defaults: tuple[Artefact, ...] = (), name: str = "mine") -> Path:
    """Write artefacts and a set that pins them, in the layout of ``calibration/``."""
    for artefact in artefacts:
        artefact.save(folder / "fitted")
    path = folder / "sets" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(set_text(name, pins_of(artefacts, {one.id for one in defaults})))
    return path
