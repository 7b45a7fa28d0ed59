"""Kernel tables of aiconfigurator: ``<device>/<family>/<framework>/<version>/<table>.parquet``, latency in ms.

Checked against aiconfigurator-core 0.12.0: ``step`` of a generation row counts the tokens already cached, so attention
reads one more; ``num_heads`` of an MLA row is one rank's (times ``tp_size`` it is the model's 64 or 128);
``message_size`` counts elements, in custom all-reduce of two bytes, in NCCL and oneCCL of the dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import polars as pl

from kvsim.calibration.device_names import resolve_device
from kvsim.calibration.sources.frames import (
    MS,
    build_timings,
    check_columns,
    empty_frame,
    file_origin,
    keep,
    merge,
    nothing_found,
    read_parquet,
    rename_devices,
    rename_values,
)
from kvsim.calibration.timings import SHAPE_COLUMNS, Excluded, Timings
from kvsim.device_catalog import load_device
from kvsim.errors import CalibrationError, UnknownName

PACKAGE = "aiconfigurator_core"
ORIGIN = "aiconfigurator-core kernel tables (NVIDIA), github.com/ai-dynamo/aiconfigurator"
LICENCE = "Apache-2.0"
DTYPES: Mapping[str, str] = {
    "bfloat16": "bf16", "half": "fp16", "float16": "fp16", "fp8": "fp8", "fp8_block": "fp8_block", "nvfp4": "nvfp4",
    "int8": "int8", "int8_wo": "int8_wo", "int4_wo": "int4_wo", "sq": "sq",
}  # fmt: skip
"""Their dtypes, by ours: ``_wo`` multiplies bf16 by integer weights, ``sq`` is SmoothQuant (int8 by int8)."""
ELEMENT_BYTES: Mapping[str, int] = {"bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}

UNREAD_TABLE = "table of another operation"
WHOLE_MODULE = "whole MLA module, projections included"
OTHER_COLLECTIVE = "collective other than all-reduce"
BEAM_SEARCH = "beam search"
SEVERAL_NEW_TOKENS = "several new tokens per sequence"
OTHER_DEVICE = "rows of another device than their folder's"


@dataclass(frozen=True)
class _Table:
    """How one of their tables maps to one of our operations."""

    operation: str
    shape: Mapping[str, str | pl.Expr]
    """Our column by theirs, or by an expression of theirs."""
    integers: tuple[str, ...]
    dtype: str
    kv_dtype: str | None = None
    conditions: tuple[tuple[pl.Expr, str], ...] = ()
    """What a row must meet, and the reason why others are left out."""
    optional: Mapping[str, int] = field(default_factory=dict)
    """Integer columns that older tables lack, and what they then stand at."""
    library: str | None = None
    """Kernel, where ``framework`` names who ran it and not what ran."""

    def __post_init__(self) -> None:
        assert set(self.shape) == set(SHAPE_COLUMNS[self.operation])  # noqa: S101 - a table above is wrong


_HEADS: Mapping[str, str | pl.Expr] = {
    "num_heads": "num_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
}
_ATTENTION = ("batch_size", "isl", "step", "num_heads", "num_key_value_heads", "head_dim", "beam_width")
_MLA = ("batch_size", "isl", "step", "num_heads", "tp_size")
_ONE_BEAM = (pl.col("beam_width") == 1, BEAM_SEARCH)
_ONE_TOKEN = (pl.col("isl") == 1, SEVERAL_NEW_TOKENS)
_REDUCE = (pl.col("op_name") == "all_reduce", OTHER_COLLECTIVE)
_READ = pl.col("step") + pl.col("isl")
_BYTES = pl.col("message_size") * pl.col("dtype").replace_strict(ELEMENT_BYTES, default=None, return_dtype=pl.Int64)


def _collective(dtype: str, library: str | None = None) -> _Table:
    shape: Mapping[str, str | pl.Expr] = {"ranks": "num_gpus", "message_bytes": _BYTES}
    return _Table("all_reduce", shape, ("num_gpus", "message_size"), dtype, conditions=(_REDUCE,), library=library)


TABLES: Mapping[str, _Table] = {
    "generation_attention_perf": _Table(
        "decode_attention",
        {"batch": "batch_size", "context_tokens": _READ, "window_tokens": "window_size", **_HEADS},
        _ATTENTION, "attn_dtype", "kv_cache_dtype", (_ONE_BEAM, _ONE_TOKEN), {"window_size": 0},
    ),
    "context_attention_perf": _Table(
        "prefill_attention",
        {
            "batch": "batch_size", "prompt_tokens": "isl", "context_tokens": _READ, "window_tokens": "window_size",
            **_HEADS,
        },
        _ATTENTION, "attn_dtype", "kv_cache_dtype", (_ONE_BEAM,), {"window_size": 0},
    ),
    "generation_mla_perf": _Table(
        "mla_decode", {"batch": "batch_size", "context_tokens": _READ, "num_heads": "num_heads"},
        _MLA, "mla_dtype", "kv_cache_dtype", (_ONE_TOKEN,),
    ),
    "context_mla_perf": _Table(
        "mla_prefill",
        {"batch": "batch_size", "prompt_tokens": "isl", "context_tokens": _READ, "num_heads": "num_heads"},
        _MLA, "mla_dtype", "kv_cache_dtype",
    ),
    "gemm_perf": _Table("gemm", {"m": "m", "n": "n", "k": "k"}, ("m", "n", "k"), "gemm_dtype"),
    "custom_allreduce_perf": _collective("allreduce_dtype"),
    "nccl_perf": _collective("nccl_dtype", "nccl"),
    "oneccl_perf": _collective("nccl_dtype", "oneccl"),
}  # fmt: skip
"""Tables that are read, by file name."""
MODULE_TABLES: Mapping[str, tuple[str, str]] = {
    "mla_context_module_perf": ("mla_prefill", WHOLE_MODULE),
    "mla_generation_module_perf": ("mla_decode", WHOLE_MODULE),
}
"""Tables that are left out by name: the operation that they contain, and why."""


def installed_folder() -> Path:
    """Find the tables of the installed package aiconfigurator-core, without importing it.

    Raises
    ------
    CalibrationError
        The package is not installed, or holds no tables.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        msg = (
            "aiconfigurator-core is not installed: pip install 'kvsim[aiconfigurator]', or name a folder of its tables"
        )
        raise CalibrationError(msg)
    for location in spec.submodule_search_locations:
        folder = Path(location) / "systems" / "data"
        if folder.is_dir():
            return folder
    msg = f"{next(iter(spec.submodule_search_locations))}: aiconfigurator-core is installed, but without systems/data"
    raise CalibrationError(msg)


def read(
    folder: Path, devices: Collection[str] | None = None, operations: Collection[str] | None = None
) -> list[Timings]:
    """Read a tree, one device's folder or one file; links to folders are followed.

    Parameters
    ----------
    folder : Path
        A folder at any level of the layout, or one Parquet file.
    devices, operations : collection of str, optional
        Names to read (ours or aliases; keys of SHAPE_COLUMNS); all where None. Folders of other devices are not opened.

    Returns
    -------
    list of Timings
        One per device and table (copies of a table under several versions become one); not yet quarantined. What is
        left out on the way is in ``excluded``; a Timings without rows carries what no operation reads.

    Raises
    ------
    UnknownName
        A device is not in the catalogue.
    InvalidSpec
        A table cannot be read, lacks a column or holds a value that is not allowed.
    CalibrationError
        There is no table.
    """
    wanted = None if devices is None else {resolve_device(name, "devices") for name in devices}
    _check_operations(operations)
    paths = list(find_tables(folder))
    if not paths:
        raise nothing_found(folder, "Parquet table (<device>/<family>/<framework>/<version>/<table>.parquet)")
    if wanted is not None:
        paths = [path for path in paths if _folder_device(path) in (None, *wanted)]
    parts: list[Timings] = []
    for path in paths:
        table = TABLES.get(path.stem)
        if table is not None and (operations is None or table.operation in operations):
            parts.extend(_read_table(path, table, folder, wanted))
    unread = _left_out([path for path in paths if path.stem not in TABLES])
    parts.extend(one for one in unread if operations is None or one.operation in operations)
    return merge(parts)


def find_tables(folder: Path) -> Iterator[Path]:
    """Parquet files under `folder` in sorted order, through links to folders; `folder` itself where it is one."""
    if folder.is_file():
        yield from [folder] if folder.suffix == ".parquet" else []
        return
    seen: set[Path] = set()
    stack = [folder]
    while stack:
        place = stack.pop()
        if not place.is_dir() or place.resolve() in seen:
            continue
        seen.add(place.resolve())
        entries = sorted(place.iterdir())
        yield from (entry for entry in entries if entry.suffix == ".parquet" and entry.is_file())
        stack.extend(reversed([entry for entry in entries if entry.is_dir()]))


def _check_operations(operations: Collection[str] | None) -> None:
    for name in operations or ():
        if name not in SHAPE_COLUMNS:
            raise UnknownName(kind="operation", name=name, known=SHAPE_COLUMNS)


def _folder_device(path: Path) -> str | None:
    """Device by the folder four levels up, None where that is no device's name or that of several."""
    parents = path.absolute().parents
    if len(parents) <= 3:
        return None
    try:
        found = load_device(parents[3].name)
    except UnknownName:
        return None
    return None if found.notice else found.spec.name


def _left_out(paths: Sequence[Path]) -> list[Timings]:
    """Count the rows of tables that no operation of ours reads, one Timings without rows per operation."""
    left: dict[str, list[Excluded]] = {}
    for path in paths:
        operation, reason = MODULE_TABLES.get(path.stem, ("kernel", UNREAD_TABLE))
        left.setdefault(operation, []).append(Excluded(reason, read_parquet(path).height, path.name))
    return [Timings(operation, empty_frame(operation), tuple(excluded)) for operation, excluded in left.items()]


def _read_table(path: Path, table: _Table, root: Path, wanted: Collection[str] | None) -> list[Timings]:
    raw = read_parquet(path)
    framework = None if table.library else "framework"
    texts = [name for name in (table.dtype, table.kv_dtype, "kernel_source", "op_name", framework) if name]
    raw = check_columns(raw, path, integers=table.integers, numbers=("latency",), texts=texts)
    raw = _with_optional(raw, table, path)
    excluded: list[Excluded] = []
    for condition, reason in table.conditions:
        raw = keep(raw, condition, reason, excluded, [*table.integers, "op_name"])
    raw = raw.with_columns(
        device=rename_devices(raw, "device", path),
        dtype=rename_values(raw, table.dtype, DTYPES, path),
        kv_dtype=rename_values(raw, table.kv_dtype, DTYPES, path) if table.kv_dtype else pl.lit(""),
        kernel=_kernel(table),
    )
    if (device := _folder_device(path)) is not None:
        raw = keep(raw, pl.col("device") == device, OTHER_DEVICE, excluded, ["device"])
    if wanted is not None:
        raw = raw.filter(pl.col("device").is_in(list(wanted)) | pl.col("device").is_null())
    shape = {ours: pl.col(theirs) if isinstance(theirs, str) else theirs for ours, theirs in table.shape.items()}
    frame = raw.select(
        "device", pl.lit(table.operation).alias("operation"), "kernel", "version", "dtype", "kv_dtype",
        **shape, seconds=pl.col("latency") * MS,
    )  # fmt: skip
    return build_timings(table.operation, frame, excluded, [file_origin(path, root, ORIGIN, LICENCE)])


def _with_optional(raw: pl.DataFrame, table: _Table, path: Path) -> pl.DataFrame:
    """Fill in columns that older tables lack; the layout's folders stand for device and version."""
    parents = path.absolute().parents
    if "device" not in raw.columns and len(parents) > 3:
        raw = raw.with_columns(device=pl.lit(parents[3].name))
    if "version" not in raw.columns:
        raw = raw.with_columns(version=pl.lit(parents[0].name))
    raw = raw.with_columns(
        pl.lit(value).alias(name) for name, value in table.optional.items() if name not in raw.columns
    )
    raw = check_columns(raw, path, integers=tuple(table.optional), texts=("device", "version"))
    # A local build's suffix (+g20dc1caee.d20260430) says where it was built, not what.
    return raw.with_columns(pl.col("version").str.split("+").list.first())


def _kernel(table: _Table) -> pl.Expr:
    """``<framework>/<kernel>`` in lower case, without the framework's name once more before the kernel's."""
    if table.library:
        return pl.lit(f"{table.library}/all_reduce")
    framework = pl.col("framework").str.to_lowercase()
    source = pl.col("kernel_source").str.to_lowercase().str.replace_all("/", "_", literal=True)
    short = pl.when(source.str.starts_with(framework + "_")).then(source.str.slice(framework.str.len_chars() + 1))
    return pl.concat_str(framework, pl.lit("/"), short.otherwise(source))
