"""Rows that kvsim's own ``python -m kernels.measure`` wrote: ``rows.csv``, seconds.

Decode attention of a KV format becomes ``decode_attention`` (MLA's latent: ``mla_decode``) of kernel ``kvsim/best`` or
``kvsim/as_shipped``; every other variant becomes ``kernel`` under its own name, shaped by what it moves. Of an
operation's repeats the times in a CUDA graph count where there are any, as serving engines replay graphs, else the
events'; of several tilings the fastest.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import polars as pl

from kvsim.calibration.device_names import resolve_device
from kvsim.calibration.sources.frames import (
    LARGEST_EXACT,
    build_timings,
    check_columns,
    empty_frame,
    file_origin,
    keep,
    merge,
    nothing_found,
    read_csv,
    rename_devices,
)
from kvsim.calibration.timings import Excluded, Timings
from kvsim.errors import CalibrationError, InvalidSpec

FILE_NAME = "rows.csv"
ORIGIN = "kvsim kernels.measure"
LICENCE = "Apache-2.0"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
PART = "one launch of several"
INTERPRETER = "run in Triton's interpreter"
UNEVEN = "uneven contexts in one batch"
SLOWER_TILING = "slower tiling of the same shape"
EVENTS_BESIDE_GRAPH = "events where a graph was timed too"
LATENT_WIDTH = 576
COLUMNS = (
    "device", "basis", "gpu", "gpu_uuid", "driver", "torch", "triton", "python", "target", "source_sha256", "variant",
    "operation", "kv_format", "form", "case", "role", "shape", "config", "num_splits", "method", "part", "read_bytes",
    "written_bytes", "flops", "units", "cost_unit", "median_s", "p10_s", "p90_s", "host_s", "rounds", "runs", "spread",
    "sm_clock_mhz", "sm_clock_min_mhz", "memory_clock_mhz", "power_w", "temperature_c", "throttle_reasons", "flags",
    "taken_unix_s",
)  # fmt: skip
"""What ``kernels/measure/records.py`` writes."""
_TEXTS = (
    "basis", "gpu", "source_sha256", "variant", "operation", "kv_format", "form", "case", "shape", "config", "method",
    "part",
)  # fmt: skip
_WORK = ("read_bytes", "written_bytes", "flops", "units")
_HEADS = ("num_query_heads", "num_kv_heads", "head_dim", "context_lens")


def find_tables(folder: Path) -> list[Path]:
    """``rows.csv`` files under `folder`, sorted; `folder` itself where it is one."""
    if folder.is_file():
        return [folder] if folder.name == FILE_NAME else []
    return sorted(folder.rglob(FILE_NAME))


def read(
    folder: Path, devices: Collection[str] | None = None, operations: Collection[str] | None = None
) -> list[Timings]:
    """Read every ``rows.csv`` under `folder`; arguments and errors as in `aiconfigurator.read`."""
    wanted = None if devices is None else {resolve_device(name, "devices") for name in devices}
    paths = find_tables(folder)
    if not paths:
        raise nothing_found(folder, "rows.csv of kernels.measure")
    parts = [timings for path in paths for timings in _read_table(path, folder, wanted)]
    return merge([one for one in parts if operations is None or one.operation in operations])


def _read_table(path: Path, folder: Path, wanted: Collection[str] | None) -> list[Timings]:
    raw = _checked(path)
    excluded: list[Excluded] = []
    shown = ("variant", "case", "config", "method", "part")
    raw = keep(raw, pl.col("basis") == "measured", INTERPRETER, excluded, shown)
    raw = keep(raw, pl.col("part") == "total", PART, excluded, shown)
    raw = raw.with_columns(device=rename_devices(raw, "gpu", path))
    if wanted is not None:
        raw = raw.filter(pl.col("device").is_in(list(wanted)) | pl.col("device").is_null())
    if raw.is_empty():
        return [Timings("kernel", empty_frame("kernel"), tuple(excluded))]
    raw = _one_per_case(raw, excluded, shown)
    shapes = [_shape(text, path) for text in raw["shape"].to_list()]
    raw = raw.with_columns(
        dtype=pl.Series([DTYPES.get(str(shape.get("dtype")), str(shape.get("dtype", ""))) for shape in shapes]),
        _attends=pl.Series([_attends(row, shape, path) for row, shape in zip(raw["operation"], shapes, strict=True)]),
        _index=pl.int_range(pl.len()),
    )
    origins = [file_origin(path, folder, ORIGIN, LICENCE)]
    attention = raw.filter(pl.col("_attends"))
    parts = _attention(attention, [shapes[index] for index in attention["_index"]])
    others = build_timings("kernel", _kernels(raw.filter(~pl.col("_attends"))), excluded, origins)
    found = [one for name, frame, out in parts for one in build_timings(name, frame, out, origins)]
    return [*found, *others]


def _checked(path: Path) -> pl.DataFrame:
    raw = read_csv(path, texts=_TEXTS)
    unknown = [name for name in raw.columns if name not in COLUMNS]
    if unknown:
        msg = (
            f"{path}: column {unknown[0]!r} is not known: the rows come from a newer kvsim; read them with that version"
        )
        raise CalibrationError(msg)
    return check_columns(raw, path, texts=_TEXTS, numbers=("median_s",)).with_columns(
        pl.col(_TEXTS).fill_null(""), *(pl.col(name).cast(pl.Int64, strict=False) for name in _WORK)
    )


def _one_per_case(raw: pl.DataFrame, excluded: list[Excluded], shown: tuple[str, ...]) -> pl.DataFrame:
    """Keep one method and one tiling per shape of a kernel, and count the others."""
    same = ["device", "variant", "source_sha256", "case", "shape"]
    graph = (pl.col("method") == "graph").any().over([*same, "config"])
    raw = keep(raw, ~graph | (pl.col("method") == "graph"), EVENTS_BESIDE_GRAPH, excluded, shown)
    median = pl.col("median_s").median().over([*same, "config"])
    return keep(raw, median == median.min().over(same), SLOWER_TILING, excluded, shown)


def _shape(text: str, path: Path) -> dict[str, Any]:
    try:
        shape = json.loads(text)
    except json.JSONDecodeError as error:
        msg = f"{path}: column 'shape': not valid JSON: {text[:60]!r}"
        raise InvalidSpec(msg) from error
    if not isinstance(shape, dict):
        msg = f"{path}: column 'shape': an object is needed (got {text[:60]!r})"
        raise InvalidSpec(msg)
    return shape


def _attends(operation: str, shape: dict[str, Any], path: Path) -> bool:
    """Whether a row is of decode attention over a batch with heads; raise InvalidSpec where its sizes are none."""
    if operation != "decode_attention" or any(name not in shape for name in _HEADS):
        return False
    lengths = shape["context_lens"]
    sizes = [shape[name] for name in _HEADS[:-1]]
    sizes += [lengths.get("value"), lengths.get("count")] if isinstance(lengths, dict) else _listed(lengths)
    wrong = [size for size in sizes if not isinstance(size, int) or not 0 <= size <= LARGEST_EXACT]
    if wrong or lengths == []:
        msg = f"{path}: column 'shape': whole numbers are needed in {', '.join(_HEADS)} (got {shape!r:.120})"
        raise InvalidSpec(msg)
    return True


def _listed(lengths: Any) -> list[Any]:
    return list(lengths) if isinstance(lengths, list) else [lengths]


def _attention(raw: pl.DataFrame, shapes: list[dict[str, Any]]) -> list[tuple[str, pl.DataFrame, list[Excluded]]]:
    """Rows of decode attention and of MLA's, each with what was left out."""
    batches = [_batch(shape["context_lens"]) for shape in shapes]
    columns: dict[str, list[int | None]] = {
        "batch": [batch for batch, _ in batches], "context_tokens": [tokens for _, tokens in batches],
        "num_heads": [shape["num_query_heads"] for shape in shapes],
        "num_kv_heads": [shape["num_kv_heads"] for shape in shapes],
        "head_dim": [shape["head_dim"] for shape in shapes], "window_tokens": [0] * len(shapes),
    }  # fmt: skip
    frame = raw.with_columns(pl.Series(name, values, dtype=pl.Int64) for name, values in columns.items())
    excluded: list[Excluded] = []
    frame = keep(frame, pl.col("context_tokens").is_not_null(), UNEVEN, excluded, ("variant", "case"))
    latent = (pl.col("head_dim") == LATENT_WIDTH) & (pl.col("num_kv_heads") == 1)
    key = {
        "kernel": pl.lit("kvsim/") + pl.col("form"), "version": pl.col("source_sha256").str.slice(0, 12),
        "kv_dtype": pl.col("kv_format"), "seconds": pl.col("median_s"),
    }  # fmt: skip
    sizes = ("batch", "context_tokens", "num_heads")
    mla = frame.filter(latent).select("device", "dtype", *sizes, operation=pl.lit("mla_decode"), **key)
    rest = ("num_kv_heads", "head_dim", "window_tokens")
    whole = frame.filter(~latent).select("device", "dtype", *sizes, *rest, operation=pl.lit("decode_attention"), **key)
    return [("mla_decode", mla, []), ("decode_attention", whole, excluded)]


def _batch(lengths: Any) -> tuple[int, int | None]:
    """Requests and their common context; no context where they differ."""
    if isinstance(lengths, dict):
        return int(lengths["count"]), int(lengths["value"])
    values = _listed(lengths)
    return len(values), int(values[0]) if len(set(values)) == 1 else None


def _kernels(raw: pl.DataFrame) -> pl.DataFrame:
    return raw.select(
        "device", "dtype", *_WORK, operation=pl.lit("kernel"), kernel="variant",
        version=pl.col("source_sha256").str.slice(0, 12), kv_dtype="kv_format", seconds="median_s",
    )  # fmt: skip
